"""Teachers behind a server, as a run meets them: do they give what the method needs, and do they say what they should.

`reached(url) -> Server`, `known(model) -> Known`, what is compared with the student before any weights, and `compared`.
"""

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
from opd.head.inputs import Given, Hidden
from opd.head.token_scores import scores
from opd.head.vocabulary import Vocabulary
from opd.methods.method import Method
from opd.models import load as models
from opd.models.remote.vllm_protocol import WHOLE, Server, reach
from opd.teachers.capabilities import require
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher

APART = 0.05  # nats: mean difference between a server and a local copy of its model beyond which they are not the same


@dataclass(frozen=True)
class Known:
    """A model before its weights."""

    text: Tokenizer
    shape: PretrainedConfig
    stop: tuple[int, ...]


def known(source: models.Source, *, field: str) -> Known:
    """Of a model whose files are here."""
    text = models.tokenizer(source, field=field)
    shape = models.config(source, field=field).get_text_config()
    return Known(text, shape, models.stop_ids(source, text))


def known_there(server: Server, student: Known, config: Train) -> Known:
    """Of a model behind a server: what it tells; a server that is no `opd serve` tells little, the rest is supposed."""
    how, likely, stop = config.remote, student.text, student.stop
    if how.teacher_tokenizer and not server.told:
        source = models.locate(
            how.teacher_tokenizer, field="teacher-tokenizer", trust_remote_code=config.trust_remote_code
        )
        likely = models.tokenizer(source, field="teacher-tokenizer")
        stop = models.stop_ids(source, likely)
    text = server.tokenizer(likely, student.shape.vocab_size)
    rows = server.told.get("rows", student.shape.vocab_size)
    shape = PretrainedConfig.from_dict({"vocab_size": rows, "max_position_embeddings": server.context})
    return Known(text, shape, tuple(server.told.get("eos", stop)))


def reached(model: ScoringServer, plan: Plan, *, field: str) -> Server:
    """Connect to a server.  Raises Refusal if it does not provide what the run needs."""
    config, url = plan.config, model.name
    server = reach(url, config.remote.towards(field, model, plan.teachers[""]), field=field)
    needs = Method.needs if server.told else Method.needs_of_tokens
    gives = "final states and the head" if server.told else "log-probs of the sampled tokens and of its top ones"
    gives += ", of any named token, too" if server.chosen else ""
    enough = needs(plan.method) - server.provides <= WHOLE | {"chosen", "teacher_top"}
    remedy = "serve it by `opd serve`, or load it here" if enough else "load the model here"
    require(plan.method, server.provides, flag=field, model=url, gives=gives, remedy=remedy, needs=needs)
    others = [str(other) for other in plan.teachers.values() if other != model]
    if not server.told and others:
        raise Refusal(
            f"--{field} {url}: it gives log-probs of the sampled tokens alone, and columns that other teachers fill "
            f"({', '.join(others)}) would have holes: serve it by `opd serve`, or leave out --route"
        )
    if not server.told and config.loss_temperature != 1:
        raise Refusal(
            f"--loss-temperature {config.loss_temperature}: --{field} {url} gives log-probs at temperature 1 alone: "
            "leave it at 1, or serve the teacher by `opd serve`"
        )
    return server


def compared(
    teacher: HiddenTeacher | LogpTeacher, texts: Sequence[Sequence[int]], config: Train, on: torch.device
) -> None:
    """Refuse a server that does not say what the local copy of its model says (--teacher-local)."""
    name = config.remote.teacher_local
    source = models.locate(name, field="teacher-local", trust_remote_code=config.trust_remote_code)
    weights = models.load(source, field="teacher-local", dtype=dtype_of(config.teacher_precision), device=on)
    models.verify_head(weights, field="teacher-local")
    apart = compare(teacher, LocalTeacher(weights.requires_grad_(False), to=on), texts)
    if not apart.mean() <= APART:
        raise Refusal(
            f"--teacher-local {name}: its log-probs and those of {teacher.client.url} are {apart.mean():.3g} nats "
            f"apart on average over {len(apart)} tokens ({apart.max():.3g} at most): they are two models: serve that "
            "one, or name the one that is served"
        )


@torch.no_grad()
def compare(remote: HiddenTeacher | LogpTeacher, local: LocalTeacher, texts: Sequence[Sequence[int]]) -> Tensor:
    """|log q there - log q here| of every token of some texts, nats."""
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

    def of(heard: Hidden | Given) -> Tensor:
        if isinstance(heard, Given):
            return heard.logp.cpu()
        there = ids.to(heard.states.device)
        return scores(heard, there, Vocabulary(len(heard.head.weight)), 0).logp[:, 0].float().cpu()

    return (of(remote.hidden(rollouts, masks)) - of(local.hidden(rollouts, masks))).abs()
