"""Immutable releases, the alias that points at one of them, and the log of decisions."""
