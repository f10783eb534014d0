"""What a request's JSON may hold, beyond what mlx_lm.server checks: all that would trip its generation thread, and all
that it would leave unheeded. A message says what should be and what was received.
"""

import json
import math
from typing import Any, NoReturn

from tiny_qmoe_mlx.errors import shown
from tiny_qmoe_mlx.serving.refusal import Refused

UNHEEDED = {"n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "tool_choice": ("auto", "none")}
COUNTS, SEEDS = (1 << 31) - 1, (1 << 63) - 1  # the highest
COUNT, SHARE, PENALTY = (int, 0, COUNTS), (float, 0, 1), (float, -COUNTS, COUNTS)
NUMBERS: dict[str, tuple[type, float, float]] = {  # whole or not, lowest, highest
    "max_tokens": (int, 1, COUNTS),
    "max_completion_tokens": (int, 1, COUNTS),
    "seed": (int, 0, SEEDS),
    "top_k": COUNT,
    "num_draft_tokens": COUNT,
    "top_logprobs": (int, -1, 11),
    "repetition_context_size": COUNT,
    "presence_context_size": COUNT,
    "frequency_context_size": COUNT,
    "temperature": (float, 0, COUNTS),
    "top_p": SHARE,
    "min_p": SHARE,
    "xtc_probability": SHARE,
    "xtc_threshold": (float, 0, 0.5),  # above a half no token would ever be too likely
    "repetition_penalty": (float, 0.01, 100),  # or 0, as mlx-lm's server has it
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
}
VALUES = 1 << 16  # of a request, names of fields among them
STOPS, STOP_LENGTH = 16, 256
BIASES = 4096
TEMPLATE_FREE = (str, bool, int, float)
TEMPLATE_LENGTH = 1024  # of a text: a template may write it for every message
TEMPLATE_TAKEN = {  # of apply_chat_template itself; a template of a stranger's is a program
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


def parse(data: bytes) -> dict[str, Any]:
    """A request's body, without what it gives as null.

    Raises:
        Refused: it is no JSON object, has a number that is none, or more values than memory is meant for.
    """
    if values(data) > VALUES:  # each takes up to 30 times its size
        raise Refused(400, f"the request should have at most {VALUES} values.", "too_large")
    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        text = "it is nested too deeply" if isinstance(error, RecursionError) else shown(error, 200)
        raise Refused(400, f"the request should be JSON and is not: {text}.") from error
    if not isinstance(body, dict):
        raise Refused(400, f"the request should be a JSON object, received {_show(body)}.")
    return {name: value for name, value in body.items() if value is not None}


def values(data: bytes) -> int:
    """About as many values as JSON in UTF-8 has, without making them; a text is one, whatever is in it."""
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = bare.count(b'"') // 2
    if texts > VALUES:
        return texts
    return texts + sum(part.count(mark) for part in bare.split(b'"')[::2] for mark in (b",", b"[", b"{"))


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond what a number can be")
    return value


def check(body: dict[str, Any], vocabulary: int) -> None:
    """Refuse what cannot be answered as it was asked; fills in what OpenAI's API leaves open.

    Args:
        body: of `parse`; changed where a field may be left out.
        vocabulary: number of the model's tokens.

    Raises:
        Refused: with the field's name.
    """
    for name, allowed in UNHEEDED.items():
        if name in body and not any(type(body[name]) is type(value) and body[name] == value for value in allowed):
            _refuse(name, f"{' or '.join(map(json.dumps, allowed))} on this server", body[name])
    if _is_number(body.get("repetition_penalty")) and body["repetition_penalty"] == 0:
        del body["repetition_penalty"]
    for name, (kind, low, high) in NUMBERS.items():
        value = body.get(name, low)
        if not (_is_number(value) and low <= value <= high and (kind is float or value == int(value))):
            _refuse(name, f"a {'whole ' if kind is int else ''}number in {low} to {high}", value)
        if name in body and kind is int:
            body[name] = int(value)  # JSON does not tell 2.0 from 2
    if body.get("top_k", 0) >= vocabulary:
        _refuse("top_k", f"less than the model's {vocabulary} tokens", body["top_k"])
    _check_bias(body.get("logit_bias", {}), vocabulary)
    _check_stop(body.get("stop", []))
    _check_options(body)
    if body.get("tool_choice") == "none":
        body.pop("tools", None)


def _check_bias(bias: Any, vocabulary: int) -> None:
    fits = isinstance(bias, dict) and len(bias) <= BIASES
    if not fits or not all(_is_token(k, vocabulary) and _is_bias(v) for k, v in bias.items()):
        _refuse("logit_bias", f"at most {BIASES} numbers by token, each below {vocabulary}", bias)


def _is_token(text: str, vocabulary: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < vocabulary


def _is_bias(value: Any) -> bool:
    return _is_number(value) and abs(value) <= COUNTS


def _check_stop(stop: Any) -> None:
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or len(words) > STOPS or not all(_is_stop(word) for word in words):
        _refuse("stop", f"a text or at most {STOPS} of them, each of 1 to {STOP_LENGTH} characters", stop)


def _is_stop(word: Any) -> bool:
    return isinstance(word, str) and 0 < len(word) <= STOP_LENGTH and _is_text(word)


def _check_options(body: dict[str, Any]) -> None:
    """Objects within the request."""
    options = body.setdefault("stream_options", {"include_usage": False})
    if not isinstance(options, dict) or not isinstance(options.setdefault("include_usage", False), bool):
        _refuse("stream_options", 'an object like {"include_usage": true}', options)
    body["stream_options"] = {"include_usage": options["include_usage"]}  # which is kept until the answer is whole
    for name in ("chat_template_kwargs", "role_mapping"):
        if not isinstance(body.get(name, {}), dict):
            _refuse(name, "an object", body[name])
    own = body.get("chat_template_kwargs", {})
    if TEMPLATE_TAKEN.intersection(own) or not all(isinstance(value, TEMPLATE_FREE) for value in own.values()):
        _refuse("chat_template_kwargs", "texts, numbers or booleans for the template's own variables", own)
    if any(isinstance(value, str) and len(value) > TEMPLATE_LENGTH for value in own.values()):
        _refuse("chat_template_kwargs", f"texts of at most {TEMPLATE_LENGTH} characters", own)
    if not all(isinstance(text, str) for text in body.get("role_mapping", {}).values()):
        _refuse("role_mapping", "texts by role", body["role_mapping"])
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _refuse("tools", "a list of objects", tools)
    if body.get("tools") and isinstance(body.get("response_format"), dict):
        if body["response_format"].get("type") != "text":
            raise Refused(400, "tools and response_format exclude each other on this server; leave one of them out.")


def check_prompt(body: dict[str, Any], chat: bool) -> None:
    """Refuse a prompt, or messages, that mlx-lm would trip over.

    Raises:
        Refused: with what is wrong.
    """
    if not chat:
        if not isinstance(body.get("prompt"), str):
            _refuse("prompt", "one text", body.get("prompt"))
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "a list of at least one message", messages)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse("messages", "objects with a role", message)
        _check_content(message)


def _check_content(message: dict[str, Any]) -> None:
    """Of a message; its text becomes one."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not (content is None or isinstance(content, str | list)) or not all(_is_text_part(part) for part in parts):
        _refuse("content", 'a text or a list of {"type": "text", "text": ...}: this server reads text alone', content)
    calls = [] if message.get("tool_calls") is None else message["tool_calls"]
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls
    ):
        _refuse("tool_calls", "a list of objects with a function", calls)
    message["content"] = content if isinstance(content, str) else "".join(part["text"] for part in parts)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: str) -> bool:
    """Whether it is Unicode: JSON can hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeError:
        return False
    return True


def _refuse(name: str, should: str, received: Any) -> NoReturn:
    raise Refused(400, f"{name} should be {should}, received {_show(received)}.", "invalid_value")


def _show(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
