"""Settings of a training run, for Python and for the command line: `Train`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opd.config.data import Data
from opd.config.engine import Speaker
from opd.config.precision import Precision, default_chunk_mb, default_precision
from opd.config.servers import Remote
from opd.core.sampling import Sampling, StopToken, Truncated

if TYPE_CHECKING:
    from opd.methods.method import Method
else:
    Method = Any  # no flag: the command line reads METHOD by itself


def _vopd() -> Method:
    from opd.methods.vopd import vopd

    return vopd()


@dataclass(frozen=True, kw_only=True)
class Train:
    """Settings of a training run; each field is a flag of `opd train`."""

    student: str
    """The model to train: hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder,
    LoRA adapter, or embedded:NAME."""
    teacher: str = ""
    """Model to learn from.  It must have the student's vocabulary, unless the method uses only the teacher's texts.
    Same kinds of name as --student, a server (http://HOST:PORT), or the student's weights: self (current), base
    (initial) or ema:RATE (moving average); then set --context, which only the teacher reads.  Empty: the default
    teacher of the method, if any."""
    prompts: str
    """Training prompts: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    route: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=MODEL: use this teacher for the prompts whose --route-column holds NAME.  Repeat the flag for several
    teachers.  --teacher, if given, takes all other prompts; without it, every prompt must have a route."""
    route_column: str = "teacher"
    """Column of --prompts with the name of each prompt's --route."""
    reference: str = ""
    """Frozen reference model, for methods that read it (g-opd).  Empty: the student before the first step."""
    judge: str = ""
    """Judge that grades responses, for ropd and rubricem.  Empty: the teacher.  verifier: the task's verifier, and the
    solution steps that correct responses share.  Or a model: any name that --teacher accepts for a text-only
    teacher."""
    context: str = ""
    """Privileged context in the teacher's prompt, which the student does not see.  A column of the row (response,
    answer or any other), or peer: a correct response among the prompt's other rollouts.  Empty: the method's default,
    which is none for most methods."""
    context_template: str = ""
    """Template of the teacher's prompt when --context is set; it must contain {prompt} and {context}.  Empty: the
    published one for opsd, sdft and sdpo, and for other methods one that calls the context a correct solution."""
    method: Annotated[Method, tyro.conf.Fixed, tyro.conf.Suppress] = field(default_factory=_vopd)
    """Training method; on the command line it is METHOD, followed by its flags."""
    out: Path = Path("outputs/opd")
    """Run folder for the configuration, metrics and checkpoints."""
    resume: bool = False
    """Continue the run in --out from its newest whole checkpoint, with bitwise the same results as an uninterrupted
    run.  Without a checkpoint the run starts from the beginning, so one command serves a scheduler that starts jobs
    again.  --resume auto is the same."""
    steps: int = 100
    """Number of training steps; each trains on a batch of rollouts."""
    batch: int = 64
    """Rollouts per step, summed over all processes."""
    per_prompt: int = 0
    """Rollouts per prompt.  0: the method's default."""
    updates: int = 0
    """Optimizer steps per rollout batch.  0: the method's default."""
    staleness: int = 0
    """Maximum number of steps that the weights behind a rollout may be older than the trained weights.  Above 0, a
    worker process, or the servers of --engine, generate rollouts while the student trains.  0: generation and training
    take turns."""
    exact_staleness: bool = False
    """Make every rollout exactly --staleness steps old instead of at most that many.  The run is then reproducible,
    because results do not depend on timing."""
    worker: bool = False
    """Generate rollouts in a worker process, or ask the servers of --engine ahead, at --staleness 0, too."""
    worker_device: str = "same"
    """Device of the worker's copy of the student: same (as the student), cpu, cuda:1, ..."""
    importance_cap: float = 0.0
    """Cap C of truncated importance sampling: policy-gradient terms without an importance ratio weigh each token by
    min(p_student / p_sampler, C).  0: no correction with --engine hf, and C = 2 with any other engine."""
    speaker: Speaker = Speaker()
    reduction: Literal["method", "token", "sequence", "constant"] = "method"
    """Denominator of the loss: the number of tokens (token), of sequences (sequence), or batch x --max-new-tokens
    (constant).  method: the method's default."""
    data: Data = Data()
    sampling: Sampling = Sampling()
    loss_temperature: float = 1.0
    """Divide the logits of student and teacher by this value in the loss.  --temperature changes only the sampler."""
    teacher_loss_temperature: float = 0.0
    """Divide the teacher's logits by this value instead of --loss-temperature.  0: by --loss-temperature.  SCOPE
    divides only the student's, by the sampling temperature: --temperature 0.6 --loss-temperature 0.6
    --teacher-loss-temperature 1."""
    stop_token: StopToken = "canonical"
    """Treatment of the stop token in the loss.  canonical: count the stop tokens of both models as a single token;
    train: keep them as different tokens; mask: do not train on them."""
    truncated: Truncated = "train"
    """Rollouts that reach --max-new-tokens: train on them, or drop them from the loss."""
    teacher_prompt: Literal["own", "same"] = "own"
    """Prompt that the teacher reads.  own: rendered with the teacher's chat template; same: the student's token ids."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate schedule after the warm-up.  cosine and linear fall to --min-lr-ratio x --lr at the last step."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of --schedule cosine or linear, as a share of --lr, in [0, 1)."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay.  0: none."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this L2 norm."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank.  0: train all weights."""
    lora_alpha: float = 32.0
    """LoRA's alpha; the adapter's output is scaled by alpha / rank."""
    lora_targets: str = "all-linear"
    """Names of the layers that get an adapter, comma separated; all-linear selects every linear layer except the LM
    head, which never gets an adapter."""
    precision: Precision = field(default_factory=default_precision)
    """dtype of the student's computation: fp32 or bf16 (autocast).  Trained weights and optimizer state stay fp32."""
    teacher_precision: Precision = field(default_factory=default_precision)
    """dtype of the teacher's weights."""
    teacher_device: str = "same"
    """Device of the teacher: same (as the student), cpu, cuda:1, ..."""
    remote: Remote = Remote()
    micro_batch_tokens: int = 8192
    """Tokens in a micro-batch, padding included.  Lower it when memory runs out."""
    packing: bool = False
    """Put the rows of a micro-batch behind one another, without padding, in all models that train and score (like
    TRL's padding_free and verl's use_remove_padding).  The start compares packed rows with single ones, and refuses
    models whose rows would see each other.  Use it for responses of very different lengths."""
    chunk_mb: int = field(default_factory=default_chunk_mb)
    """Memory for the logits in the LM head's pass, in MB.  The pass works on chunks of tokens that fit in it."""
    logit_precision: Precision = "fp32"
    """dtype of the logits that the LM head's pass stores between its matmuls.  bf16 halves their memory and memory
    traffic, but the KL is then wrong by some percent."""
    decode_rows: int = 64
    """Responses to generate at the same time with --engine hf.  Lower it when memory runs out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass.  Needs less memory and more time."""
    shard: bool = False
    """Shard student, optimizer, teacher and reference over the processes (FSDP2): each holds 1/N of every layer.  With
    one process nothing changes."""
    export: Literal["every", "last", "never"] = "every"
    """Checkpoints of a sharded run that also hold a model folder, which transformers, vLLM and `opd eval` read.  To
    gather it takes time, and memory in the main process.  `opd export` writes one from the shards at any time."""
    compile: bool = False
    """Compile the forward passes of training and scoring with torch.compile.  Costs half a minute at the start.  Use it
    on GPUs; a CPU gains nothing."""
    eval_prompts: str = ""
    """Held-out prompts to evaluate on; same kinds of name as --prompts.  Empty: no evaluation."""
    eval_every: int = 50
    """Steps between evaluations.  Evaluations also run before the first step and after the last."""
    eval_limit: int = 256
    """Number of held-out prompts to use."""
    eval_temperature: float = 0.0
    """Sampling temperature of evaluations.  0: greedy."""
    save_every: int = 50
    """Steps between checkpoints.  The last step always saves."""
    save_minutes: float = 0.0
    """Minutes after which a step saves a checkpoint, too.  0: only --save-every counts."""
    time_limit: float = 0.0
    """Minutes after the start at which the run must have ended: it saves and ends with exit code 75 after the last step
    that leaves time for that.  0: no limit."""
    keep: int = 2
    """Number of newest checkpoints to keep.  Checkpoints before a step that was refused stay."""
    rollouts_every: int = 50
    """Steps between saved rollout batches (texts and per-token columns)."""
    trackers: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Also log to tensorboard, wandb, trackio, mlflow or another tracker that Accelerate supports.  Repeat the flag for
    several."""
    seed: int = 0
    """Seed of the data order, sampling and initialisation."""
    trust_remote_code: bool = False
    """Allow a hub model to run the Python code in its repository."""
    doctor: bool = True
    """Check models, prompts, memory and some rollouts before the first step.  `opd doctor` prints the full report."""
    quiet: bool = False
    """Print no progress."""

    def learning_rate(self, update: int, total: int) -> float:
        """Return the learning rate of optimizer step `update` (counted from 1) of `total`."""
        if update <= self.warmup:
            return self.lr * update / self.warmup
        done = (update - self.warmup - 1) / max(1, total - self.warmup)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)

    def teacher_temperature(self) -> float:
        """Return the value that divides the teacher's logits in the loss."""
        return self.teacher_loss_temperature or self.loss_temperature

    def tempered(self) -> bool:
        """Return whether temperature, top-p or top-k make the sampler differ from the loss's student distribution."""
        s = self.sampling
        return s.temperature != self.loss_temperature or s.top_p < 1 or s.top_k > 0

    def compares(self) -> bool:
        """Return whether sampler, student and teacher are compared at temperature 1, without truncation."""
        return not self.tempered() and self.loss_temperature == 1 == self.teacher_temperature()
