"""What is wrong with an answer in form alone: what it says may be right or wrong, that is for others to judge."""

from __future__ import annotations

from collections.abc import Sequence

from cltrain.errors import guarded
from cltrain.experience.verify import verify
from cltrain.records import Example, Message, Tool

NEVER_CAME = ("timeout", "aborted", "error")  # ends of a turn that the server answers for
CUT = "length"  # the finish reason of an answer whose end nobody saw: most often the client's own max_tokens


def fault_of(messages: Sequence[Message], answers: Sequence[int], tools: Sequence[Tool]) -> str | None:
    """Why one of these answers (indices of `messages`) is broken, or None: it says nothing, or a call of it names no
    tool that was offered, is no JSON, or does not fit the tool's schema."""
    example = Example("", "", "", tuple(messages), tuple(answers), tuple(tools))
    return guarded(verify, example, must_be_grounded=False)
