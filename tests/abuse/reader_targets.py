"""Every reader of a file, or of a text, that a stranger may have made: seeds for each, and how it is called.

A reader gets bytes. It may return anything, or raise the package's own error with a sentence; the fuzzer judges.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import records
from safetensors.numpy import save_file

from abuse import mutate
from abuse.model_targets import (
    Target,
    config,
    experts_header,
    hub_header,
    hub_listing,
    is_json,
    manifest,
    model_py,
    original,
    record_of,
    shard_notes,
    tuple_table,
    weights,
)
from tiny_qmoe_mlx import (
    chat,
    config_file,
    container,
    generate_options,
    plain_files,
)
from tiny_qmoe_mlx.budget import parse_memory
from tiny_qmoe_mlx.conversion import text, unfinished
from tiny_qmoe_mlx.report import card, write
from tiny_qmoe_mlx.serving import checks, options, schema
from tiny_qmoe_mlx.streaming import profile, trace

# ---- a run's own files


def traces(root: Path) -> Target:
    header = trace.header({"model": "a/b", "experts": [8, 4], "config": "00ff"}, [8, 4], [1024, 2048])
    lines = [json.dumps(header), "0 0 p 1,2", "0 0 p 3,4", "0 1 d 0,3", "1 0 d 7,6", ""]
    file = root / "trace"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        trace.read_trace(file)

    return Target(["\n".join(lines).encode()], read, (mutate.lines, mutate.lines, mutate.byte))


def profiles(root: Path) -> Target:
    opened = container.open_model(root / "model")
    file = root / "profile.json"
    profile.save_profile(file, opened, [np.array([5, 0, 9], np.int64)] * 2, 12)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        profile.load_profile(file, opened)

    return Target([file.read_bytes()], read)


def state(root: Path) -> Target:
    place = root / "partial"
    place.mkdir()
    save_file({"a": np.zeros(4, np.float32)}, place / "model-rest.safetensors")
    unfinished.save_state(place, 1, [{"layer": 0, "bits": 2.0}], {"x": np.zeros((2, 3), np.float32)})

    def read(data: bytes) -> None:
        (place / unfinished.STATE).write_bytes(data)
        unfinished.load_state(place)

    return Target([(place / unfinished.STATE).read_bytes()], read, (mutate.safetensors,))


def plans(root: Path) -> Target:
    asked = {"settings": {"bits": 2.0, "codec": "trellis"}, "source": {"model": "a/b", "revision": None}}
    file = root / unfinished.PLAN

    def read(data: bytes) -> None:
        file.write_bytes(data)
        unfinished.agree(root, asked, dict)

    return Target([json.dumps({**asked, "made": {"layers": []}}).encode()], read)


def kept_tokens(root: Path) -> Target:
    file = root / unfinished.TOKENS
    np.save(file, np.arange(12, dtype=np.int32).reshape(3, 4))

    def read(data: bytes) -> None:
        file.write_bytes(data)
        unfinished.kept_tokens(root, lambda: None)

    return Target([file.read_bytes()], read, (mutate.byte,))


# ---- texts of a person's, or of anybody's


def words() -> Any:
    """A tokenizer of bytes whose chat template is a real one."""
    import jinja2.sandbox

    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if tools %}{{ tools[0]['n'] }}{% endif %}"
    )
    return SimpleNamespace(
        has_chat_template=True,
        encode=lambda text, **how: list(text.encode()),
        apply_chat_template=lambda messages, tools=None, tokenize=False: template.render(
            messages=messages, tools=tools
        ),
    )


def chats(root: Path) -> Target:
    rows = [
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "tools": [{"n": 1}],
        },
        {"prompt": "a", "completion": "b"},
        {"text": "words and more words"},
    ]
    file, tokenizer = root / "chats.jsonl", words()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        ids = text.chat_tokens(file, tokenizer)
        text.token_batch(ids, 2, 8, "chats")

    return Target(["\n".join(map(json.dumps, rows)).encode()], read, (mutate.lines, mutate.lines, mutate.byte))


def plain_text(root: Path) -> Target:
    file = root / "text.txt"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        text.token_batch(list(text.read_text(file).encode()), 2, 8, "text")

    return Target(["Größe and 文字 and words".encode()], read, (mutate.byte,))


def conversations(root: Path) -> Target:
    file = root / "chat.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        chat.read_messages(file)

    return Target([b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}'], read)


def cards(root: Path) -> Target:
    """A model card and quality.json: read for a new card, never refused."""
    opened = container.open_model(root / "model")

    def read(data: bytes) -> None:
        (root / card.CARD).write_bytes(data)
        (root / write.QUALITY).write_bytes(data)
        metadata = card.front_matter(root, opened.spec.source["model"])
        card.merge(data.decode(errors="replace"), card.front_text(metadata), "x")
        found = write.read_quality(root)
        assert isinstance(found, dict)

    seed = b"---\nlicense: mit\nlanguage: [en]\nbase_model: a/b\n---\n# Name\n" + f"{card.BEGIN}\n{card.END}\n".encode()
    return Target(
        [seed, b'{"kl": {"mean": 1.0}, "layers": [{"layer": 0, "kl": 0.1}]}'], read, (mutate.byte, mutate.jsons)
    )


# ---- requests and options


REQUESTS = (
    {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0.5},
    {"prompt": "x", "stop": ["a", "b"], "logit_bias": {"5": -1}, "seed": 3, "top_k": 4, "n": 1, "stream": True},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "tool", "content": "b"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False}, "stream_options": {"include_usage": True},
    },
    {"prompt": "x",
     "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
     "max_completion_tokens": 9},
    {"messages": [{"role": "u", "content": "x"}], "role_mapping": {"u": "y", "stop": "z"}, "repetition_penalty": 0,
     "temperature": 1, "xtc_probability": 1, "xtc_threshold": 0.5, "logprobs": True, "top_logprobs": 5},
)  # fmt: skip


def requests(root: Path) -> Target:
    def read(data: bytes) -> None:
        body = checks.parse(data)
        checks.check(body, 258)
        checks.check_prompt(body, "messages" in body)
        schema.schema_of(body.get("response_format"))

    return Target([json.dumps(r).encode() for r in REQUESTS], read)


def memory(root: Path) -> Target:
    seeds = [b"6GB", b"60%", b"auto", b"512MiB", b"1234567", b"1.5 GB"]
    return Target(seeds, lambda data: parse_memory(data.decode(errors="surrogateescape"), 1 << 34), (mutate.byte,))


def template_options(root: Path) -> Target:
    def read(data: bytes) -> None:
        given = data.decode(errors="surrogateescape")
        generate_options._template_config(given)
        options.template_args(given)

    return Target([b'{"enable_thinking": false}', b'{"x": [1, 2, {"y": null}]}'], read)


def api_keys(root: Path) -> Target:
    file = root / "key"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        options.api_key(str(file))

    return Target([b"a-key-of-mine\n"], read, (mutate.byte,))


def flags(root: Path) -> Target:
    """A command line, one word a line."""

    def read(data: bytes) -> None:
        given = data.decode(errors="surrogateescape").replace("\0", "?").split("\n")
        with quiet():
            args = generate_options.parse(["--model", "x", *given])
            generate_options.prompt_text(args)

    seeds = [b"--prompt\nx\n--max-tokens\n5\n--temp\n0.5", b"--prompt\nx\n--memory\n6GB\n--context\n512\n--readers\n2"]
    return Target(seeds, read, (mutate.lines, mutate.byte))


@contextmanager
def quiet() -> Iterator[None]:
    """argparse ends the process and prints: here it raises what the package would say."""

    def say(self: argparse.ArgumentParser, status: int = 0, message: str | None = None) -> None:
        raise ValueError(f"[options] {message or 'help'}")

    with (
        mock.patch.object(argparse.ArgumentParser, "exit", say),
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda self: None),
    ):
        yield


def directories(root: Path) -> Target:
    """Names in a model's directory."""
    place = root / "names"
    place.mkdir()

    def read(data: bytes) -> None:
        name = data.replace(b"\0", b"").replace(b"/", b"")[:200]
        if name in (b"", b".", b".."):
            return
        path = Path(place, name.decode(errors="surrogateescape"))
        path.write_bytes(b"x")
        try:
            plain_files.check_directory(place)
        finally:
            path.unlink()

    return Target([b"config.json", b"model.safetensors", b"additional_chat_templates"], read, (mutate.byte,))


