"""Calls of tools, as a model writes them: which may be anything, and belongs into no log."""

import json
from collections.abc import Callable
from typing import Any

from tiny_qmoe_mlx.library_errors import panics

BAD = "what the model wrote is no call that this server can pass on"


def packed(tools: list[dict[str, Any]] | None) -> Any:
    """A request's tools while it waits, as JSON in bytes: as objects they take many times as much."""
    return json.dumps(tools).encode() if tools else None


def parser(own: Callable[[str, Any], Any] | None) -> Callable[[str, Any], list[dict[str, Any]]] | None:
    """mlx-lm's parser of a model's calls, for tools as `packed` has them.

    It raises one ValueError for all that is none: mlx-lm leaves such a call out and writes the error into the log,
    where its own parsers' would quote the answer; other errors would end the answer.
    """
    if own is None:
        return None

    def parse(text: str, tools: Any) -> list[dict[str, Any]]:
        try:
            with panics("tools", BAD):
                found = own(text, json.loads(tools) if tools else None)
                return [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception:
            raise ValueError(BAD) from None

    return parse


def _call(found: Any) -> dict[str, Any]:
    """A call with a name, and arguments that are JSON."""
    if not isinstance(found["name"], str):
        raise TypeError
    json.dumps(found["arguments"], allow_nan=False)
    return {"name": found["name"], "arguments": found["arguments"], "id": found.get("id")}
