"""Command line of the benchmarks."""

import json
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import cases as _  # noqa: F401  registers the cases
from .registry import CASES, MODES, Options
from .runner import DeviceLost, OutOfTime, Report, measure_bandwidth, run_case, time_limit

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=160)


@app.command("list")
def list_cases() -> None:
    """List the cases."""
    for name, case in CASES.items():
        console.print(f"[bold]{name}[/bold]: {case.description}")


@app.command()
def run(
    names: list[str] = typer.Argument(None, help="Cases to run; by default those for the device."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu", help="Device."),
    models: str = typer.Option("", help="Models instead of a case's own, with commas."),
    peers: bool = typer.Option(False, "--peers", help="Also timm's models of the same size."),
    modes: str = typer.Option("", help=f"Modes instead of a case's own, with commas: {', '.join(MODES)}."),
    batch: int = typer.Option(None, min=1, help="Batch size instead of a case's own."),
    sizes: str = typer.Option("", help="Image sizes in pixels instead of a case's own, with commas."),
    drop_path: float = typer.Option(0.0, help="Stochastic depth in training, the same for all models."),
    tf32: bool = typer.Option(True, help="TF32 for float32 products on the GPU."),
    threads: int = typer.Option(2, help="CPU threads."),
    calls: int = typer.Option(20, min=1, help="Calls in each of the three repetitions; rounds on a CPU."),
    limit: float = typer.Option(None, "--time-limit", help="Seconds for everything; figures up to then are kept."),
    output: Path = typer.Option(RESULTS, help="Folder for the results, one JSON file a case."),
    compare: Path = typer.Option(None, help="Earlier results, a file or a folder, to compare with."),
) -> None:
    """Check, then time cases, print tables and write the figures."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    options = Options(torch.device(device), _split(models), peers, _split(modes), batch, _sizes(sizes), drop_path)
    for mode in options.modes:
        if mode not in MODES:
            raise typer.BadParameter(f"unknown mode {mode!r}, expected one of {', '.join(MODES)}", param_hint="--modes")
    names = names or [name for name in CASES if name.startswith("cpu_") == (options.device.type == "cpu")]
    for name in names:
        if name not in CASES:
            raise typer.BadParameter(f"unknown case {name!r}, expected one of {', '.join(CASES)}", param_hint="NAMES")

    failures = 0

    def tell(result: dict) -> None:
        nonlocal failures
        failures += "error" in result
        console.print(_line(result), highlight=False, soft_wrap=True)

    try:
        with time_limit(limit):
            bandwidth = measure_bandwidth(options.device)
            console.print(f"{device}: a large copy moves {bandwidth / 1e9:.0f} GB/s")
            for name in names:
                console.rule(name)
                report = run_case(name, options, output, bandwidth, calls, tell)
                if name == "resolution":
                    console.print(_growth(report.content))
                earlier = compare / f"{name}.json" if compare and compare.is_dir() else compare
                if earlier is not None:
                    console.print(_comparison(_read(earlier), report.content))
    except OutOfTime:
        console.print(f"stopped after {limit:.0f} seconds; what was measured is in {output}")
    except DeviceLost as error:
        console.print(
            f"stopped: the device can be used no more in this process ({error}); run the other cases in a new one"
        )
    if failures:
        console.print(f"{failures} measurements failed")
        raise typer.Exit(1)


@app.command("compare")
def compare_results(old: Path, new: Path) -> None:
    """Compare two results of the same case."""
    console.print(_comparison(_read(old), _read(new)))


@app.command()
def merge(into: Path, files: list[Path]) -> None:
    """Add the figures of FILES to those of INTO, of the same case and environment; later ones replace earlier ones."""
    contents = [_read(file) for file in ([into] if into.exists() else []) + files]
    first = contents[0]
    for content in contents[1:]:
        if content["case"] != first["case"] or _same_ground(content) != _same_ground(first):
            raise typer.BadParameter("the results are not of the same case, device and versions")
    report = Report(into, first["case"], contents[-1]["environment"])
    for result in {r["name"]: r for content in contents for r in content["results"]}.values():
        report.add(result)


@app.command()
def plot(
    result: Path = typer.Argument(RESULTS / "resolution.json", help="Result of the case resolution."),
    picture: Path = typer.Option(None, "--out", "-o", help="PNG file; beside the result by default."),
) -> None:
    """Draw time and memory per picture against its pixels."""
    from .plot import draw

    content = _read(result)
    if content["case"] != "resolution" or all("error" in figures for figures in content["results"]):
        raise typer.BadParameter(f"no figures of the case resolution in {result}")
    picture = picture or result.with_suffix(".png")
    draw(content, picture)
    console.print(f"{picture}")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers with commas", param_hint="--sizes") from None


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error


def _same_ground(content: dict) -> dict:
    varying = ("date", "bandwidth_gb_s")
    return {key: value for key, value in content["environment"].items() if key not in varying}


def _line(result: dict) -> str:
    if "error" in result:
        return f"{result['name']:52} [red]{result['error']}[/red]".replace("[Errno", "(Errno")
    parts = [f"{result['name']:52} {result['median_ms']:10.3f} ms"]
    if result.get("items_per_second"):
        parts.append(f"{result['items_per_second']:9.1f} /s")
    if "over_floor" in result:
        parts.append(f"floor {result['floor_ms']:8.3f} ms x {result['over_floor']:5.2f}")
    if "peak_gib" in result:
        parts.append(f"{result['peak_gib']:6.2f} GiB")
    if "times_faster" in result:
        parts.append(f"official {result['official_ms']:8.3f} ms / {result['times_faster']:.2f}")
    return "  ".join(parts)


def _growth(content: dict) -> Table:
    """Time and memory per pixel, over those at the size in front: 1 where they grow with the pixels."""
    sizes = sorted({result["size"] for result in content["results"]})
    first = 512 if 512 in sizes else sizes[0]
    sizes = [size for size in sizes if size > first]
    table = Table(title=f"per pixel, over {first} pixels: time (memory)")
    table.add_column("", no_wrap=True)
    for size in sizes:
        table.add_column(str(size), justify="right")
    figures = {(r["model"], r["pass"], r["size"]): r for r in content["results"] if "error" not in r}
    for model, kind in dict.fromkeys((r["model"], r["pass"]) for r in content["results"]):
        base = figures.get((model, kind, first))
        cells = []
        for size in sizes:
            result = figures.get((model, kind, size))
            if base is None or result is None:
                cells.append("-")
                continue
            growth = [result[k] / base[k] / (size / first) ** 2 for k in ("median_ms", "peak_gib") if k in result]
            cells.append(" ".join([f"{growth[0]:.2f}", *(f"({g:.2f})" for g in growth[1:])]))
        table.add_row(f"{model} {kind}", *cells)
    return table


def _comparison(old: dict, new: dict) -> Table:
    """Every measurement of both, with the old time over the new."""
    table = Table(title=f"{new['case']}: {old['environment']['date']} and {new['environment']['date']}")
    table.add_column("", no_wrap=True)
    for title in ("old ms", "new ms", "speed-up", "old GiB", "new GiB"):
        table.add_column(title, justify="right")
    earlier = {result["name"]: result for result in old["results"]}
    for result in new["results"]:
        before = earlier.get(result["name"], {})
        pair = before.get("median_ms"), result.get("median_ms")
        table.add_row(
            result["name"],
            *("-" if value is None else f"{value:.3f}" for value in pair),
            "-" if None in pair else f"{pair[0] / pair[1]:.2f}",
            *("-" if r.get("peak_gib") is None else f"{r['peak_gib']:.2f}" for r in (before, result)),
        )
    changed = [
        f"{key}: {old['environment'].get(key)} -> {value}"
        for key, value in _same_ground(new).items()
        if old["environment"].get(key) != value
    ]
    table.caption = "\n".join(changed)
    return table


if __name__ == "__main__":
    app()
