"""Short campaigns with another seed each day; `make soak` runs the long ones."""

import datetime
import importlib

import pytest

from tests.campaigns.__main__ import CAMPAIGNS

SEED = datetime.date.today().toordinal()


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_is_lost(name, tmp_path):
    print(f"seed {SEED}")  # shown if the test fails: python -m tests.campaigns NAME --seed SEED
    counts = importlib.import_module(f"tests.campaigns.{name}").run(tmp_path, CAMPAIGNS[name][1], SEED)
    assert counts.lost == 0, "\n".join(counts.details)
    assert counts.tried == counts.survived + counts.refused >= CAMPAIGNS[name][1]
