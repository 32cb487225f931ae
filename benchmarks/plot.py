"""Time and memory against pixels, our models beside timm's."""

import itertools
from pathlib import Path

import matplotlib

from .cases.models import PEERS

# Colours that colour-blind readers can tell apart (Okabe and Ito); peers are grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b5a2b", "#111111")
MARKERS = ("o", "s", "^", "D", "v", "X", "h", "P")
GREYS = ("0.25", "0.4", "0.55", "0.65")

# Pass and figure of a result, title and unit.
PANELS = (
    ("eval", "median_ms", "Inference", "milliseconds per image"),
    ("train", "median_ms", "Training step, forward and backward", "milliseconds per image"),
    ("train", "peak_gib", "Training memory", "peak GiB"),
)


def draw(content: dict, picture: Path) -> None:
    """Draws the result of the case `resolution` to a PNG file, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = [result for result in content["results"] if "error" not in result]
    names = list(dict.fromkeys(result["model"] for result in results))
    sides = sorted({result["size"] for result in results})
    styles = _styles(names)
    lines = {panel: _lines(results, *panel[:2]) for panel in PANELS}
    lines = {panel: found for panel, found in lines.items() if found}

    figure, axes = pyplot.subplots(1, len(lines), figsize=(4.6 * len(lines), 5.2), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    handles = {}
    for axis, ((_, _, title, unit), found) in zip(axes[0], lines.items(), strict=True):
        for name, points in found.items():
            (handles[name],) = axis.plot(*zip(*points, strict=True), **styles[name])
        axis.set(xscale="log", yscale="log", xlabel="image size, pixels", xmargin=0.08)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel(unit)
        axis.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides], fontsize=9)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="minor", length=0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(_few))
        axis.tick_params(axis="y", which="minor", labelsize=7, labelcolor="0.4")
        axis.grid(True, which="major", color="0.88", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        _guide(axis)
    figure.legend(
        [handles[name] for name in names],
        [_label(name) for name in names],
        loc="outside lower center",
        ncols=min(5, len(names)),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(_ground(content["environment"], results), fontsize=9, color="0.3")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=160)
    pyplot.close(figure)


def _styles(names: list[str]) -> dict[str, dict]:
    """How each model's line looks."""
    ours, peers = (zip(itertools.cycle(colours), itertools.cycle(MARKERS)) for colours in (COLOURS, GREYS))
    styles = {}
    for name in names:
        colour, marker = next(peers if name in PEERS else ours)
        styles[name] = dict(color=colour, marker=marker, markersize=5)
        if name in PEERS:
            styles[name] |= dict(linestyle="--", linewidth=1.2, markerfacecolor="white", zorder=2)
        else:
            styles[name] |= dict(linewidth=1.8, markeredgecolor="white", markeredgewidth=0.6, zorder=3)
    return styles


def _lines(results: list[dict], kind: str, figure: str) -> dict[str, list[tuple[int, float]]]:
    """Pixels and figure of every model, times per image, in the mode where it is smallest."""
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if result["pass"] == kind and figure in result:
            value = result[figure] / (result["batch"] if figure == "median_ms" else 1)
            points = lines.setdefault(result["model"], {})
            pixels = result["size"] ** 2
            points[pixels] = min(value, points.get(pixels, value))
    return {name: sorted(points.items()) for name, points in lines.items()}


def _guide(axis) -> None:
    """A line of slope 1 below all others: what grows with the pixels runs beside it."""
    points = [point for line in axis.get_lines() for point in line.get_xydata()]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    if left == right:
        return
    height = 0.7 * min(y / x for x, y in points)
    axis.plot([left, right], [height * left, height * right], color="0.75", linewidth=1, linestyle=":", zorder=1)
    middle = (left * right) ** 0.5
    place = dict(xytext=(6, -10), textcoords="offset points")
    axis.annotate("linear in the pixels", (middle, height * middle), **place, fontsize=7, color="0.5")


def _few(value: float, _: int) -> str:
    """Labels between the powers of ten, where they have room."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _label(name: str) -> str:
    return f"{name.partition('_patch')[0]} (timm)" if name in PEERS else name


def _ground(environment: dict, results: list[dict]) -> str:
    """What all figures depend on, in a line."""
    packages = environment["packages"]
    parts = [environment["device"], f"torch {packages['torch']}"]
    if environment.get("cuda"):
        parts.append(f"Triton {packages['triton']}")
    for key, text in (("dtype", "{}"), ("layout", "{}"), ("mode", "{}"), ("batch", "batch {}")):
        values = dict.fromkeys(str(result[key]) for result in results)
        parts.append(text.format(" or ".join(values)))
    return "  ·  ".join(parts)
