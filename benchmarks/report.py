"""The results as one page of HTML that needs nothing beside it: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from resnet_fused.kernels.gpus import GPU, gpu_of

from .compare import NOT_MEASURED
from .count import KINDS
from .measure import BACKWARD, FORWARD, PHASES
from .peers import BASELINE, OURS

Record = Mapping[str, Any]
Records = Sequence[Record]
Columns = Mapping[str, str | Callable[[Record], object]]
"""What a table shows, by its head: a column of the rows, or a function of a row."""

OWN = OURS[0].name
UNDECIDED = "within the spread"
# The palette of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = {"convolution": "#0072B2", "batch norm": "#E69F00", "ReLU and addition": "#009E73", "other": "#999999"}
EAGER_COLOUR, OWN_COLOUR, SPREAD_COLOUR = "#D55E00", "#0072B2", "#333333"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
p.lead { color: #555; margin-top: .2rem }
p.note { background: #fff6e0; border-left: 4px solid #E69F00; padding: .6rem 1rem }
figure { margin: 1rem 0; overflow-x: auto } figcaption { color: #555; font-size: .9rem; max-width: 52rem }
svg { max-width: 100%; height: auto } div.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #888 } td.number { text-align: right }
th.group { padding-top: .8rem; border-bottom: none } td.none { color: #999 }
"""


def page(results: Mapping[str, Any]) -> str:
    """The page for what ``results.json`` holds."""
    rows, machine = results["rows"], results["machine"]
    networks = [row for row in rows if row["level"] == "network"]
    layers = [row for row in rows if row["level"] == "layer"]
    on_gpu = machine["GPU"] != "none"
    where = machine["GPU"] if on_gpu else machine["processor"]
    parts = [
        "<h1>resnet_fused: benchmark</h1>",
        f'<p class="lead">{_text(where)}; {_text(results["method"]["date"])}</p>',
    ]
    if not on_gpu:
        parts.append(
            '<p class="note">This machine has no CUDA GPU. Times are those of its processor; every time of a GPU is '
            f"{NOT_MEASURED}. Launches and bytes are counted from shapes, as planned for a GPU.</p>"
        )
    parts += ["<h2>Speed-up</h2>", *speedups(networks), "<h2>Times of the models</h2>", _times(networks)]
    if on_gpu:
        gpu = gpu_of(results["planned_for"]["arch"], results["planned_for"]["name"])
        parts += ["<h2>Roofline of the layers</h2>", *rooflines(layers, gpu)]
    parts += ["<h2>Bytes</h2>", *traffic(networks), _counts(networks, on_gpu), "<h2>Memory</h2>", *memory(networks)]
    parts += ["<h2>Times of the layers</h2>", _times(layers)]
    parts += ["<h2>Counts of the layers</h2>", _counts(layers, on_gpu)]
    parts += ["<h2>Machine</h2>", _facts(machine), "<h2>Method</h2>", _facts(results["method"])]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>resnet_fused: benchmark</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def speedups(rows: Records) -> Iterable[str]:
    """Per phase a plot of how much longer each peer takes than this library; one panel per setting."""
    for phase in PHASES:
        measured = [row for row in rows if row["phase"] == phase and row["over_ours"] is not None]
        if not measured:
            if any(row["phase"] == phase for row in rows):
                yield f"<p>{_text(phase.capitalize())}: {NOT_MEASURED}, for this library did not run here.</p>"
            continue
        by_setting = groupby(measured, key=_setting)
        panels = [(title, sorted(group, key=lambda row: row["over_ours"])) for title, group in by_setting]
        figure, axes = _panels(len(panels), 0.9 + 0.3 * max(len(group) for _, group in panels))
        for ax, (title, group) in zip(axes, panels, strict=True):
            _speedup(ax, title, group)
        yield _figure(
            figure,
            f"{phase.capitalize()}: time of each peer over that of this library's fastest, in the same round; median "
            f"with quartiles. Right of the line, this library is faster; {UNDECIDED}: the quartiles lie on both sides.",
        )


def _speedup(ax: Axes, title: str, rows: Records) -> None:
    ratio = [row["over_ours"] for row in rows]
    below = [row["over_ours"] - row["over_ours_q1"] for row in rows]
    above = [row["over_ours_q3"] - row["over_ours"] for row in rows]
    known = dict.fromkeys((peer.name for peer in OURS), OWN_COLOUR) | {BASELINE.name: EAGER_COLOUR}
    colours = [known.get(row["peer"], "#56B4E9") for row in rows]
    ax.barh([row["peer"] for row in rows], ratio, color=colours, height=0.62)
    ax.errorbar(ratio, range(len(rows)), xerr=[below, above], fmt="none", ecolor=SPREAD_COLOUR, capsize=3, lw=1)
    for i, row in enumerate(rows):
        verdict = _verdict(row)
        text = verdict if isinstance(verdict, str) else f"{verdict:.2f}"
        ax.text(row["over_ours_q3"] + 0.03, i, text, va="center", fontsize=8)
    ax.axvline(1, color="black", lw=1)
    ax.set_xlim(0, 1.15 * max(1, *(row["over_ours_q3"] for row in rows)))
    ax.set_title(title.rpartition(", ")[0], fontsize=10)  # without the phase, which the caption names
    ax.set_xlabel("time / time of resnet_fused")


