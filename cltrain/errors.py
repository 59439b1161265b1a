"""What a user can fix, and what the content of one record can break. Everything else propagates as it is; `assert` is
for what only we can break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class CltrainError(Exception):
    """Base of the errors that are printed without a traceback."""

    exit_code = 1


class ConfigError(CltrainError):
    """A setting is wrong: names the setting, the value seen and what to do."""

    exit_code = 2


class DataError(CltrainError):
    """An input file, record, adapter or model cannot be used: names it and says why."""

    exit_code = 3


class ConflictError(CltrainError):
    """Somebody else moved first (alias compare-and-swap, lease, existing name): look again, then retry."""

    exit_code = 4


class ServerError(CltrainError):
    """A server refused, timed out or answered something that cannot be trusted."""

    exit_code = 5


class UnavailableError(ServerError):
    """A server does not answer, or lost what it held: where there are replicas, another one may answer instead."""


class NotHeldError(UnavailableError):
    """A server answers, but not as `model`, which it does not hold; what else it holds is as good as before."""

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


OF_EXIT_CODE: dict[int, type[CltrainError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, ConflictError, ServerError)
}
"""The kind of an error that another process ended with, or answered."""


def failure(error: Exception) -> dict[str, object]:
    """The answer of a worker that could not do it: whoever asked ends with the same kind of error."""
    if isinstance(error, CltrainError):
        return {"error": str(error), "exit_code": error.exit_code}
    return {"error": f"{type(error).__name__}: {error}"}


BAD_CONTENT = (DataError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What the content of one record can make its reader raise. A full memory or disk is no record's fault."""


def guarded(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    """What `read` gives of one record, or why the record's content defeats it. Whoever reads many reads each through
    this, so that a bad one costs the others nothing."""
    try:
        return read(*args, **kwargs)
    except DataError as error:
        return str(error)
    except BAD_CONTENT as error:
        return f"its content cannot be used: {type(error).__name__}: {str(error)[:200]}"
