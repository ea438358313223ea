#!/usr/bin/env bash
# Check opd on the GPUs of this machine in less than ten minutes, and print a table:
#
#     bash scripts/gpu_check.sh [--cpu] [--only CHECK ...]
#
# Exit codes: 0 all is well, 1 a check failed, 2 no GPU.  --cpu runs the same checks at a tiny size on the CPU.
# docs/scaling.md explains the rows.  PYTHON names the interpreter, by default that of .venv, else python.
set -euo pipefail
cd "$(dirname "$0")/.."
default=python
if [ -x .venv/bin/python ]; then default=.venv/bin/python; fi
exec "${PYTHON:-$default}" -m benchmarks gpu "$@"
