"""Presets are settings of a run: known fields, accepted by the checks, the numbers of their publications."""

import json
from dataclasses import fields, replace

import pytest

from opd.cli import main
from opd.cli.method_names import method_of
from opd.cli.train import TrainFlags, run_flags
from opd.config import checks
from opd.config.plan import resolved
from opd.config.presets import PAPER, SCAFFOLD, arguments, settings
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.methods import METHODS
from opd.methods.rubricem import TAGS
from opd.teachers.judges import stage_tags

BASE = Train(student="s", teacher="t", prompts="p")
FIELDS = {f.name for f in fields(Train)} - {"student", "prompts", "method"}


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
        ("topd", 512, 8, 1e-6, 16384),
        ("rethinking-opd", 64, 4, 1e-6, 7168),
        ("rock-freeze", 1, 4, 2e-6, 8000),
        ("oprd", 8, 2, 1e-5, 16384),
        ("g-opd", 1024, 1, 1e-5, 16384),
        ("opsd", 32, 1, 2e-4, 2048),
        ("sdpo", 32, 8, 1e-5, 8192),
    ],
)
def test_numbers_as_published(name, prompts, each, lr, tokens):
    run = replace(BASE, method=method_of(name, arguments("paper", name)), **settings("paper", name))
    assert resolved(run).method.rollouts.per_prompt == each and run.batch == prompts * each
    assert run.lr == (BASE.lr if lr is None else lr)
    assert run.sampling.max_new_tokens == (BASE.sampling.max_new_tokens if tokens is None else tokens)


VOPD = ("vopd", "vopd-topk", "opd", "opd-full")


@pytest.mark.parametrize("name", VOPD)
def test_vopd_as_released(name):
    """holi-lab/vOPD: one epoch of 14,116 problems in batches of 256; equal ids for both models; the EOS is trained."""
    run = replace(BASE, method=method_of(name, arguments("paper", name)), **settings("paper", name))
    assert run.steps == 14_116 // run.batch
    assert (run.teacher_prompt, run.stop_token, run.schedule, run.lora_rank) == ("same", "train", "cosine", 64)


@pytest.mark.parametrize(("typed", "k"), [([], 100), (["--k", "20"], 20)])
def test_flags_of_a_method_in_the_paper_preset_yield_to_the_users(typed, k):
    assert method_of("vopd-topk", [*arguments("paper", "vopd-topk"), *typed]) == METHODS["vopd-topk"](k)


def test_topd_as_published():
    method = method_of("topd", arguments("paper", "topd"))
    assert method == METHODS["topd"](0.1, future=True, whiten=True, clip=0.2)
    run = resolved(replace(BASE, method=method, **settings("paper", "topd")))
    assert run.config.batch // run.method.rollouts.updates == 32 * run.method.rollouts.per_prompt == 256


def test_scope_tempers_the_student_by_the_sampling_temperature():
    run = replace(BASE, method=METHODS["scope"](), **settings("paper", "scope"))
    assert run.sampling.temperature == run.loss_temperature == 0.6 and run.teacher_temperature() == 1
    assert not checks.warnings(resolved(run))  # the sampler is the distribution of the loss


def test_rock_freeze_warms_up_for_a_twentieth():
    chosen = settings("paper", "rock-freeze")
    assert chosen["warmup"] == 0.05 * chosen["steps"] == 500
    assert chosen["steps"] * chosen["batch"] == 4 * 10_000


def test_rubricem_tells_the_student_to_write_its_stages():
    """The system prompt names every tag of the method, opening and closing; by them a text has all stages."""
    tags = [tag for stage in TAGS for tag in stage.split("|")]
    assert all(f"{tag}...</{tag[1:]}" in SCAFFOLD for tag in tags)
    assert all(stage_tags.texts(SCAFFOLD, TAGS)) and not any(c.isdigit() for c in SCAFFOLD)
    words = ["--student", "s", "--teacher", "t", "--prompts", "p", "--preset", "paper"]
    read = lambda *more: run_flags([*words, *more, "rubricem"], TrainFlags, "opd train", "").run
    assert read().data.system == SCAFFOLD == settings("paper", "rubricem")["data"].system
    assert read().sampling.max_new_tokens == 18_432 and read("--system", "Be brief.").data.system == "Be brief."
