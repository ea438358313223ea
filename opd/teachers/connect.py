"""Checks of teachers before a run: what a server provides, tokenizer and sizes, and equality with a local copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.model_names import ScoringServer
from opd.config.plan import Plan
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.head.inputs import Hidden, TeacherLogps
from opd.head.token_scores import scores
from opd.head.vocabulary import Vocabulary
from opd.methods.method import Method
from opd.models import load as models
from opd.models.remote.vllm_protocol import OPD_SERVE_COLUMNS, Server, connect
from opd.models.source import ModelSource, locate
from opd.models.verify import verify_head
from opd.teachers.base import require
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher

MAX_DIFFERENCE = 0.05  # nats: largest mean difference between the log-probs of a server and a local copy of its model


@dataclass(frozen=True)
class ModelInfo:
    """The tokenizer, config and stop ids of a model, before its weights are loaded."""

    tokenizer: Tokenizer
    config: PretrainedConfig
    stop: tuple[int, ...]


def local_info(source: ModelSource, *, field: str) -> ModelInfo:
    """Return tokenizer, config and stop ids of a model with local files."""
    tokenizer, config = models.tokenizer(source, field=field), models.config(source, field=field)
    return ModelInfo(tokenizer, config.get_text_config(), models.stop_ids(source, tokenizer))


def server_info(server: Server, student: ModelInfo, config: Train) -> ModelInfo:
    """Return tokenizer, config and stop ids of a model behind a server.

    `opd serve` sends them.  For other servers they are those of --teacher-tokenizer, else the student's.
    """
    expected, stop = student.tokenizer, student.stop
    name = config.remote.teacher_tokenizer
    if name and not server.identity:
        source = locate(name, field="teacher-tokenizer", trust_remote_code=config.trust_remote_code)
        expected = models.tokenizer(source, field="teacher-tokenizer")
        stop = models.stop_ids(source, expected)
    tokenizer = server.tokenizer(expected, student.config.vocab_size)
    rows = server.identity.get("rows", student.config.vocab_size)
    model_config = PretrainedConfig.from_dict({"vocab_size": rows, "max_position_embeddings": server.context})
    return ModelInfo(tokenizer, model_config, tuple(server.identity.get("eos", stop)))


def open_server(model: ScoringServer, plan: Plan, *, field: str) -> Server:
    """Connect to a server.  Raises Refusal if it does not provide what the run needs."""
    config, url = plan.config, model.name
    server = connect(url, config.remote.towards(field, model, plan.teachers.get("")), field=field)
    needs = Method.needs if server.identity else Method.needs_of_tokens
    gives = "final states and the head" if server.identity else "log-probs of the sampled tokens and of its top ones"
    gives += ", of any named token, too" if server.chosen else ""
    served_is_enough = needs(plan.method) - server.provides <= OPD_SERVE_COLUMNS | {"chosen", "teacher_top"}
    remedy = "serve it by `opd serve`, or load it here" if served_is_enough else "load the model here"
    require(plan.method, server.provides, flag=field, model=url, gives=gives, remedy=remedy, needs=needs)
    other_teachers = [str(other) for other in plan.teachers.values() if other != model]
    if not server.identity and other_teachers:
        raise Refusal(
            f"--{field} {url}: it gives log-probs of the sampled tokens alone, and columns that other teachers fill "
            f"({', '.join(other_teachers)}) would have holes: serve it by `opd serve`, or leave out --route"
        )
    if not server.identity and config.teacher_temperature() != 1:
        flag = "--teacher-loss-temperature" if config.teacher_loss_temperature else "--loss-temperature"
        raise Refusal(
            f"{flag} {config.teacher_temperature()}: --{field} {url} gives log-probs at temperature 1 alone: take "
            "--teacher-loss-temperature 1, or serve the teacher by `opd serve`"
        )
    return server


def verify_local_copy(
    teacher: HiddenTeacher | LogpTeacher, texts: Sequence[Sequence[int]], config: Train, on: torch.device
) -> None:
    """Refuse a server whose log-probs differ from those of the local copy of its model (--teacher-local)."""
    name = config.remote.teacher_local
    source = locate(name, field="teacher-local", trust_remote_code=config.trust_remote_code)
    weights = models.load(source, field="teacher-local", dtype=dtype_of(config.teacher_precision), device=on)
    verify_head(weights, field="teacher-local")
    differences = compare(teacher, LocalTeacher(weights.requires_grad_(False), to=on), texts)
    mean, largest = differences.mean(), differences.max()
    if not mean <= MAX_DIFFERENCE:
        raise Refusal(
            f"--teacher-local {name}: its log-probs and those of {teacher.client.url} are {mean:.3g} nats apart on "
            f"average over {len(differences)} tokens ({largest:.3g} at most): they are two models: serve that one, or "
            "name the one that is served"
        )


@torch.no_grad()
def compare(remote: HiddenTeacher | LogpTeacher, local: LocalTeacher, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return |log q of a server - log q of a local teacher|, in nats, for each token of texts but their first ones."""
    rollouts = [
        Rollout(
            prompt_ids=(),
            teacher_prompt_ids=tuple(ids[:1]),
            ids=tuple(ids[1:]),
            sampler_logp=(),
            index=i,
            group=i,
            stopped=False,
        )
        for i, ids in enumerate(texts)
    ]
    masks = [[True] * len(r.ids) for r in rollouts]
    ids = torch.tensor([i for r in rollouts for i in r.ids])[:, None]

    def logp(output: Hidden | TeacherLogps) -> Tensor:
        if isinstance(output, TeacherLogps):
            return output.logp.cpu()
        candidates = ids.to(output.states.device)
        return scores(output, candidates, Vocabulary(len(output.head.weight)), 0).logp[:, 0].float().cpu()

    return (logp(remote.hidden(rollouts, masks)) - logp(local.hidden(rollouts, masks))).abs()
