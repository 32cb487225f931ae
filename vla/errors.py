"""The error that a user can mend."""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what was asked or given; its message is one line, and the command line shows nothing else."""


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Check that an optional dependency is installed.

    Args:
        module: Import name of the dependency.
        extra: Extra of this distribution that brings it.
        purpose: What needs it, as the subject of the message.

    Raises:
        UserError: When it is missing, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs {module}: pip install 'vision-linear-attention[{extra}]'")


def suggest(name: str, known: Iterable[str]) -> str:
    """Tail of a message: the names that `name` may have been meant to be, or nothing when none is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""
