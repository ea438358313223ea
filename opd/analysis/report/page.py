"""`opd report`: writes one HTML page about run folders that needs no network, `report(Report(...)) -> path`."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from opd.analysis.report.figures import PICTURE_MARK, payload
from opd.config.commands import Inspect, Report
from opd.core.disk import OutputFile, has_mark
from opd.core.errors import Refusal
from opd.training.run_log import group_runs, read


def report(config: Report) -> Path:
    """Read the runs, write the page and return its path."""
    if not config.runs:
        raise Refusal("RUN is missing: name the --out folder of one `opd train` or more")
    repeated = {str(r) for r in config.runs if [x.resolve() for x in config.runs].count(r.resolve()) > 1}
    if repeated:
        raise Refusal(f"RUN {min(repeated)}: named twice; name each run folder once")
    file = page_file("report", config, config.runs)
    file.check()
    pictures = picture_files(config)
    for picture in pictures.values():
        picture.check()
    groups = group_runs([read(run) for run in config.runs])
    write(file, "report", payload(groups))
    if pictures:
        from opd.analysis.report.static import draw  # pyplot takes a second

        draw(groups, pictures)
    return config.out


def page_file(name: str, config: Report | Inspect, runs: tuple[Path, ...]) -> OutputFile:
    """Return the file of a page: it may replace a page of the same kind."""
    mark = f'<meta name="generator" content="opd {name}">'
    return OutputFile(path=config.out, ours=has_mark(mark), overwrite=config.overwrite, inputs=runs)


def picture_files(config: Report) -> dict[str, OutputFile]:
    """Return the files of --static by their names; none without that flag."""
    if config.static is None:
        return {}
    names = [f"{name}.{kind}" for name in ("curves", "positions", "phases") for kind in ("png", "svg")]
    picture = partial(
        OutputFile, flag="--static", ours=has_mark(PICTURE_MARK), overwrite=config.overwrite, inputs=config.runs
    )
    return {name: picture(path=config.static / name) for name in names}


def write(file: OutputFile, name: str, data: Mapping[str, object]) -> None:
    """Write a page of ours with its style, its program and its data inside."""
    pages = files("opd.analysis.report") / "pages"
    text = (pages / f"{name}.html").read_text()
    # The data may contain any text: escape "<" so that no tag in it can end the script element.
    parts = {
        "style": (pages / "page.css").read_text() + (pages / f"{name}.css").read_text(),
        "data": json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "program": (pages / "page.js").read_text() + (pages / f"{name}.js").read_text(),
    }
    for part, content in parts.items():
        head, mark, tail = text.partition(f"/*{part}*/")
        assert mark, f"{name}.html has no place for its {part}"
        text = head + content + tail
    file.write(text)


def finite(value: Any) -> Any:
    """Prepare a value for json: replace nan and infinity by null, and round other floats to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
