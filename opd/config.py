"""What a run and an evaluation are told: one value each, the same for Python and the command line."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from opd.engines.speaker import Speaker
from opd.method import Method, PolicyGradient, Term
from opd.methods import METHODS
from opd.questions import Grade, Stages
from opd.rollouts import Mixture, OnPolicy, Snapshot, TeacherPrefix, listens
from opd.surrogates import Reinforce, TruncatedRatio
from opd.tasks.task import Data
from opd.teachers.client import Remote
from opd.types import DATA, Column, Refusal, Sampling, StopToken, Truncated, positive
from opd.weights import Constant, SequenceMean, TokenMean, TruncatedImportance

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


CONTEXT = """{prompt}

Here is a correct solution:

{context}

Now answer the question in your own words."""


def native() -> Precision:
    """bf16 on a GPU, fp32 on a CPU: few CPUs compute bf16 faster."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def room() -> int:
    """3072 on a GPU, 256 on a CPU: some thousand tokens at once, and some hundred, for more gains nothing there."""
    return 3072 if torch.cuda.is_available() else 256


@dataclass(frozen=True, kw_only=True)
class Train:
    """A run."""

    student: str
    """The model to train: hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder,
    LoRA adapter, or embedded:NAME."""
    teacher: str = ""
    """The model to learn from, with the same vocabulary; same kinds of name.  Or the student's own weights: self (as
    they are), base (as they were), ema:RATE (their moving average); then --context is what it knows better.  Empty is
    the method's own, where it has one."""
    prompts: str
    """Training prompts: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    route: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=MODEL: another teacher, for the prompts whose --route-column holds NAME; the rest learn from --teacher.
    Repeat for more."""
    route_column: str = "teacher"
    """Column of the prompts that names their teacher."""
    reference: str = ""
    """Frozen third model of the methods that read one (g-opd); empty is the student as it is before the first step."""
    judge: str = ""
    """Who grades responses for the methods that ask (ropd, rubricem): empty, the teacher itself; verifier, the task's
    verifier and the steps that right answers share; or a model, as --teacher names one that only writes."""
    context: str = ""
    """What the teacher reads and the student does not: a column of the row (response, answer, any other), or peer,
    a right response of the same prompt's other rollouts; empty is the method's own, none for most."""
    context_template: str = CONTEXT
    """How the teacher's question is written, with {prompt} and {context} in it."""
    method: Annotated[Method, tyro.conf.Fixed, tyro.conf.Suppress] = field(default_factory=METHODS["vopd"])
    """What is learnt; on the command line the METHOD and its flags."""
    out: Path = Path("outputs/opd")
    """The run folder: configuration, metrics, checkpoints."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, bitwise; start it where there is none."""
    steps: int = 100
    """Rollout batches to train on."""
    batch: int = 64
    """Rollouts in a batch, over all processes."""
    per_prompt: int = 0
    """Rollouts of each prompt; 0 is the method's own number."""
    updates: int = 0
    """Optimizer steps on each rollout batch; 0 is the method's own number."""
    staleness: int = 0
    """Steps that a rollout's writer may be behind: above 0, a worker process writes rollouts while the student trains;
    0 writes and trains in turns."""
    exact_staleness: bool = False
    """Every rollout is --staleness steps behind, not at most so many: reproducible, whatever the clock says."""
    worker: bool = False
    """A worker process writes rollouts at --staleness 0, too."""
    worker_device: str = "same"
    """Where the worker's copy of the student lives: same as the student, cpu, cuda:1, ..."""
    importance_cap: float = 0.0
    """Weigh tokens of policy gradients without a ratio by min(student / who wrote it, this); 0 does not, unless another
    engine writes (--engine): then it is 2."""
    speaker: Speaker = Speaker()
    reduction: Literal["method", "token", "sequence", "constant"] = "method"
    """What the loss is averaged over: every token, every sequence, or a constant (batch x longest response)."""
    data: Data = Data()
    sampling: Sampling = Sampling()
    loss_temperature: float = 1.0
    """Divides both models' logits in the loss; --temperature changes only the sampler."""
    stop_token: StopToken = "canonical"
    """Terminal token: canonical merges both models' stop tokens, train keeps them apart, mask skips them."""
    truncated: Truncated = "train"
    """Rollouts that hit the length limit: train on them, or drop them."""
    teacher_prompt: Literal["own", "same"] = "own"
    """The teacher reads the prompt in its own chat template, or the same ids as the student."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear fall to 0 at the last step."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments, each in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; 0 is none."""
    max_grad_norm: float = 1.0
    """Larger gradients are scaled down to this norm."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank; 0 trains all weights."""
    lora_alpha: float = 32.0
    """LoRA's scale is alpha / rank."""
    lora_targets: str = "all-linear"
    """Layers that get an adapter, comma separated; the head never does."""
    precision: Precision = field(default_factory=native)
    """Compute type; trained weights and optimizer state stay fp32."""
    teacher_precision: Precision = field(default_factory=native)
    """Type of the teacher's weights."""
    teacher_device: str = "same"
    """Where the teacher lives: same as the student, cpu, cuda:1, ..."""
    remote: Remote = Remote()
    micro_batch_tokens: int = 8192
    """Padded tokens that go through a model at once; lower it when memory runs out."""
    chunk_mb: int = field(default_factory=room)
    """Memory for logits in the head pass, MB."""
    logit_precision: Precision = "fp32"
    """Type that logits are kept in between the head pass's products.  bf16 halves their memory, and what a GPU moves
    between the products, at a KL that is off by percents."""
    decode_rows: int = 64
    """Responses decoded at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Train and score through torch.compile, half a minute at first; for GPUs: a CPU gains nothing."""
    eval_prompts: str = ""
    """Held-out prompts, same kinds of name as --prompts; empty: no evaluation."""
    eval_every: int = 50
    """Steps between evaluations; also before the first step and after the last."""
    eval_limit: int = 256
    """Held-out prompts used."""
    eval_temperature: float = 0.0
    """Sampling temperature of evaluations; 0 is greedy."""
    save_every: int = 50
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Checkpoints kept."""
    rollouts_every: int = 50
    """Steps between saved rollouts (texts and columns)."""
    trackers: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Also log to tensorboard, wandb, trackio, mlflow or another tracker of Accelerate's; repeat for more."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""
    doctor: bool = True
    """Look at models, prompts, memory and some rollouts before the first step; `opd doctor` prints all it finds."""
    quiet: bool = False
    """No progress output."""

    def resolved(self) -> Method:
        """The method with the run's overrides of its rollouts and reduction."""
        who = self.method.rollouts
        who = replace(who, per_prompt=self.per_prompt or who.per_prompt, updates=self.updates or who.updates)
        reductions: dict[str, Callable[[], Column]] = {
            "method": lambda: self.method.reduction,
            "token": TokenMean,
            "sequence": SequenceMean,
            "constant": lambda: Constant(self.sampling.max_new_tokens),
        }
        try:
            terms = tuple(self._weighed(term) for term in self.method.terms)
            return replace(self.method, terms=terms, rollouts=who, reduction=reductions[self.reduction]())
        except ValueError as error:
            raise Refusal(str(error)) from error

    def _weighed(self, term: Term) -> Term:
        """A term with --importance-cap, where it is a policy gradient without a ratio to who wrote its tokens."""
        cap = self.importance_cap or (0.0 if self.speaker.engine == "hf" else 2.0)
        if not cap or not isinstance(term, PolicyGradient) or term.corrected():
            return term
        if term.surrogate == Reinforce():
            return replace(term, surrogate=TruncatedRatio(cap))
        return replace(term, weights=(*term.weights, TruncatedImportance(cap)))

    def check(self) -> None:
        """Refuse impossible settings before anything loads."""
        self._check_teachers()
        self._check_worker()
        self._check_engine()
        positive(self, "steps", "batch", "lr", "lora_alpha", "micro_batch_tokens", "chunk_mb", "decode_rows")
        positive(self, "eval_every", "eval_limit", "save_every", "keep", "rollouts_every")
        positive(self, "loss_temperature", "max_grad_norm")
        positive_or_0 = ("warmup", "weight_decay", "lora_rank", "eval_temperature", "per_prompt", "updates")
        for name in (*positive_or_0, "staleness", "importance_cap"):
            if not getattr(self, name) >= 0:
                raise Refusal(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refusal(f"--betas {self.betas[0]} {self.betas[1]}: both must lie in [0, 1)")
        if not 0 <= self.seed < 1 << 32:
            raise Refusal(f"--seed {self.seed}: must lie in [0, {(1 << 32) - 1}]")
        self.sampling.check()
        if not self.sampling.temperature > 0:
            raise Refusal(
                f"--temperature {self.sampling.temperature}: training samples; 1 is unbiased, 0 would be greedy"
            )
        who = self.resolved().rollouts
        if isinstance(who, Snapshot) and not self.compares():
            s = self.sampling
            raise Refusal(
                f"--temperature {s.temperature}, --top-p {s.top_p}, --top-k {s.top_k}, --loss-temperature "
                f"{self.loss_temperature}: {who} takes the log-probs of the draw for the snapshot's own, in its drift "
                "and in Delta-IFD: leave them at 1, 1, 0 and 1, or take another method"
            )
        if self.batch % (who.per_prompt * who.updates):
            raise Refusal(
                f"--batch {self.batch}: must be a multiple of {who.per_prompt * who.updates} "
                f"({who.per_prompt} rollouts per prompt x {who.updates} updates)"
            )

    def routes(self) -> dict[str, str]:
        """Every teacher by its name; "" is --teacher."""
        own = self.method.teacher
        out = {"": self.teacher or (own.weights if own else "")}
        for route in self.route:
            name, equals, model = route.partition("=")
            if not (name and equals and model) or name in out:
                raise Refusal(f"--route {route}: write NAME=MODEL, each name once")
            out[name] = model
        return out

    def told(self) -> str:
        """What the teacher reads and the student does not: a column, peer, or nothing."""
        own = self.method.teacher
        return self.context or (own.context if own else "")

    def learning_rate(self, update: int, total: int) -> float:
        """Of optimizer step `update` (from 1) of `total`."""
        if update <= self.warmup:
            return self.lr * update / self.warmup
        done = (update - self.warmup - 1) / max(1, total - self.warmup)
        match self.schedule:
            case "constant":
                return self.lr
            case "linear":
                return self.lr * (1 - done)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * done)) / 2

    def _check_worker(self) -> None:
        """Refuse what a worker process cannot write: it has the student alone."""
        apart = "--worker" if self.worker and not self.staleness else f"--staleness {self.staleness}"
        who = self.resolved().rollouts
        alone = isinstance(who, OnPolicy | Snapshot) or (isinstance(who, Mixture) and who.other == DATA)
        if (self.worker or self.staleness) and not alone:
            raise Refusal(
                f"{apart}: rollouts of {who} need the teacher or what earlier steps measured, and the worker process "
                "has the student alone: leave the flag out, or take a method on the student's own rollouts"
            )
        if (self.worker or self.staleness) and isinstance(self.method.asks, Stages) and self.method.asks.reflect:
            raise Refusal(f"{apart}: the prompts of {self.method.asks} hold what earlier steps reflected: leave it out")
        if self.exact_staleness and not self.staleness:
            raise Refusal("--exact-staleness: --staleness is 0, which is exact; set it, or leave the flag out")
        if self.worker_device != "same" and not (self.worker or self.staleness):
            raise Refusal(f"--worker-device {self.worker_device}: there is no worker; add --staleness 1, or --worker")

    def _check_engine(self) -> None:
        """Refuse rollouts that another engine cannot write."""
        self.speaker.check()
        engine, who = self.speaker.engine, self.resolved().rollouts
        if engine == "hf":
            return
        if isinstance(who, OnPolicy) and who.samples > 1:
            raise Refusal(
                f"--engine {engine}: {who} draws more tokens at each position, which hf alone does: take --engine hf, "
                "or leave --samples out"
            )
        if listens(who):
            raise Refusal(f"--engine {engine}: {who} lets the teacher read along token by token, which hf alone does")
        if "student_alone" in self.method.reads():
            raise Refusal(
                f"--engine {engine}: the method reads what the student says of a response without its prompt, and hf "
                "alone tells: leave the flag out, or switch the filter off (npd --no-filtered)"
            )
        if self.worker or self.staleness:
            raise Refusal(f"--engine {engine}: the worker process of --staleness and --worker has hf alone")

    def _check_teachers(self) -> None:
        """Refuse a teacher that is missing, or that has nothing to say to the student it is."""
        teachers, told, who = self.routes(), self.told(), self.resolved().rollouts
        if not teachers[""]:
            raise Refusal("--teacher must be given; `opd train --help` explains what can stand there")
        addresses = ("http://", "https://", "openai:")
        for pair in self.remote.route_token_env:
            name, _, variable = pair.partition("=")
            if not (name and variable and teachers.get(name, "").startswith(addresses)):
                raise Refusal(f"--route-token-env {pair}: write NAME=VARIABLE, with the NAME of a --route to a server")
        if (key := self.remote.judge_token_env) and not self.judge.startswith(addresses):
            raise Refusal(f"--judge-token-env {key}: no --judge is behind a server; leave it out")
        local = self.remote.teacher_local
        if local and not teachers[""].startswith(("http://", "https://")):
            raise Refusal(
                f"--teacher-local {local}: is compared with --teacher, and that is no server here: leave it out"
            )
        for name, model in teachers.items():
            field = f"--route {name}=" if name else "--teacher "
            if model == "self" and not told:
                raise Refusal(
                    f"{field}self: the student itself; the KL between the two is 0 and nothing is learnt: "
                    "give --context, what the teacher knows and the student does not, or name another teacher"
                )
        missing = [part for part in ("{prompt}", "{context}") if part not in self.context_template]
        if missing:
            raise Refusal(f"--context-template {self.context_template!r}: lacks {' and '.join(missing)}")
        asks = self.method.asks
        if self.judge and not isinstance(asks, Grade | Stages):
            raise Refusal(f"--judge {self.judge}: the method asks no judge; leave it out, or take ropd or rubricem")
        if self.judge and isinstance(asks, Stages) and not asks.references:
            raise Refusal(
                f"--teacher {teachers['']}: is never asked, for the judge is --judge {self.judge} and the method takes "
                "no answers of a teacher; add --references 1 or more after the METHOD, or name the judge as --teacher"
            )
        if told and self.method.asks is not None:
            raise Refusal(f"--context {told}: a teacher that is asked for texts is told nothing more: leave it out")
        if told and self.teacher_prompt == "same":
            raise Refusal(f"--context {told}: is in the teacher's prompt, and --teacher-prompt same has none")
        if told == "peer" and who.per_prompt < 2:
            raise Refusal("--context peer: another rollout of the same prompt; set --per-prompt to 2 or more (SDPO: 8)")
        if told == "peer" and (listens(who) or isinstance(who, TeacherPrefix)):
            raise Refusal(f"--context peer: is known once rollouts are written, and the teacher takes part in {who}")
        moving = [m for m in teachers.values() if m == "self" or m.startswith("ema")]
        if isinstance(who, TeacherPrefix) and moving:
            raise Refusal(
                f"--teacher {moving[0]}: its weights move, and it would begin each response once for all steps: switch "
                "the prefix off (tropd --no-prefix), or name base or another model"
            )

    def _tempered(self) -> bool:
        """Whether tokens are drawn of another distribution than the student's own."""
        return self.sampling.temperature != 1 or self.sampling.top_p < 1 or self.sampling.top_k > 0

    def compares(self) -> bool:
        """Whether the log-probs of the draw are meant to be those of the loss."""
        return not self._tempered() and self.loss_temperature == 1

    def warnings(self) -> list[str]:
        """Settings that are allowed and change what the estimator means, each with the reason."""
        out, s = [], self.sampling
        if self._tempered():
            out.append(
                f"sampling at temperature {s.temperature}, top_p {s.top_p}, top_k {s.top_k} draws from another "
                "distribution than the loss assumes: gradients are biased (1, 1, 0 is unbiased)"
            )
        if self.resolved().rollouts.updates > 1:
            out.append("more than one update per rollout batch: from the second on, rollouts are off policy")
        bare = [t for t in self.resolved().terms if isinstance(t, PolicyGradient) and not t.corrected()]
        if self.staleness and bare:
            out.append(
                f"--staleness {self.staleness}: rollouts are of an older student, and a policy gradient without the "
                "ratio to it is biased: take async-opd, add --importance-cap 2, or match distributions (opd-full)"
            )
        return out


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is evaluated, on what, and how."""

    model: str
    """Hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder (its last checkpoint), LoRA
    adapter, or embedded:NAME."""
    prompts: str
    """Problems: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    set: str = ""
    """The benchmark that --prompts is the file of: gsm8k, math-500, aime24, aime25, amc23, minerva, olympiad, gpqa,
    sciknoweval or sciknoweval-filling.  It chooses columns, wording and verifier; flags that are set win."""
    against: str = ""
    """Another model, on the same problems with the same noise: the difference, paired by problem."""
    data: Data = Data(split="test")
    samples: int = 0
    """Responses to each prompt (the k of avg@k, pass@k and maj@k); 0 is the set's own number where --temperature is
    above 0, else 1."""
    sampling: Sampling = Sampling(temperature=0.0)
    precision: Precision = field(default_factory=native)
    """Type of the weights."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where the model runs: cpu, cuda, cuda:1, ..."""
    interval: Literal["wilson", "bootstrap"] = "wilson"
    """95 % intervals over prompts: Wilson's, which hold near 0 and 1 too, or the percentile bootstrap."""
    decode_rows: int = 64
    """Responses decoded at once."""
    out: str = ""
    """A .jsonl file for what became of each problem: answers, outcomes, lengths, responses."""
    overwrite: bool = False
    """Replace a file that another command, or you, wrote; what is read is never replaced."""
    seed: int = 0
    """Seed of the samples, of the rows that --limit keeps, and of shuffled options."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""
