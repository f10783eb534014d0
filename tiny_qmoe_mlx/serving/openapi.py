"""/openapi.json: what the server takes and gives, as OpenAPI 3.1. Ranges and limits are those of `checks`."""

from typing import Any

from tiny_qmoe_mlx import __version__
from tiny_qmoe_mlx.serving import checks

Json = dict[str, Any]
TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}


def or_null(schema: Json) -> Json:
    """A field that may be null, which means what leaving it out means."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(required: Json, optional: Json | None = None, **more: Any) -> Json:
    """An object with fields that are there, and fields that may be."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": fields, **more}


def listed(item: Json, **more: Any) -> Json:
    return {"type": "array", "items": item, **more}


def content(schema: Json, kind: str = "application/json") -> Json:
    return {kind: {"schema": schema}}


def reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# ---- requests

STOP = {"type": "string", "minLength": 1, "maxLength": checks.STOP_LENGTH}
NUMBERS = {
    name: {"type": "integer" if kind is int else "number", "minimum": low, "maximum": high}
    for name, (kind, low, high) in checks.NUMBERS.items()
}
BIAS = {
    "type": "object",
    "description": "added to a token's logit, by the token's number, which is below the model's vocabulary",
    "maxProperties": checks.BIASES,
    "patternProperties": {"^[0-9]{1,9}$": NUMBERS["presence_penalty"]},
    "additionalProperties": False,
}
FORMAT = {
    "oneOf": [
        record({"type": {"enum": ["text", "json_object"]}}),
        record({"type": {"const": "json_schema"}, "json_schema": record({"schema": {"type": "object"}})}),
    ]
}
TEMPLATE = {
    "type": "object",
    "description": "variables of the model's chat template",
    "propertyNames": {"not": {"enum": sorted(checks.TEMPLATE_TAKEN)}},
    "additionalProperties": {"type": ["string", "boolean", "number"], "maxLength": checks.TEMPLATE_LENGTH},
}
OPTIONS = {
    "model": {"type": "string", "description": "of /v1/models, or default_model: this server has one"},
    "draft_model": {"const": "default_model"},
    "adapters": {"type": "null"},
    "stream": FLAG,
    "stream_options": record({}, {"include_usage": FLAG}),
    "stop": {"anyOf": [STOP, listed(STOP, maxItems=checks.STOPS)]},
    "logprobs": FLAG,
    "logit_bias": BIAS,
    "response_format": FORMAT,
    "chat_template_kwargs": TEMPLATE,
    "role_mapping": {"type": "object", "additionalProperties": TEXT},
    "tools": listed({"type": "object"}),
    **NUMBERS,
    "repetition_penalty": {"anyOf": [{"const": 0, "description": "none"}, NUMBERS["repetition_penalty"]]},
    **{name: {"enum": list(allowed)} for name, allowed in checks.UNHEEDED.items()},
}
PART = record({"type": {"const": "text"}, "text": TEXT})
CALL = record({"function": record({})})
MESSAGE = record(
    {"role": TEXT},
    {"content": or_null({"anyOf": [TEXT, listed(PART)]}), "tool_calls": or_null(listed(CALL))},
)
OPTIONAL = {name: or_null(schema) for name, schema in OPTIONS.items()}
PROMPT = {"type": "string", "minLength": 1, "description": "with the answer, at most the server's context of tokens"}

# ---- answers

USAGE = record(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {"prompt_tokens_details": record({"cached_tokens": COUNT})},
)
FINISH = {"enum": ["stop", "length", "tool_calls"]}
LOGPROBS = record({"content": listed({"type": "object"})})
SAID = record(
    {"role": {"const": "assistant"}, "content": {"type": ["string", "null"]}},
    {"reasoning": TEXT, "tool_calls": listed({"type": "object"})},
)


