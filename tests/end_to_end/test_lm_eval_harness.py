"""A checkpoint is a plain transformers folder: lm-evaluation-harness reads it, where it is installed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import opd
from opd.core.sampling import Sampling
from opd.methods import METHODS
from tests.tiny_models import tiny

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-evaluation-harness: pip install 'lm_eval[hf]'"
)
instance = pytest.importorskip("lm_eval.api.instance")


@pytest.mark.parametrize("rank", [0, 2])
def test_the_harness_scores_a_checkpoint(rank, tmp_path):
    student, teacher = tiny(tmp_path / "student", seed=1), tiny(tmp_path / "teacher", seed=2)
    folder = opd.train(
        opd.Train(
            student=str(student),
            teacher=str(teacher),
            prompts="embedded:ledger-short",
            steps=1,
            batch=2,
            sampling=Sampling(max_new_tokens=8),
            lora_rank=rank,
            lr=1e-2,
            doctor=False,
            quiet=True,
            out=tmp_path / "run",
            method=METHODS["vopd"](),
        )
    )
    checkpoint = str(folder / "checkpoints/step-000001")
    names = {"pretrained": str(student), "peft": checkpoint} if rank else {"pretrained": checkpoint}
    harness = huggingface.HFLM(**names, device="cpu", dtype="float32", batch_size=1)
    context, answer = "Mia has 4 coins. Nov: wins 3.", " How many?"
    asked = [instance.Instance("loglikelihood", {}, (context, answer), 0)]
    ((found, _),) = harness.loglikelihood(asked, disable_tqdm=True)
    if rank:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    head, tail = harness._encode_pair(context, answer)
    with torch.no_grad():
        logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    own = sum(float(logp[len(head) + i - 1, token]) for i, token in enumerate(tail))
    assert found == pytest.approx(own, abs=1e-4)
