"""The Triton kernels: equal to float64 in Triton's interpreter, and compiled for GPUs, as far as goes without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels want triton, extra `gpu`")


def run(*args: str, **environment: str) -> str:
    """Of a process of its own: triton decides at import whether it interprets."""
    out = subprocess.run(
        [sys.executable, *args], cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def test_the_twins_in_the_interpreter():
    twins = str(HERE / "triton_twins.py")
    said = run("-m", "pytest", twins, "-p", "no:xdist", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert "[100%]" in said and "skipped" not in said


COMPILED = """
import re, sys
from triton.backends.compiler import GPUTarget as Target
from triton.compiler import ASTSource, compile
from opd.head.kernels import triton_sweep as fused

def ptx(kernel, arch, tile, teacher):
    kinds = {"student": tile, "teacher": tile if teacher else None, "student_outer": "fp32", "ids": "*i64"}
    kinds |= {"sums": "*fp32", "out": "*fp32" if kernel is fused._sums else "*bf16", "n": "i32", "width": "i32"}
    kinds |= {f"{side}_stride": "i32" for side in ("student", "teacher")} | {"out_stride": "i32"}
    lanes = fused.WARPS * 512 // (4 if tile == "*fp32" else 2)
    sizes = {"DEPTH": fused.DEPTH, "LANES": lanes, "TILE": fused.DEPTH * lanes}
    names = kernel.arg_names
    signature = {name: kinds.get(name) or "constexpr" for name in names}
    constants = {(i,): sizes.get(name) for i, name in enumerate(names) if signature[name] == "constexpr"}
    aligned = [i for i, name in enumerate(names) if signature[name][0] in "*i" and name != "n"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": fused.WARPS, "enable_fp_fusion": True}
    return compile(ASTSource(kernel, signature, constants, attributes), Target("cuda", arch, 32), options).asm["ptx"]

for arch in (80, 90):
    for tile in ("*fp32", "*bf16"):
        sums = ptx(fused._sums, arch, tile, True)
        assert sums.count("ld.global.v4.b32") >= 4 and "atom" not in sums
        for teacher in (False, True):
            text = ptx(fused._gradient, arch, tile, teacher)
            order = re.findall(r"ld\\.global\\.v|bar\\.sync|st\\.global\\.v", text)
            assert order == sorted(order, key=["ld.global.v", "bar.sync", "st.global.v"].index), order
            assert {"ld.global.v", "bar.sync", "st.global.v"} == set(order) and "cvt.rn.bf16" in text
print("compiled")
"""


def test_the_kernels_compile_for_gpus():
    """Rows are read 16 bytes at a time; between reading a tile and writing the gradient there is a barrier."""
    assert run("-c", COMPILED) == "compiled\n"
