"""Opening models: what a terminal says meanwhile, and a head without a finite logit."""

import math

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

import opd
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.models.source import EMBEDDED
from opd.training import progress
from tests.tiny_models import tiny

TEXT = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")


def masked(folder, rows: int, **bias: float):
    """A small model whose head has a bias; `bias` by token id, as t17=-inf."""
    torch.manual_seed(3)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.2,
            pad_token_id=TEXT.pad_token_id,
            bos_token_id=TEXT.bos_token_id,
            eos_token_id=TEXT.eos_token_id,
        )
    )
    for name, value in bias.items():
        model.lm_head.bias.data[int(name[1:])] = value
    model.save_pretrained(folder)
    TEXT.save_pretrained(folder)
    return str(folder)


def run(student, teacher, out, method="vopd"):
    return opd.Train(
        student=str(student),
        teacher=str(teacher),
        prompts="embedded:ledger-short",
        method=METHODS[method](),
        out=out,
        steps=1,
        batch=2,
        sampling=Sampling(max_new_tokens=8),
        quiet=True,
    )


@pytest.mark.parametrize(
    ("value", "others", "says"),
    [
        (-math.inf, {}, r"the logit of token 17 \('Aug: '\) is -inf: KLs"),
        (math.nan, {}, r"the logit of token 17 \('Aug: '\) is nan"),
        (
            -math.inf,
            {"t140": -math.inf, "t20": -math.inf},
            r"the logit of token 17 \('Aug: '\) is -inf, and so are 2 more: KLs",
        ),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_common_token_without_a_finite_logit_is_refused(tmp_path, role, value, others, says):
    bad = masked(tmp_path / "bad", len(TEXT), t17=value, **others)
    good = tiny(tmp_path / "good", seed=1)
    pair = (good, bad) if role == "teacher" else (bad, good)
    with pytest.raises(Refusal, match=f"--{role}: {says}") as caught:
        opd.train(run(*pair, tmp_path / "run"))
    assert "\n" not in str(caught.value) and "-1e4" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["vopd", "opd-full", "gkd"])
@pytest.mark.parametrize(("rows", "bias"), [(8, {"t150": -math.inf}), (0, {"t17": -1e4})])
def test_padded_rows_may_be_masked_and_finite_masks_train(tmp_path, method, rows, bias):
    teacher = masked(tmp_path / "teacher", len(TEXT) + rows, **bias)
    folder = opd.train(run(tiny(tmp_path / "good", seed=1), teacher, tmp_path / "run", method))
    (row,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert '"refused": 0.0' in row and "NaN" not in row and "Infinity" not in row


def test_a_terminal_says_what_is_loading(monkeypatch, capsys):
    def terminal(**options):
        return Console(force_terminal=True, width=80, **options)

    monkeypatch.setattr(progress, "Console", terminal)
    with progress.loading("some/student", "[red]teacher", quiet=False):
        pass
    assert "loading some/student, [red]teacher" in capsys.readouterr().err
    with progress.loading("some/student", quiet=True):
        pass
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with progress.loading("some/student", quiet=False):
        pass
    assert "loading" not in capsys.readouterr().err


def test_a_log_file_says_nothing(capsys):
    with progress.loading("some/student", quiet=False):
        pass
    assert capsys.readouterr() == ("", "")
