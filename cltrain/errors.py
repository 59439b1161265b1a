"""What a user can fix. Everything else propagates as it is; `assert` is for what only we can break."""


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