def _verdict(row: Record) -> float | str | None:
    """How much longer a peer takes than this library's fastest, in words where the rounds do not agree."""
    ratio, low, high = row["over_ours"], row["over_ours_q1"], row["over_ours_q3"]
    return UNDECIDED if ratio is not None and low < high and low <= 1 <= high else ratio


def rooflines(rows: Records, gpu: GPU) -> Iterable[str]:
    """Per phase and dtype, every layer at the largest batch under the roof of the GPU."""
    for phase in (FORWARD, BACKWARD):
        at = [row for row in rows if row["phase"] == phase and row["counted_mb"] is not None]
        for dtype in dict.fromkeys(row["dtype"] for row in at):
            group = [row for row in at if row["dtype"] == dtype]
            largest = max(row["batch"] for row in group)
            yield _roofline([row for row in group if row["batch"] == largest], gpu)


def _roofline(rows: Records, gpu: GPU) -> str:
    number_format, layers = rows[0]["planned_format"], list(dict.fromkeys(row["case"] for row in rows))
    title = f"{rows[0]['phase']}, batch {rows[0]['batch']}, {number_format}"
    rows = [row for row in rows if row["median_ms"] is not None]
    if not rows:
        return f"<p>{_text(title.capitalize())}: {NOT_MEASURED}.</p>"
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    ax = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP per byte (counted)", ylabel="TFLOP/s", title=title)
    for name, colour, marker in ((BASELINE.name, EAGER_COLOUR, "s"), (OWN, OWN_COLOUR, "o")):
        points = [row for row in rows if row["peer"] == name]
        x = [row["counted_gflop"] * 1e3 / row["counted_mb"] for row in points]
        y = [row["tflops"] for row in points]
        ax.plot(x, y, marker, color=colour, ms=6, label=f"{name}, measured", zorder=3)
        if name == OWN:
            numbers = [layers.index(row["case"]) + 1 for row in points]
            _number_points(ax, sorted(zip(x, y, numbers, strict=True)))
    low, high = ax.dataLim.intervalx
    x = [low / 1.5, gpu.tensor[number_format] * 1e3 / gpu.memory, 2 * high]
    roof = [(i, _attainable(gpu, number_format, i)) for i in sorted(x)]
    ax.plot(*zip(*roof, strict=True), color="black", lw=1.2, label=f"roof of the {gpu.name}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.legend(loc="lower right")
    ax.grid(which="both", color="#eee")
    key = "; ".join(f"{i} {name}" for i, name in enumerate(layers, 1))
    peaks = f"{gpu.tensor[number_format]:g} TFLOP/s and {gpu.memory:g} GB/s ({gpu.source})"
    return _figure(figure, f"Each layer with its batch norm and ReLU. Roof: {peaks}. Layers: {key}.")


def _attainable(gpu: GPU, number_format: str, intensity: float) -> float:
    """TFLOP/s at so many operations per byte."""
    return min(gpu.tensor[number_format], intensity * gpu.memory / 1e3)


def _number_points(ax: Axes, points: Iterable[tuple[float, float, int]]) -> None:
    """Write the number of each layer above its point, at three heights in turn, since many lie close together."""
    for i, (x, y, number) in enumerate(points):
        line = {"arrowstyle": "-", "color": "#bbb", "lw": 0.5}
        place = (-6 - 3 * (i % 3), 9 + 10 * (i % 3))
        ax.annotate(str(number), (x, y), place, textcoords="offset points", fontsize=7, ha="center", arrowprops=line)


def traffic(rows: Records) -> Iterable[str]:
    """Bytes per image of the models by kind of launch, at the largest batch."""
    for phase in (FORWARD, BACKWARD):
        bars = _counted_bars(rows, phase)
        if not bars:
            continue
        figure = Figure(figsize=(9.5, 1.2 + 0.42 * len(bars)), layout="constrained")
        ax, left = figure.add_subplot(), np.zeros(len(bars))
        names = [_bar_name(row) for row in bars]
        for kind in KINDS:
            column = f"counted_mb_{kind.lower().replace(' ', '_')}"
            size = np.array([row[column] / row["batch"] for row in bars])
            ax.barh(names, size, left=left, color=COLOURS[kind], label=kind, height=0.62)
            left += size
        for i, (row, total) in enumerate(zip(bars, left, strict=True)):
            ax.text(
                total + left.max() / 100, i, f"{total:.1f}; {row['counted_launches']} launches", va="center", fontsize=8
            )
        ax.set_xlim(0, 1.25 * left.max())
        ax.set_xlabel("MB per image (counted)")
        ax.set_title(phase)
        figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
        ax.invert_yaxis()
        yield _figure(
            figure,
            f"Counted from shapes as planned for the {bars[0]['planned_for']}, weights included. Batch norm, ReLU and "
            "addition that run inside a convolution's launch count as convolution.",
        )


def memory(rows: Records) -> Iterable[str]:
    """What training keeps for the backward, counted, and the peak of a call, measured."""
    bars = _counted_bars(rows, BACKWARD)
    if bars:
        figure = Figure(figsize=(9.5, 0.9 + 0.38 * len(bars)), layout="constrained")
        ax = figure.add_subplot()
        kept = [row["counted_saved_mb"] / row["batch"] for row in bars]
        ax.barh([_bar_name(row) for row in bars], kept, color="#CC79A7", height=0.62)
        for i, size in enumerate(kept):
            ax.text(size + max(kept) / 100, i, f"{size:.1f}", va="center", fontsize=8)
        ax.set_xlim(0, 1.12 * max(kept))
        ax.set_xlabel("MB per image kept for the backward (counted)")
        ax.invert_yaxis()
        yield _figure(figure, "Activations that autograd saves, without parameters and input; counted from the shapes.")
    else:
        yield f"<p>Kept for the backward: {NOT_MEASURED} (only with <code>--train</code>).</p>"
    peaks = [row for row in rows if row["peak_memory_mb"] is not None]
    if not peaks:
        yield f"<p>Peak of allocated memory: {NOT_MEASURED} (on a GPU alone).</p>"
        return
    columns: Columns = {
        "peer": "peer",
        "MB above what was allocated before the call": "peak_memory_mb",
    }
    yield _table(peaks, columns)


def _counted_bars(rows: Records, phase: str) -> Records:
    counted = [row for row in rows if row["phase"] == phase and row["counted_mb"] is not None]
    largest = max((row["batch"] for row in counted), default=0)
    return [row for row in counted if row["batch"] == largest]


def _bar_name(row: Record) -> str:
    return f"{row['case']} {row['dtype']}\n{row['peer']}"


def _times(rows: Records) -> str:
    """What was measured; a row that was not says why."""
    columns: Columns = {
        "peer": "peer",
        "median ms": "median_ms",
        "quartiles": _quartiles,
        "time over ours": _verdict,
        "TFLOP/s": "tflops",
        "GB/s": "gbs",
        "% of roof": "percent_of_roof",
    }
    return _table(rows, columns)


def _quartiles(row: Record) -> str | None:
    return None if row["median_ms"] is None else f"{_number(row['q1_ms'])} to {_number(row['q3_ms'])}"


def _counts(rows: Records, gpu: bool) -> str:
    columns: dict[str, str | Callable[[Record], object]] = {
        "peer": "peer",
        "launches (counted)": "counted_launches",
        "GFLOP (counted)": "counted_gflop",
        "MB (counted)": "counted_mb",
    }
    if gpu:
        columns |= {"ms at the roof (MODEL)": "model_roof_ms"}
    return _table([row for row in rows if row["counted_mb"] is not None], columns)


def _setting(row: Record) -> str:
    return f"{row['case']}, batch {row['batch']}, {row['dtype']}, {row['phase']}"


def _table(rows: Records, columns: Columns) -> str:
    """A line for each row, under a heading for each setting; a column of which nothing was measured is left out."""
    columns = {
        name: column
        for name, column in columns.items()
        if column in ("peer", "median_ms") or any(_value(row, column) is not None for row in rows)
    }
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    lines = []
    for setting, group in groupby(rows, key=_setting):
        lines.append(f'<tr><th class="group" colspan="{len(columns)}">{_text(setting)}</th></tr>')
        lines += [f"<tr>{_cells(row, columns)}</tr>" for row in group]
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Record, columns: Columns) -> str:
    """The cells of a row; where nothing was measured, one that says so stands for all behind the first."""
    if "median_ms" in columns.values() and row["median_ms"] is None:
        reason = f"{NOT_MEASURED}: {row['reason']}"
        return f'{_cell(row["peer"])}<td class="none" colspan="{len(columns) - 1}">{_text(reason)}</td>'
    return "".join(_cell(_value(row, column)) for column in columns.values())


def _value(row: Record, column: str | Callable[[Record], object]) -> object:
    return row[column] if isinstance(column, str) else column(row)


def _cell(value: object) -> str:
    if value is None:
        return f'<td class="none">{NOT_MEASURED}</td>'
    if isinstance(value, int | float):
        return f'<td class="number">{_number(value)}</td>'
    return f"<td>{_text(value)}</td>"


def _number(value: float) -> str:
    """At most four digits that mean something."""
    return str(value) if isinstance(value, int) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _facts(facts: Mapping[str, str]) -> str:
    lines = (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(9.5, height * lines), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, i) for i in range(1, count + 1)]


def _figure(figure: Figure, caption: str) -> str:
    """The figure as SVG inside the page: no script, no link, no metadata."""
    file = io.StringIO()
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    salt = caption + "".join(ax.get_title() for ax in figure.axes)  # or the ids of two plots might be the same
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{_text(caption)}</figcaption></figure>"


def _text(value: object) -> str:
    return html.escape(str(value))
