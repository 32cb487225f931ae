"""Command line of the benchmarks."""

import json
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import cases as _  # noqa: F401  registers the cases
from .registry import CASES
from .timing import environment, measure

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()


@app.command("list")
def list_cases() -> None:
    """List the cases."""
    for name, function in CASES.items():
        console.print(f"{name}: {function.__doc__}")


@app.command()
def run(
    names: list[str] = typer.Argument(None, help="Cases to run, all by default."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu", help="Device."),
    threads: int = typer.Option(2, help="CPU threads."),
    rounds: int = typer.Option(15, help="Timed repetitions."),
    output: Path = typer.Option(RESULTS, help="Folder for the results, one JSON file a case."),
) -> None:
    """Check, then time cases, print a table and write the figures."""
    torch.set_num_threads(threads)
    for name in names or CASES:
        if name not in CASES:
            raise typer.BadParameter(f"unknown case {name!r}, expected one of {', '.join(CASES)}")
        results = measure(list(CASES[name](torch.device(device))), torch.device(device), rounds)
        table = Table("", "median ms", "fastest ms", title=name)
        for result in results:
            table.add_row(result["name"], f"{result['median_ms']:.2f}", f"{result['fastest_ms']:.2f}")
        console.print(table)
        report = {"case": name, "environment": environment(torch.device(device)), "results": results}
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


app()