def bounds(root: Path) -> Target:
    """Numbers of a config, without a file."""
    seeds = [json.dumps({"num_hidden_layers": 3, "a": {"num_experts": 8, "head_dim": [4, {"vocab_size": 9}]}}).encode()]

    def read(data: bytes) -> None:
        found = json.loads(data)
        if isinstance(found, dict):
            config_file.check(found)

    return Target(seeds, lambda data: read(data) if is_json(data) else None, (mutate.jsons,))


MAKERS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest, "config": config, "experts_header": experts_header, "model_py": model_py,
    "tuple_table": tuple_table, "record_trellis": record_of("trellis"), "record_qmoe": record_of("qmoe"),
    "record_affine": record_of("affine"), "original": original, "weights": weights, "hub_header": hub_header,
    "hub_listing": hub_listing, "shard_notes": shard_notes, "traces": traces, "profiles": profiles, "state": state,
    "plans": plans, "kept_tokens": kept_tokens, "chats": chats, "plain_text": plain_text,
    "conversations": conversations, "cards": cards, "requests": requests, "memory": memory,
    "template_options": template_options, "api_keys": api_keys, "flags": flags, "directories": directories,
    "bounds": bounds,
}  # fmt: skip


def make(name: str, root: Path) -> Target:
    """A target with its files below `root`, a directory of its own."""
    records.write_model(root / "model")
    return MAKERS[name](root)


def draw(target: Target, pick: random.Random, seeds: list[bytes]) -> bytes:
    """One input: a seed after one mutation or a few."""
    data = pick.choice(seeds)
    for _ in range(pick.choice((1, 1, 1, 2, 5))):
        data = pick.choice(target.change)(data, pick)
    return data
