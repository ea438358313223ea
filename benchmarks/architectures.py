"""A sweep over the architectures of transformers: two steps of training of a small random model of each type.

The log-probs that the run saved are compared with a plain forward of transformers: a row by itself, without padding and
without a cache.
"""

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.tiny_models import TYPES, WITH_IMAGES, auto_class, save_tiny
from opd.cli.parse import suggestion
from opd.config.data import Data
from opd.config.train import Train
from opd.core.disk import OutputFile, has_mark
from opd.core.errors import Refusal, at_least, one_line, positive
from opd.core.sampling import Sampling
from opd.models.source import EMBEDDED
from opd.training.run_files import ROLLOUT, read_rows
from opd.training.train import train

LIMIT = 1e-3  # nats between a saved log-prob and the plain forward; rounding of fp32 is below 1e-4
FLAT = 0.1  # least standard deviation of the logits, below which every implementation would agree
MARK = "python -m benchmarks architectures"
PAGE = f"""<!-- {MARK} -->
# Architectures

Every causal language model of transformers {{version}} that can be built small, and multimodal models that are trained
on text. The table is written by this command, in about {{minutes}} minutes on two CPU cores:

```sh
python -m benchmarks architectures --jobs 2 --table docs/architectures.md
```

Student and teacher are two random models of one small configuration: the default one of the type, with a vocabulary of
145 tokens, a width of 32 and as few layers as have every kind of layer. `opd train` trains two steps of `vopd`. Rows of
different lengths leave the decoding batch and others take their places. The difference is the largest one, in nats,
between a log-prob that the run saved (of the sampler, the student and the teacher) and a plain forward of transformers
in fp32: one row at a time, without padding and without a KV cache.

A type is `OK` if both steps end, `refused` if opd answers with a message and exit code 2, and `CRASH` otherwise. Types
`not built` give no small model that predicts text from token ids only, for the reason in the table.
`TYPE{WITH_IMAGES}` is the multimodal class of a type that also has a class for text.

{{summary}}

"""


@dataclass(frozen=True)
class Architectures:
    """Settings of `python -m benchmarks architectures`."""

    only: str = ""
    """Types, separated by commas, as in `model_type` of config.json.  Empty (default): all."""
    jobs: int = 1
    """Types examined at the same time, each in a process."""
    timeout: float = 120
    """Seconds after which a type counts as a crash."""
    table: Path | None = None
    """Markdown page to write, such as docs/architectures.md."""
    overwrite: bool = False
    """Replace a page that another command wrote."""

    def types(self) -> tuple[str, ...]:
        """Return the types to examine.  Raises Refusal for an unknown type."""
        at_least(self, jobs=1)
        positive(self, "timeout")
        names = tuple(filter(None, self.only.split(","))) or TYPES
        for name in names:
            if name not in TYPES:
                raise Refusal(f"--only {name}: no type of transformers' language models{suggestion(name, TYPES)}")
        return names


@dataclass(frozen=True)
class Examination:
    """The outcome of one type."""

    model_type: str
    model_class: str
    outcome: Literal["OK", "refused", "CRASH", "not built"]
    reason: str = ""
    difference: float | None = None  # nats

    def fails(self) -> bool:
        """Return whether the type crashes, or trains on log-probs that are not those of the model."""
        return self.outcome == "CRASH" or (self.difference is not None and not self.difference <= LIMIT)

    def verdict(self) -> str:
        """Return the outcome with its reason."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome

    def cells(self) -> tuple[str, str, str, str]:
        """Return the row of a table."""
        number = "" if self.difference is None else f"{self.difference:.1e}"
        return self.model_type, self.model_class, self.verdict(), number


def sweep(settings: Architectures) -> int:
    """Examine the types, print a row for each and a summary.  Returns 1 if a type fails, else 0."""
    types, page = settings.types(), None
    if settings.table is not None:
        page = OutputFile(path=settings.table, ours=has_mark(MARK), flag="--table", overwrite=settings.overwrite)
        page.check()
    start, findings = time.monotonic(), []
    for finding in examined(types, jobs=settings.jobs, timeout=settings.timeout):
        findings.append(finding)
        model_type, model_class, verdict, number = finding.cells()
        print(f"{model_type:24} {model_class:40} {number:8} {verdict}", flush=True)
    print(summary(findings))
    if page is not None:
        page.write(markdown(sorted(findings, key=lambda f: types.index(f.model_type)), time.monotonic() - start))
    return int(any(finding.fails() for finding in findings))


def summary(findings: Sequence[Examination]) -> str:
    """Return the number of types with each outcome, as a sentence."""
    count = lambda outcome: sum(f.outcome == outcome for f in findings)
    above = sum(f.fails() and f.outcome == "OK" for f in findings)
    return (
        f"{len(findings)} types: {count('OK')} OK ({above} of them above {LIMIT:g} nats), {count('refused')} refused, "
        f"{count('CRASH')} crashed, {count('not built')} not built."
    )


def markdown(findings: Sequence[Examination], seconds: float) -> str:
    """Return the page with the table."""
    from transformers import __version__ as version

    rows = [("type", "class", "verdict", "difference, nats"), ("---", "---", "---", "---:")]
    rows += [finding.cells() for finding in findings]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    page = PAGE.format(version=version, minutes=max(1, round(seconds / 60)), summary=summary(findings))
    return page + table + "\n"


def examined(types: Sequence[str], *, jobs: int, timeout: float) -> Iterator[Examination]:
    """Yield the finding of each type as its process ends.

    The processes are forked after the imports, which take longer than the training.
    """
    AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher")  # fills the caches of transformers
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # threads do not survive a fork
    waiting, running = list(types), dict[ForkProcess, tuple[str, Path, float]]()
    with tempfile.TemporaryDirectory(prefix="opd-architectures-") as root:
        while waiting or running:
            while waiting and len(running) < jobs:
                model_type = waiting.pop(0)
                folder = Path(root) / model_type.replace("/", "-")
                folder.mkdir()
                process = multiprocessing.get_context("fork").Process(target=_examine_into, args=(model_type, folder))
                process.start()
                running[process] = model_type, folder, time.monotonic() + timeout
            next_end = min(deadline for _, _, deadline in running.values())
            wait([process.sentinel for process in running], max(0, next_end - time.monotonic()))
            for process, (model_type, folder, deadline) in list(running.items()):
                late = process.is_alive() and time.monotonic() > deadline
                if late:
                    process.kill()
                if late or not process.is_alive():
                    process.join()
                    del running[process]
                    reason = f"did not end in {timeout:g} s" if late else f"exit code {process.exitcode}"
                    yield _finding_in(folder, Examination(model_type, "", "CRASH", reason))


def _finding_in(folder: Path, otherwise: Examination) -> Examination:
    """Return the finding that a process wrote into its folder, or another if it died before."""
    file = folder / "finding.json"
    return Examination(**json.loads(file.read_text())) if file.is_file() else otherwise


def _examine_into(model_type: str, folder: Path) -> None:
    """Write the finding of a type into a folder, and all output into its log."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    text = json.dumps(asdict(examine(model_type, folder)))
    part = folder / "finding.part"
    part.write_text(text)
    part.rename(folder / "finding.json")


