"""The training state of a checkpoint comes back as it was saved."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from opd.core.errors import Refusal
from opd.models.checkpoints import STATE
from opd.teachers.base import TeacherState
from opd.training.checkpoint import TrainingState, load, optimizer_state, restore_optimizer, save


def test_teachers_without_state_need_no_folder(tmp_path):
    average = TeacherState({"weight": torch.arange(3.0)})
    teachers = [TeacherState(), average, TeacherState(server_weights="abc"), TeacherState()]
    optimizer = {"weight": {"exp_avg": torch.ones(3)}}
    memory = {"least": torch.ones(2)}
    save(TrainingState(step=7, optimizer=optimizer, memory=memory, teachers=teachers), tmp_path)
    (tmp_path / STATE / "teacher-3").rmdir()  # as a store of files does
    state = load(tmp_path, 4)
    assert state.step == 7 and torch.equal(state.memory["least"], torch.ones(2))
    assert torch.equal(state.optimizer["weight"]["exp_avg"], torch.ones(3)) and not state.rollouts and not state.bridge
    assert [t.server_weights for t in state.teachers] == ["", "", "abc", ""]
    assert torch.equal(state.teachers[1].tensors["weight"], torch.arange(3.0))
    assert [len(t.tensors) for t in state.teachers] == [0, 1, 0, 0]


class Experts(nn.Module):
    """A layer that sends each batch to a single expert; the others get no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](x).square().sum()


def prepared(weights=None):
    layer = Experts()
    if weights is not None:
        layer.load_state_dict(weights)
    return Accelerator(cpu=True).prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1))


def steps(layer, optimizer, experts):
    for expert in experts:
        layer(torch.arange(8.0).view(2, 4), expert).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(layer, optimizer, folder):
    state, without_state = optimizer_state(layer, optimizer)
    save(TrainingState(step=2, optimizer=state, without_state=without_state), folder)
    return load(folder)


def test_experts_that_no_token_reached_resume_as_if_never_stopped(tmp_path):
    """Expert 1 has its first gradient after the checkpoint, expert 2 never: AdamW changes nothing before it."""
    straight = prepared()
    steps(*straight, [0, 0, 1, 0, 1])
    layer, optimizer = prepared()
    steps(layer, optimizer, [0, 0])
    state = saved(layer, optimizer, tmp_path)
    assert set(state.without_state) == {f"experts.{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    resumed = prepared(layer.state_dict())
    restore_optimizer(*resumed, state, tmp_path)
    steps(*resumed, [1, 0, 1])
    expected = straight[0].state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed[0].state_dict().items())
    assert torch.equal(expected["experts.2.weight"], Experts().experts[2].weight)


def test_a_parameter_that_had_gradients_needs_its_state(tmp_path):
    layer, optimizer = prepared()
    steps(layer, optimizer, [0, 1])
    state = saved(layer, optimizer, tmp_path)
    del state.optimizer["experts.1.bias"]
    with pytest.raises(Refusal, match=r"lacks the state of 1 trained parameters, such as experts\.1\.bias"):
        restore_optimizer(*prepared(), state, tmp_path)
