"""The settings of an evaluation: `Evaluate`."""

from dataclasses import dataclass, field
from typing import Literal

from opd.config.data import Data
from opd.config.precision import Precision, default_device, default_precision
from opd.core.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Settings of an evaluation; each field is a flag of `opd eval`."""

    model: str
    """Hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder (its last checkpoint), LoRA
    adapter, or embedded:NAME."""
    prompts: str
    """Problems: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    set: str = ""
    """Benchmark whose file --prompts is: gsm8k, math-500, aime24, aime25, amc23, minerva, olympiad, gpqa, sciknoweval
    or sciknoweval-filling.  It sets the columns, instruction and verifier; explicit flags override it."""
    against: str = ""
    """Another model to compare with.  It answers the same problems with the same sampling noise, and the report gives
    the difference, paired by problem."""
    data: Data = Data(split="test")
    samples: int = 0
    """Responses per prompt (the k of avg@k, pass@k and maj@k).  0: the number that --set defines if --temperature is
    above 0, else 1."""
    sampling: Sampling = Sampling(temperature=0.0)
    precision: Precision = field(default_factory=default_precision)
    """dtype of the weights: fp32 or bf16."""
    device: str = field(default_factory=default_device)
    """Device of the model: cpu, cuda, cuda:1, ..."""
    interval: Literal["wilson", "bootstrap"] = "wilson"
    """Method of the 95 % confidence intervals over prompts: wilson, which is also valid near 0 and 1, or bootstrap
    (percentile)."""
    decode_rows: int = 64
    """Responses to generate at the same time.  Lower it when memory runs out."""
    out: str = ""
    """A .jsonl file for what became of each problem: answers, outcomes, lengths, responses."""
    overwrite: bool = False
    """Replace a file that another command, or you, wrote; what is read is never replaced."""
    seed: int = 0
    """Seed of the sampling, of the rows that --limit selects, and of the order of multiple-choice options."""
    trust_remote_code: bool = False
    """Allow a hub model to run the Python code in its repository."""