def examine(model_type: str, folder: Path) -> Examination:
    """Build two models of a type, train two steps, and compare the log-probs of the run with a plain forward."""
    paths = {name: folder / name for name in ("student", "teacher")}
    name = ""
    try:
        for seed, path in enumerate(paths.values()):
            name = type(save_tiny(model_type, path, seed=seed)).__name__
        load = auto_class(model_type).from_pretrained
        models = {key: load(path, dtype=torch.float32).eval() for key, path in paths.items()}
        for model in models.values():
            _check_logits(model)
    except Exception as error:  # whatever transformers raises for a configuration that it cannot build
        return Examination(model_type, name, "not built", _last_line(error))
    run = folder / "run"
    try:
        train(two_steps(paths, run))
        tokenizer = AutoTokenizer.from_pretrained(paths["student"])
        differences = largest_differences(run, models, tokenizer)
        above = ", ".join(column for column, difference in differences.items() if difference > LIMIT)
        return Examination(model_type, name, "OK", above and f"but wrong {above}", max(differences.values()))
    except Refusal as error:
        return Examination(model_type, name, "refused", one_line(str(error).replace(f"{folder}/", "")))
    except Exception as error:  # the crashes that the sweep looks for
        traceback.print_exc()
        return Examination(model_type, name, "CRASH", _last_line(error))


def two_steps(paths: Mapping[str, Path], out: Path) -> Train:
    """Return the settings of the run.  Not all rows are decoded at once, so that places are filled again."""
    return Train(
        student=str(paths["student"]),
        teacher=str(paths["teacher"]),
        prompts="embedded:ledger-short",
        data=Data(limit=16),
        sampling=Sampling(max_new_tokens=24),
        steps=2,
        batch=8,
        decode_rows=4,
        rollouts_every=1,
        doctor=False,
        quiet=True,
        out=out,
    )


def _last_line(error: BaseException) -> str:
    """Return the last line of an error's traceback; of a rejected configuration the reason."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return one_line("".join(traceback.format_exception_only(error)))


def _check_logits(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that is unusable for a comparison: without finite logits, or with flat ones."""
    logits = plain_logits(model, range(10, 50))
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")
    if (spread := float(logits.std(-1).mean())) < FLAT:
        raise ValueError(f"its logits are flat: their standard deviation is {spread:.2g}")


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the logits of a row by itself: no padding, no cache."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def largest_differences(
    run: Path, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return the largest difference in nats of each column of log-probs of a run from plain forwards.

    Those of student and sampler are compared at the first step, before any update; the teacher's at both steps.
    """
    out: dict[str, float] = {}
    for step, owners in ((1, {"student_logp": "student", "sampler_logp": "student"}), (2, {})):
        path = run / "rollouts" / f"step-{step:06d}"
        columns = load_file(path.with_suffix(".safetensors"))
        owners |= {"teacher_logp": "teacher"}
        for i, row in enumerate(read_rows(path.with_suffix(".jsonl"), ROLLOUT, (object,), growing=False)):
            text = str(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False))
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            ids, trained = (columns[name][i, : row["tokens"]] for name in ("ids", "mask"))
            logps = {name: _logps(models[name], prompt, ids) for name in set(owners.values())}
            for column, owner in owners.items():
                gap = (columns[column][i, : row["tokens"]] - logps[owner])[trained].abs()
                out[column] = max(out.get(column, 0.0), float(gap.nan_to_num(float("inf")).max()))
    return out


def _logps(model: PreTrainedModel, prompt: Sequence[int], ids: Tensor) -> Tensor:
    """Return the log-prob of each token of a response."""
    logits = plain_logits(model, [*prompt, *ids.tolist()])
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
