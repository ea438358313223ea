"""Presets are settings of a run: known fields, accepted by the checks, the numbers of their publications."""

import json
from dataclasses import fields, replace

import pytest

from opd.cli import main
from opd.cli.method_names import method_of
from opd.config import checks
from opd.config.plan import resolved
from opd.config.presets import PAPER, arguments, settings
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.methods import METHODS

BASE = Train(student="s", teacher="t", prompts="p")
FIELDS = {f.name for f in fields(Train)} - {"student", "teacher", "prompts", "method"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", ["paper", "embedded"])
def test_preset_is_a_run(preset, name):
    if preset == "paper" and name not in PAPER:
        with pytest.raises(Refusal, match="has no settings for"):
            settings(preset, name)
        return
    chosen = settings(preset, name)
    assert chosen and chosen.keys() <= FIELDS
    checks.check(resolved(replace(BASE, method=method_of(name, arguments(preset, name)), **chosen)))


def test_a_run_says_what_its_user_set(tmp_path, capsys):
    typed = "--preset embedded --steps 1 --batch=2 --lr 0.001 --max-new-tokens 4 --no-doctor --quiet"
    pair = "--student embedded:student --teacher embedded:teacher --prompts embedded:ledger-short"
    assert main(["train", *pair.split(), *typed.split(), "--out", str(tmp_path / "run"), "opd-topk", "--k", "4"]) == 0
    said = json.loads((tmp_path / "run/environment.json").read_text())
    assert said["preset"] == "embedded" and "torch" in said
    flags = [x.partition("=")[0] for x in f"{pair} {typed} --out --k".split() if x.startswith("--")]
    assert said["set"] == sorted(flags)


def test_every_paper_preset_is_of_a_method():
    assert PAPER.keys() <= METHODS.keys()


@pytest.mark.parametrize(
    ("name", "prompts", "each", "lr", "tokens"),
    [  # prompts of a step, rollouts of each, learning rate, longest response: as the publications write them
        ("fire", 1024, 1, 1e-6, 16384),
        ("iw-opd", 1024, 1, 1e-5, 16384),
        ("scope", 256, 8, 5e-5, 12288),
        ("opd-tv", 64, 1, 1e-6, 16384),
        ("entropy", 128, 4, 5e-6, 8096),
        ("topd", 512, 8, 1e-6, None),
        ("opd-topk", 64, 4, None, 7168),
        ("rock-freeze", 1, 4, 2e-6, 8000),
        ("oprd", 8, 2, 1e-5, 16384),
        ("g-opd", 1024, 1, 1e-5, 16384),
        ("opsd", 32, 1, 2e-4, 2048),
        ("sdpo", 32, 8, 1e-5, 8192),
    ],
)
def test_numbers_as_published(name, prompts, each, lr, tokens):
    run = replace(BASE, method=METHODS[name](), **settings("paper", name))
    assert resolved(run).method.rollouts.per_prompt == each and run.batch == prompts * each
    assert run.lr == (BASE.lr if lr is None else lr)
    assert run.sampling.max_new_tokens == (BASE.sampling.max_new_tokens if tokens is None else tokens)


def test_rock_freeze_warms_up_for_a_twentieth():
    chosen = settings("paper", "rock-freeze")
    assert chosen["warmup"] == 0.05 * chosen["steps"] == 500
    assert chosen["steps"] * chosen["batch"] == 4 * 10_000
