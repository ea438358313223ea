"""Figures of the report as files: `draw(groups, folder)` writes PNG and SVG with matplotlib."""

from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd.analysis.report.figures import CURVES, PICTURE_MARK, curve, phases, positions
from opd.core.disk import OutputFile
from opd.training.run_log import RunGroup

matplotlib.use("Agg")

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555b64", "#7a4fb5")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
COLUMNS = 3


def draw(groups: Sequence[RunGroup], files: Mapping[str, OutputFile]) -> None:
    """Write the curves, positions and phases to the files of these names, as .png and .svg."""
    for name, figure in (("curves", curves(groups)), ("positions", by_position(groups)), ("phases", bars(groups))):
        if figure is None:
            continue
        for kind, key in (("png", "Software"), ("svg", "Creator")):
            with files[f"{name}.{kind}"].open() as file:
                figure.savefig(file, format=kind, dpi=150, metadata={key: PICTURE_MARK})
        plt.close(figure)


def curves(groups: Sequence[RunGroup]) -> Figure:
    """Draw every logged number of the page's first section."""
    charts = [c for name in CURVES if (c := curve(groups, name))["lines"]]
    rows = -(-len(charts) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.2 * COLUMNS, 2.7 * rows), layout="constrained", squeeze=False)
    for axis, c in zip(axes.flat, charts, strict=False):
        for line in c["lines"]:
            i = line["group"]
            _line(axis, line, COLORS[i % 8], STYLES[i % 4], groups[i].name)
        axis.set(title=c["title"], ylabel=c["unit"], xlabel="step")
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    axes.flat[0].legend(frameon=False)
    return figure


def by_position(groups: Sequence[RunGroup]) -> Figure | None:
    """Draw reverse KL by position in the response, at the first and last saved step; None without saved rollouts."""
    group_rows = [rows for g in groups if (rows := positions(g))]
    if not group_rows:
        return None
    figure, axes = plt.subplots(
        1, len(group_rows), figsize=(4.6 * len(group_rows), 3), layout="constrained", squeeze=False
    )
    for i, (axis, rows) in enumerate(zip(axes.flat, group_rows, strict=True)):
        for k, row in enumerate(rows):
            last = k or len(rows) == 1
            _line(axis, row, COLORS[i % 8] if last else "#555b64", "-" if last else "--", f"step {row['step']}")
        axis.set(title=rows[0]["name"], xlabel="position, tokens", ylabel="reverse KL, nats", ylim=(0, None))
        axis.legend(frameon=False)
    return figure


def bars(groups: Sequence[RunGroup]) -> Figure:
    """Draw the seconds of a step by phase."""
    spent = [phases(g) for g in groups]
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.5 * len(groups)), layout="constrained")
    bar_starts = [0.0] * len(groups)
    for k, name in enumerate(dict.fromkeys(n for s in spent for n in s)):
        width = [s.get(name, 0.0) for s in spent]
        axis.barh([g.name for g in groups], width, left=bar_starts, color=COLORS[k % 8], label=name)
        bar_starts = [a + b for a, b in zip(bar_starts, width, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="seconds a step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _line(axis: Axes, line: dict, color: str, style: str, label: str) -> None:
    axis.plot(line["x"], line["mean"], style, color=color, label=label, marker="o" * (len(line["x"]) <= 12), ms=3)
    axis.fill_between(line["x"], line["low"], line["high"], color=color, alpha=0.15, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
