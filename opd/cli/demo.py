"""A demonstration on the embedded models: distillation, evaluation, a curve, and a supervised control.

The control trains the same student for as many steps, on as many sequences, by cross-entropy on the gold answers.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from opd.analysis.evaluate import evaluate
from opd.config.commands import Demo
from opd.config.data import Data
from opd.config.evaluate import Evaluate
from opd.config.presets import settings
from opd.config.train import Train
from opd.core.disk import AGAIN, OutputFolder, disk
from opd.core.errors import Refusal
from opd.core.intervals import Estimate, interval
from opd.core.sampling import Sampling
from opd.core.types import pad
from opd.data import prompts
from opd.data.tasks.load import load
from opd.methods import METHODS
from opd.models import load as models
from opd.models.source import locate
from opd.training.train import train

matplotlib.use("Agg")

PROMPTS = "embedded:ledger"
HELD_OUT = 128  # problems of the evaluations within a run


def demo(config: Demo) -> Path:
    """Train, evaluate and compare; return the path of the picture."""
    if config.method not in METHODS:
        raise Refusal(f"--method {config.method}: unknown; there are {', '.join(METHODS)}")
    config.check()
    OutputFolder(path=config.out).check()
    console, rows = Console(), Table("", "held-out accuracy", "95 % interval", box=None, pad_edge=False)

    def row(name: str, e: Estimate) -> None:
        rows.add_row(name, f"{e.value:.1%}", f"{e.low:.1%} to {e.high:.1%}")

    console.print(f"{config.student} learns from embedded:teacher by {config.method}, on its own answers, no labels.")
    row("student before", accuracy(config.student, config.problems))
    start, runs = time.monotonic(), []
    for seed in range(config.seeds):
        runs.append(train(settings_of(config, seed)))
        row(f"student after {config.method}, seed {seed}", accuracy(str(runs[-1]), config.problems))
    spent = (time.monotonic() - start) / config.seeds
    console.print(f"trained and evaluated in {spent:.0f} s a run; now the control, on gold answers ...")
    control = supervised(settings_of(config, 0), config.out / "control")
    row("control: same steps of supervised training on gold answers", accuracy(str(control), config.problems))
    row("teacher", accuracy("embedded:teacher", config.problems))
    console.print(rows)
    picture = config.out / "curve.png"
    with disk(f"--out {picture}", AGAIN):
        draw(runs, picture, config.method)
    console.print(
        f"Accuracy of greedy answers to {config.problems} problems that no one trained on; along the way it was of "
        f"{HELD_OUT}. The student saw no gold answer, the control nothing else: where there are gold answers, "
        "supervised training is the bar.",
        highlight=False,
    )
    console.print(f"curve: {picture}   run folder: {runs[0]}", highlight=False)
    console.print(f"next: `opd report {runs[0]}` draws the run, `opd inspect {runs[0]}` its rollouts", highlight=False)
    return picture


def settings_of(config: Demo, seed: int) -> Train:
    """Return the settings of the run with this seed."""
    run = Train(
        student=config.student,
        teacher="embedded:teacher",
        prompts=PROMPTS,
        eval_prompts=PROMPTS,
        method=METHODS[config.method](),
        out=config.out / f"seed-{seed}",
        seed=seed,
        eval_every=15,
        eval_limit=HELD_OUT,
    )
    return replace(run, **{**settings("embedded", config.method), "steps": config.steps})


def accuracy(model: str, problems: int) -> Estimate:
    """Return the accuracy of greedy answers to held-out problems."""
    data = Data(split="test", limit=problems)
    sampling = Sampling(temperature=0.0, max_new_tokens=256)
    scores = evaluate(Evaluate(model=model, prompts=PROMPTS, data=data, sampling=sampling, decode_rows=128))
    return interval([row[0] for row in scores.outcomes])


def supervised(config: Train, folder: Path) -> Path:
    """Train on gold answers by cross-entropy, with the optimizer, batch size and steps of the run, in plain torch."""
    source = locate(config.student, field="student")
    tokenizer = models.tokenizer(source, field="student")
    model = models.load(source, field="student", dtype=torch.float32, device=torch.device("cpu"))
    task = load(Data(source=config.prompts, seed=config.seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    for step in range(1, config.steps + 1):
        rows = [task.prompts[i] for i in range((step - 1) * config.batch, step * config.batch)]
        prompt_ids = [prompts.render(tokenizer, p, chat_template_kwargs={}) for p in rows]
        encoded = tokenizer([p.response for p in rows], add_special_tokens=False)
        answer_ids = [[*answer, tokenizer.eos_token_id] for answer in encoded["input_ids"]]
        ids = [torch.tensor([*a, *g]) for a, g in zip(prompt_ids, answer_ids, strict=True)]
        labels = [torch.tensor([-100] * len(a) + g) for a, g in zip(prompt_ids, answer_ids, strict=True)]
        present = [torch.ones_like(row) for row in ids]
        loss = model(pad(ids, 0), attention_mask=pad(present, 0), labels=pad(labels, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step, config.steps)
        optimizer.step()
    with disk(f"--out {folder}", AGAIN):
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
    return folder


def draw(runs: list[Path], picture: Path, method: str) -> None:
    """Draw held-out accuracy and reverse KL over the steps, with a line per seed."""
    figure, (top, kl_axis) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for seed, run in enumerate(runs):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluations = [r for r in rows if "eval_accuracy" in r]
        steps = [r["step"] for r in evaluations]
        accuracies, low, high = ([100 * r[f"eval_{k}"] for r in evaluations] for k in ("accuracy", "low", "high"))
        (line,) = top.plot(steps, accuracies, marker="o", ms=3, label=f"seed {seed}")
        top.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        trained = [r for r in rows if "reverse_kl" in r]
        kl_axis.plot([r["step"] for r in trained], [r["reverse_kl"] for r in trained], color=line.get_color(), lw=1)
    top.set(xlabel="step", ylabel="held-out accuracy, %", ylim=(0, 100), title=f"{method}: accuracy, 95 % band")
    kl_axis.set(xlabel="step", ylabel="nats per token", ylim=(0, None), title="reverse KL to the teacher")
    for axis in (top, kl_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    top.legend(frameon=False, loc="lower right")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
