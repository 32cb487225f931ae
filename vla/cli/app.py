"""The application that commands register with, and how a mistake is told."""

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from ..errors import UserError
from ..timing import environment

# Results go to the output stream, what happens meanwhile to the error stream.
out = Console()
err = Console(stderr=True)


class _Group(TyperGroup):
    """Commands whose `UserError` becomes one line on the error stream and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(str(error))
        except torch.OutOfMemoryError:
            fail("out of memory on the device; a smaller --batch-size or --grad-checkpointing may help")


def fail(message: str) -> None:
    """Say what was wrong, in one line, and exit with code 1."""
    complain(message)
    raise typer.Exit(1)


def complain(message: str) -> None:
    """Say what was wrong, in one line."""
    typer.echo(f"vla: {' '.join(message.split())}", err=True)


app = typer.Typer(
    name="vla",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_versions(wanted: bool) -> None:
    if wanted:
        packages = environment(torch.device("cpu"))["packages"]
        for name, version in packages.items():
            out.print(f"{name} {version or '-'}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="Show the versions in use."),
    ] = False,
) -> None:
    """Vision linear attention: train, evaluate and use its backbones, and any other timm model."""


def main() -> None:
    """Entry point of the `vla` command."""
    app()


def examples(*lines: str) -> str:
    """Examples below a command's help, one to a line."""
    return "\n\n".join(["Examples:", *(f"[cyan]{line}[/cyan]" for line in lines)])
