"""Time and memory against pixels, our models beside timm's."""

from pathlib import Path

import matplotlib

from .cases.models import PEERS


def draw(content: dict, picture: Path) -> None:
    """Draws the result of the case `resolution` to a PNG file, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("train", "median_ms", "training step, ms a picture"), ("eval", "median_ms", "evaluation, ms a picture")]
    panels += [("train", "peak_gib", "training, peak GiB")]
    panels = [panel for panel in panels if any(_points(content, panel[0], panel[1]).values())]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.6), squeeze=False)
    for axis, (kind, key, title) in zip(axes[0], panels, strict=True):
        for name, points in _points(content, kind, key).items():
            style = "--" if name in PEERS else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="picture, pixels", title=title)
        sides = sorted({result["size"] for result in content["results"] if "size" in result})
        axis.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides], minor=False)
        axis.minorticks_off()
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].legend(fontsize=7)
    environment = content["environment"]
    figure.suptitle(f"{environment['device']}, torch {environment['packages']['torch']}", fontsize=10)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def _points(content: dict, kind: str, key: str) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for result in content["results"]:
        if result.get("pass") == kind and result.get(key) is not None:
            share = result["batch"] if key == "median_ms" else 1
            points.setdefault(result["model"], []).append((result["size"] ** 2, result[key] / share))
    return {name: sorted(line) for name, line in points.items()}
