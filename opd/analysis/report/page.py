"""`opd report`: writes one HTML page about run folders that needs no network, `report(Report(...)) -> path`."""

import base64
import hashlib
import json
import math
import re
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

PLACE = re.compile(r"/\*(policy|style|data|program)\*/")  # in the templates; what fills one is not searched again
BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # Unicode's controls of the direction of text
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
VISIBLE |= {code: f"[U+{code:X}]" for code in BIDI}


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
    """Write a page of ours with its style, its program and its data inside.

    Its policy admits this style and this program and fetches nothing, so that a text which became markup would not run.
    """
    pages = files("opd.analysis.report") / "pages"
    style = (pages / "page.css").read_text() + (pages / f"{name}.css").read_text()
    program = (pages / "page.js").read_text() + (pages / f"{name}.js").read_text()
    parts = {
        "policy": f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(program)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        # The data may contain any text: escape "<" so that no tag in it can end the script element.
        "data": json.dumps(presentable(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "program": program,
    }
    template = (pages / f"{name}.html").read_text()
    file.write(PLACE.sub(lambda place: parts[place[1]], template))


def _digest(text: str) -> str:
    """Return the source expression by which a Content-Security-Policy admits an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def presentable(value: Any) -> Any:
    """Prepare a value for the JSON of a page.

    Floats are rounded to six digits; nan and infinity become null.  Characters that hide or reorder the text around
    them become visible.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return value.translate(VISIBLE)
    if isinstance(value, Mapping):
        return {presentable(str(k)): presentable(v) for k, v in value.items()}
    return [presentable(v) for v in value] if isinstance(value, Sequence) else value
