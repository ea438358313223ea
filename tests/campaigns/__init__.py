"""Campaigns that try to break the program.  Each module has `run(folder, count, seed)`, which returns its `Counts`."""

from dataclasses import dataclass, field


@dataclass
class Counts:
    """What became of the attempts of a campaign."""

    tried: int = 0
    survived: int = 0  # the program did what it was meant to do
    refused: int = 0  # it refused in the way it promises
    lost: int = 0  # anything else: a crash, a hang, a wrong result
    details: list[str] = field(default_factory=list)  # a line for each lost attempt
