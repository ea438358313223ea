#!/usr/bin/env bash
# Walk through the first hour of a new user, with models named as on the hub:
#
#     bash scripts/first_hour.sh [--short]
#
# It trains by hub id, evaluates, trains a LoRA adapter, continues from it, serves the result to another run, resumes a
# run of two processes after one of them was killed, and loads the checkpoints with plain transformers, with plain peft
# and through the file selection of vLLM. It needs no network: the embedded models lie in a hub cache under the names of
# Qwen models. --short takes a few steps where the long form trains until accuracy rises.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=20 batch=32 tokens=96 prompts=embedded:ledger
if [ "${1:-}" = --short ]; then steps=4 batch=8 tokens=48 prompts=embedded:ledger-short; fi

bin=${BIN:-$PWD/.venv/bin}
work=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi; rm -rf "$work"' EXIT
export HF_HOME=$work/huggingface HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
student=Qwen/Qwen3-0.6B teacher=Qwen/Qwen3-1.7B
run=(--prompts "$prompts" --preset embedded --steps "$steps" --batch "$batch" --max-new-tokens "$tokens" --save-every 2)

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
opd() { "$bin/opd" "$@"; }

say "a hub cache that holds $student and $teacher"
"$bin/python" scripts/fake_hub.py "$HF_HOME" $student=embedded:student $teacher=embedded:teacher

say "what is there"
opd --version
opd methods | head -3
opd doctor --student $student --teacher $teacher "${run[@]}" vopd

say "train by hub id, and evaluate"
opd train --student $student --teacher $teacher "${run[@]}" --out "$work/full" vopd
opd eval --model "$work/full" --against $student --prompts "$prompts" --limit 64 --max-new-tokens "$tokens" \
    --out "$work/problems.jsonl"

say "a LoRA adapter, and a run that continues from it"
opd train --student $student --teacher $teacher "${run[@]}" --lora-rank 8 --lr 3e-3 --out "$work/lora" vopd
opd eval --model "$work/lora" --prompts "$prompts" --limit 16 --max-new-tokens "$tokens"
opd train --student "$work/lora" --teacher $teacher "${run[@]}" --out "$work/continued" vopd-topk --k 8

say "the trained model as a teacher behind a server"
"$bin/opd" serve "$work/lora" --port 0 >"$work/serve.log" 2>&1 &
server=$!
for _ in $(seq 300); do
    url=$(grep -o -m 1 'http://[0-9.:]*' "$work/serve.log" || true)
    if [ -n "$url" ]; then break; fi
    kill -0 $server || { cat "$work/serve.log"; exit 1; }
    sleep 0.2
done
opd train --student $student --teacher "$url" "${run[@]}" --steps 2 --out "$work/served" vopd
kill $server && wait $server || true
server=

say "two processes, one of which is killed, and --resume"
two() {
    "$bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 -m opd train --student $student \
        --teacher $teacher "${run[@]}" --steps 12 --quiet "$@" vopd
}
two --out "$work/whole"
two --out "$work/cut" >"$work/cut.log" 2>&1 &
launcher=$!
until [ -d "$work/cut/checkpoints/step-000002" ]; do
    kill -0 $launcher || { cat "$work/cut.log"; exit 1; }
    sleep 0.05
done
pkill -KILL -n -f -- "opd train .* --out $work/cut" || true
if wait $launcher; then echo "the run ended before one of its processes was killed"; exit 1; fi
two --out "$work/cut" --resume
cmp "$work/whole/metrics.jsonl" "$work/cut/metrics.jsonl"
echo "the resumed run wrote the bytes of the uninterrupted one"

say "the checkpoints in other programs"
"$bin/python" scripts/load_checkpoint.py "$work"/full/checkpoints/step-* "$work"/lora/checkpoints/step-*
say "done"
