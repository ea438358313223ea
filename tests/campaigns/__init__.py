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

    def add(self, attempt: str, fault: str, *, refused: bool) -> None:
        """Count an attempt: as lost if it has a fault, otherwise as refused or survived."""
        self.tried += 1
        if fault:
            self.lost += 1
            self.details.append(f"{attempt}: {fault}"[:1000])
        elif refused:
            self.refused += 1
        else:
            self.survived += 1
