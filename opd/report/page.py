"""`opd report`: run folders as one HTML page that needs no network, `report(Report(...)) -> its path`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro

from opd.disk import disk
from opd.report.figures import payload
from opd.report.logs import grouped, read
from opd.types import Refusal


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is shown, and where."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders; those that differ by their seed alone are drawn as one line with a band."""
    out: Path = Path("report.html")
    """The page."""
    static: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also write the pictures there, as PNG and SVG."""


def report(config: Report) -> Path:
    """Read the runs, write the page; returns its path."""
    if not config.runs:
        raise Refusal("RUN is missing: name the --out folder of one `opd train` or more")
    twice = {str(r) for r in config.runs if [x.resolve() for x in config.runs].count(r.resolve()) > 1}
    if twice:
        raise Refusal(f"RUN {min(twice)}: named twice; name each run folder once")
    groups = grouped([read(run) for run in config.runs])
    write(config.out, "report", payload(groups))
    if config.static is not None:
        from opd.report.static import draw  # pyplot takes a second

        draw(groups, config.static)
    return config.out


def write(path: Path, name: str, data: Mapping[str, object]) -> None:
    """A page of ours with its style, its program and its data inside."""
    pages = files("opd.report") / "pages"
    text = (pages / f"{name}.html").read_text()
    # The data may hold any text: no tag of it may end the script element that carries it.
    parts = {
        "style": (pages / "page.css").read_text() + (pages / f"{name}.css").read_text(),
        "data": json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "program": (pages / "page.js").read_text() + (pages / f"{name}.js").read_text(),
    }
    for part, content in parts.items():
        before, mark, after = text.partition(f"/*{part}*/")
        assert mark, f"{name}.html has no place for its {part}"
        text = before + content + after
    with disk(f"--out {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def finite(value: Any) -> Any:
    """For json, which knows no nan and no infinity: they become null; other numbers keep six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
