"""The training state of a checkpoint comes back as it was saved."""

import torch

from opd.teachers.base import TeacherState
from opd.training.checkpoint import STATE, TrainingState, load, save


def test_teachers_without_state_need_no_folder(tmp_path):
    average = TeacherState({"weight": torch.arange(3.0)})
    teachers = [TeacherState(), average, TeacherState(server_weights="abc"), TeacherState()]
    optimizer = {"weight": {"exp_avg": torch.ones(3)}}
    save(TrainingState(7, optimizer, {"least": torch.ones(2)}, {}, {}, teachers), tmp_path)
    (tmp_path / STATE / "teacher-3").rmdir()  # as a store of files does
    state = load(tmp_path, 4)
    assert state.step == 7 and torch.equal(state.memory["least"], torch.ones(2))
    assert torch.equal(state.optimizer["weight"]["exp_avg"], torch.ones(3)) and not state.rollouts and not state.bridge
    assert [t.server_weights for t in state.teachers] == ["", "", "abc", ""]
    assert torch.equal(state.teachers[1].tensors["weight"], torch.arange(3.0))
    assert [len(t.tensors) for t in state.teachers] == [0, 1, 0, 0]