def answer(kind: str, what: Json) -> Json:
    """A whole answer: its one choice holds `what`."""
    choice = record({"index": {"const": 0}, "finish_reason": FINISH, **what}, {"logprobs": LOGPROBS})
    head = {"id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT}
    return record({**head, "choices": listed(choice, minItems=1, maxItems=1), "usage": USAGE})


EVENT = record({"data": TEXT})  # each of a stream: JSON, or [DONE]
MODEL = record({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT})
EXPERTS = record(
    {
        "model": TEXT,
        "layers": listed(record({"layer": COUNT, "experts": COUNT, "record_bytes": COUNT})),
        "state": listed({"type": "string", "pattern": "^[.rl]*$"}),
        "use": listed(listed(COUNT)),
        "stats": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
    }
)
SCHEMAS = {
    "Completion": record({"prompt": PROMPT}, OPTIONAL),
    "Chat": record({"messages": listed(MESSAGE, minItems=1)}, OPTIONAL),
    "CompletionAnswer": answer("text_completion", {"text": TEXT}),
    "ChatAnswer": answer("chat.completion", {"message": SAID}),
    "Model": MODEL,
    "Models": record({"object": {"const": "list"}, "data": listed(MODEL)}),
    "Experts": EXPERTS,
    "Health": record({"status": {"enum": ["ok", "unavailable"]}}),
    "Error": record({"error": record({"message": TEXT, "type": TEXT, "code": {"type": ["string", "null"]}})}),
}
REFUSALS = {
    400: "the request is not as it should be",
    401: "the key is missing or wrong",
    403: "this caller may not ask: the header Host or Origin names a stranger",
    404: "there is no such model or path",
    408: "the request did not come in time",
    411: "the request has no Content-Length",
    413: "the request is too large",
    500: "the answer could not be computed",
    501: "what was asked for is not installed, or not possible with this server's options",
    503: "too many requests wait, or the server stops; Retry-After says when to try again",
}


def responses(schema: Json, kind: str = "application/json", refusals: tuple[int, ...] = (400, 401, 403)) -> Json:
    found: Json = {"200": {"description": "the answer", "content": content(schema, kind)}}
    for status in refusals:
        found[str(status)] = {"description": REFUSALS[status], "content": content(reference("Error"))}
    if 503 in refusals:
        found["503"]["headers"] = {"Retry-After": {"schema": {"type": "string", "pattern": "^[0-9]+$"}}}
    return found


def fetched(name: str, summary: str, schema: Json, kind: str = "application/json", **more: Any) -> Json:
    """What GET gives."""
    return {"get": {"operationId": name, "summary": summary, "responses": responses(schema, kind), **more}}


def completed(name: str, summary: str, kind: str) -> Json:
    """What a completion takes and gives; with `stream` the answer comes in events, the last one is [DONE]."""
    found = responses(reference(f"{kind}Answer"), refusals=tuple(REFUSALS))
    found["200"]["content"] |= content(EVENT, "text/event-stream")
    body = {"required": True, "content": content(reference(kind))}
    return {"post": {"operationId": name, "summary": summary, "requestBody": body, "responses": found}}


ONE = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
PUBLIC: Json = {"security": []}
PATHS = {
    "/v1/completions": completed("complete", "continue a prompt", "Completion"),
    "/v1/chat/completions": completed("chat", "answer a conversation", "Chat"),
    "/chat/completions": completed("chatShort", "the same", "Chat"),
    "/v1/models": fetched("models", "this server's one model", reference("Models")),
    "/v1/models/{model}": fetched("model", "whether this is its name", reference("Model"), parameters=[ONE]),
    "/experts": fetched("experts", "which experts are in memory", reference("Experts")),
    "/metrics": fetched("metrics", "Prometheus figures", TEXT, "text/plain"),
    "/health": fetched("health", "whether it answers", reference("Health"), **PUBLIC),
    "/openapi.json": fetched("description", "this description", {"type": "object"}, **PUBLIC),
    "/": fetched("page", "a page to chat on", TEXT, "text/html", **PUBLIC),
}
PATHS["/v1/models/{model}"]["get"]["responses"] |= responses(MODEL, refusals=(404,))
PATHS["/health"]["get"]["responses"]["503"] = {
    "description": "generation has stopped",
    "content": content(reference("Health")),
}
DESCRIPTION = {
    "openapi": "3.1.0",
    "info": {
        "title": "tiny-qmoe-mlx",
        "version": __version__,
        "description": "OpenAI's API for one model. A key is asked for where the server was given one.",
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "servers": [{"url": "/"}],
    "security": [{"key": []}, {}],
    "paths": PATHS,
    "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
}
