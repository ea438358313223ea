"""Fixtures of all tests; shapes are enforced by the jaxtyping option in pyproject.toml."""

import os

# Some virtual machines advertise AMX and do not enable it: any bf16 matmul would end the tests with SIGILL.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a student and a wider teacher, random and of one vocabulary."""
    from tests.tiny_models import tiny  # here: whoever imports opd before the jaxtyping option acts has no checks

    root = tmp_path_factory.mktemp("pair")
    return tiny(root / "student", seed=1), tiny(root / "teacher", seed=2, width=48)


@pytest.fixture
def float64():
    """For the mathematics: new tensors are float64; one thread, as waking another costs more than a tiny tensor."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
