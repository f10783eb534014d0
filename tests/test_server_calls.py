"""Calls of tools, which a model may write in any way, and may write badly."""

import logging

import pytest
from mlx_lm.server import ToolCallFormatter
from mlx_lm.tool_parsers import mistral
from server_model import CALL

from tiny_qmoe_mlx.serving import calls

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
BAD = {
    "no name": {"arguments": {}},
    "no arguments": {"name": "weather"},
    "a number": 7,
    "nothing": None,
    "a list of numbers": [1],
    "a name that is none": {"name": ["weather"], "arguments": {}},
    "no JSON": {"name": "weather", "arguments": {"city": {1, 2}}},
    "no JSON number": {"name": "weather", "arguments": {"degrees": float("nan")}},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_call_is_refused(what):
    with pytest.raises(ValueError, match="no call that this server can pass on"):
        calls.parser(lambda text, tools: BAD[what])("", calls.packed(TOOLS))


@pytest.mark.parametrize("kind", [ValueError, TypeError, RecursionError])
def test_an_error_of_a_parser_does_not_tell_what_was_written(kind):
    def fail(text, tools):
        raise kind(text)

    with pytest.raises(ValueError) as caught:
        calls.parser(fail)("mother-of-pearl", None)
    assert "pearl" not in str(caught.value) and caught.value.__suppress_context__


def test_a_call_is_passed_on_with_the_tools_that_were_offered():
    seen = []
    parse = calls.parser(lambda text, tools: seen.append((text, tools)) or [CALL, {**CALL, "id": "call-2"}])
    assert parse("x", calls.packed(TOOLS)) == [{**CALL, "id": None}, {**CALL, "id": "call-2"}]
    assert seen == [("x", TOOLS)] and calls.parser(None) is calls.packed(None) is None


def test_a_parser_of_mlx_lm_that_quotes_is_silent_here(caplog):
    with caplog.at_level(logging.DEBUG):
        assert ToolCallFormatter(calls.parser(mistral.parse_tool_call), calls.packed(TOOLS))(["mother-of-pearl"]) == []
    assert "Failed to parse" in caplog.text and "pearl" not in caplog.text
