"""Sound model directories changed so that they would do harm: by code of their own, by names and links that lead out,
by numbers that a loader might take for true.
"""

import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from container_files import entry_of

from tiny_qmoe_mlx.container import MANIFEST

ORIGINAL, CONVERTED = "original", "converted"


@dataclass(frozen=True)
class Case:
    """base: which directory `change` damages; harmless: the commands do their work all the same; None: they may.
    blind: commands that never come to look at what was changed.
    """

    base: str
    change: Callable[[Path], None]
    harmless: bool | None = False
    blind: tuple[str, ...] = ()


BYTES = ("verify", "plan")  # look at bytes and headers, and at no tokenizer
PROMPTS = ("verify", "plan", "evaluate", "server")  # render no chat before somebody asks


# ---- edits


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; those that are ... are taken out."""

    def change(directory: Path) -> None:
        path = directory / name
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return change


def layer(**changes: Any) -> Callable[[Path], None]:
    """Set keys of the first expert layer in `tiny_qmoe`."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["tiny_qmoe"]["layers"][0] |= changes
        (directory / "config.json").write_text(json.dumps(config))

    return change


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_bytes(data))


def void(value: object) -> None:
    """A function's value that nobody wants."""


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda directory: void([change(directory) for change in changes])


def forge(directory: Path) -> None:
    """Make a converted directory's manifest agree with its files, one that it does not know among them."""
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        return
    manifest = json.loads(path.read_text())
    for file in directory.iterdir():
        listed = manifest["files"].get(file.name, {})
        if file.name != MANIFEST and file.is_file() and not file.is_symlink() and "header_bytes" not in listed:
            manifest["files"][file.name] = entry_of(file) if file.stat().st_size < 1 << 28 else listed
    manifest["self_xxh3_128"] = "0" * 32
    text = json.dumps(manifest)
    path.write_text(text.replace("0" * 32, xxhash.xxh3_128_hexdigest(text.encode())))


# ---- code to run


def evil(name: str) -> Callable[[Path], None]:
    """A Python file that leaves a mark beside the directory when it runs."""
    return lambda directory: void((directory / name).write_text(script(directory)))


def mark(directory: Path) -> Path:
    return directory.parent / "it-ran"


def script(directory: Path) -> str:
    classes = "class EvilTokenizer: pass\nclass Model: pass\nModelArgs = Model\n"
    return f"open({str(mark(directory))!r}, 'w').close()\n{classes}"


class Bomb:
    """Leaves the mark when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def pickled(name: str) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_bytes(pickle.dumps(Bomb(mark(directory)))))


AUTO = {"auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]}}
AUTO_CONFIG = {"auto_map": {"AutoConfig": "configuration_evil.Model", "AutoModelForCausalLM": "evil.Model"}}
TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('MARK') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('MARK') }}",
    "globals of lipsum": "{{ lipsum.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "a format that reaches in": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "attr": "{{ (messages|attr('__class__'))|attr('__base__') }}",
    "another file": "{% include '/etc/passwd' %}",
    "a change of the messages": "{{ messages.append({'role': 'user', 'content': 'MARK'}) }}",
    "a range without end": "{% for i in range(1000000000) %}x{% endfor %}",
    "half of a surrogate pair": r"{{ '\ud800' }}",
    "escapes in its refusal": "{{ raise_exception('\x1b]0;pwned\x07\\n\\nagain') }}",
    "no template": "{% for %}",
}
TAKEN: dict[str, bool | None] = {"classes": None}


def template(text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "chat_template.jinja").write_text(text.replace("MARK", f"touch {mark(directory)}"))

    return change


def code_cases() -> Iterator[tuple[str, Case]]:
    """Everything by which a model could have code of its own run."""
    unknown = {"tokenizer_class": "EvilTokenizer", **AUTO}
    for base in (ORIGINAL, CONVERTED):
        yield f"{base}: model_file", Case(base, both(edit("config.json", model_file="evil.py"), evil("evil.py")))
        yield f"{base}: model_file outside", Case(base, edit("config.json", model_file="../it.py"))
        named = both(edit("tokenizer_config.json", **unknown), evil("tokenization_evil.py"))
        yield f"{base}: a tokenizer of its own", Case(base, named, harmless=None)
        away = {**unknown, "auto_map": {"AutoTokenizer": [None, "org/evil--tokenization_evil.EvilTokenizer"]}}
        yield f"{base}: a tokenizer of another repository", Case(base, edit("tokenizer_config.json", **away), None)
        beside = both(edit("tokenizer_config.json", **AUTO), evil("tokenization_evil.py"))
        yield f"{base}: a tokenizer of its own beside a known one", Case(base, beside, harmless=True)
        own = both(edit("config.json", **AUTO_CONFIG), evil("configuration_evil.py"), evil("evil.py"))
        yield f"{base}: a config class of its own", Case(base, own, harmless=True)
        for name in ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "model.pt", "optimizer.joblib"):
            yield f"{base}: {name}", Case(base, pickled(name), harmless=True)
        yield f"{base}: weights that are a pickle", Case(base, pickled("model-00009.safetensors"))
        for key in ("chat_template_type", "tool_parser_type"):
            for value in ("/tmp/evil", "../../evil", ".evil", "os"):
                yield f"{base}: {key} {value}", Case(base, edit("tokenizer_config.json", **{key: value}), blind=BYTES)
        for value in ("../evil", "/tmp/evil", "os", "evil", "__init__", "..evil"):
            change = both(edit("config.json", model_type=value), evil("evil.py"))
            yield f"{base}: model_type {value}", Case(base, change, blind=BYTES)
    yield "converted: other text in our own file", Case(CONVERTED, evil("tiny_qmoe_model.py"))


# ---- paths


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def unix_socket(directory: Path) -> None:
    where = os.open(directory, os.O_RDONLY)
    try:  # by the descriptor: a socket's path may have no more than a hundred characters
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{where}/chat_template.jinja.sock")
    finally:
        os.close(where)


def folder(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """The manifest speaks of a file under another name."""

    def change(directory: Path) -> None:
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["files"][new] = manifest["files"].pop(old)
        path.write_text(json.dumps(manifest))

    return change


def path_cases() -> Iterator[tuple[str, Case]]:
    """Names and links that lead out of the directory, and things that are no files."""
    outside = {"index.json": "/etc/passwd", "tokenizer.json": "/etc/passwd", "LICENSE": "/etc/passwd"}
    for base in (ORIGINAL, CONVERTED):
        for name, target in outside.items():
            yield f"{base}: {name} links to {target}", Case(base, link(name, target))
        yield f"{base}: config.json links out", Case(base, link("config.json", "../other.json"))
        yield f"{base}: weights link out", Case(base, link("model-00007.safetensors", "/etc/passwd"))
        yield f"{base}: a folder of templates links out", Case(base, link("additional_chat_templates", "/etc"))
        yield f"{base}: a link to itself", Case(base, link("tokenizer.json", "tokenizer.json"))
        yield f"{base}: weights are a device", Case(base, link("model-00007.safetensors", "/dev/zero"))
        for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model-00007.safetensors", "notes"):
            yield f"{base}: {name} is a pipe", Case(base, fifo(name))
        for name in ("config.json", "tokenizer.json", "model-00007.safetensors"):
            yield f"{base}: {name} is a folder", Case(base, folder(name))
        if sys.platform == "linux":
            yield f"{base}: a socket", Case(base, unix_socket)
        index = {"weight_map": {"model.norm.weight": "../../etc/passwd", "a": "/etc/passwd", "b": "a\0b"}}
        map = put("model.safetensors.index.json", json.dumps(index).encode())
        yield f"{base}: an index that leads out", Case(base, map, harmless=True)
    for name in ("../tokenizer.json", "/etc/passwd", "a\0b", "..", "a/b", "a\\b", "", "a\nb"):
        yield f"converted: the manifest lists {name!r}", Case(CONVERTED, renamed("tokenizer.json", name))
    yield "converted: an experts file that leads out", Case(CONVERTED, layer(file="../model-experts-00000.safetensors"))
    yield "converted: the manifest links out", Case(CONVERTED, link(MANIFEST, "/etc/passwd"))
    yield "converted: the manifest is a pipe", Case(CONVERTED, fifo(MANIFEST))
    extra = put("generation_config.json", b'{"eos_token_id": 1}')
    yield "converted: a template that the manifest does not list", Case(CONVERTED, unlisted("chat_template.json"))
    yield "converted: a generation config that it lists", Case(CONVERTED, extra, harmless=True)


def unlisted(name: str) -> Callable[[Path], None]:
    """A file that nothing makes the manifest know, since it is put there afterwards."""
    return lambda directory: void((directory / f".late-{name}").write_text("{}"))


# ---- sizes


def header(text: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    """Weights whose header says this."""
    size = len(text) if length is None else length
    return put("model-00007.safetensors", (size % 2**64).to_bytes(8, "little") + text + data)


def tensors(**entries: tuple[str, list[int], list[int]]) -> Callable[[Path], None]:
    """Weights whose header has these (dtype, shape, data_offsets), and no data."""
    words = {n: dict(zip(("dtype", "shape", "data_offsets"), e, strict=True)) for n, e in entries.items()}
    return header(json.dumps(words).encode())


def again(name: str, copy: str) -> Callable[[Path], None]:
    """A file of weights a second time, beside the first: a stale shard, a consolidated copy."""
    return lambda directory: void(shutil.copyfile(directory / name, directory / copy))


def tiny(count: int, files: int = 1) -> Callable[[Path], None]:
    """Weights of so many empty tensors, in several files."""

    def change(directory: Path) -> None:
        for number in range(files):
            names = range(number * count // files, (number + 1) * count // files)
            words = {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in names}
            text = json.dumps(words, separators=(",", ":")).encode()
            (directory / f"model-{7000 + number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        with open(directory / name, "wb") as file:
            file.truncate(size)

    return change


def size_cases() -> Iterator[tuple[str, Case]]:
    """Numbers that a loader might take for true."""
    for base in (ORIGINAL, CONVERTED):
        for key in ("num_hidden_layers", "num_experts", "hidden_size", "num_attention_heads", "head_dim", "vocab_size"):
            for value in (10**9, 2**31, 2**63, 10**300, -1, 1.5, True, "three", None, [3], {"a": 3}):
                huge = isinstance(value, int) and value >= 10**9
                change = edit("config.json", **{key: value})
                yield f"{base}: {key} {str(value)[:20]}", Case(base, change, False if huge else None)
        deep = b'{"model_type": "qwen3_moe", "a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
        yield f"{base}: a config nested 10,000 deep", Case(base, put("config.json", deep))
        nested = b'{"model_type": "qwen3_moe", "a": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}"
        yield f"{base}: a config nested 200 deep", Case(base, put("config.json", nested))
        yield f"{base}: a config of 1 GB", Case(base, sparse("config.json", 1 << 30))
        yield f"{base}: a config of 60 MB of zeros", Case(base, put("config.json", b"[" + b"0," * (30 << 20) + b"0]"))
        yield f"{base}: a tokenizer of 1 GB", Case(base, sparse("tokenizer.json", 1 << 30))
        deeper = put("tokenizer_config.json", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
        yield f"{base}: a tokenizer config nested 100,000 deep", Case(base, deeper, blind=BYTES)
        for length in (0, 1, 2**31, 2**63, 2**64 - 1):
            yield f"{base}: a header of {length} bytes", Case(base, header(b"{}", length))
        yield f"{base}: a header nested deep", Case(base, header(b"[" * 100_000 + b"]" * 100_000))
        yield f"{base}: a header that is a list", Case(base, header(b"[1, 2]"))
        yield f"{base}: overlapping tensors", Case(base, tensors(a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])))
        yield f"{base}: an unknown type", Case(base, tensors(a=("F99", [4], [0, 4])))
        yield f"{base}: a shape that overflows", Case(base, tensors(a=("F32", [2**31 - 1] * 5, [0, 4])))
        yield f"{base}: a side of 2^62", Case(base, tensors(a=("U8", [2**62, 4, 0], [0, 0])))
        yield f"{base}: a negative side", Case(base, tensors(a=("U8", [-1, -4], [0, 4])))
        yield f"{base}: offsets that run backwards", Case(base, tensors(a=("U8", [4], [4, 0])))
        name = "model.safetensors" if base == ORIGINAL else "model-rest.safetensors"
        yield f"{base}: weights that stand in two files", Case(base, again(name, "model-old.safetensors"))
        yield f"{base}: a header of 500,000 tensors", Case(base, tiny(500_000))
        yield f"{base}: 300,000 tensors in three files", Case(base, tiny(300_000, 3))
        zeros = header(b'{"a":{"dtype":"U8","shape":[' + b"0," * (15 << 20) + b'0],"data_offsets":[0,0]}}')
        yield f"{base}: a header of 30 MB of zeros", Case(base, zeros)
        yield f"{base}: data beyond the file", Case(base, tensors(a=("U8", [2**40], [0, 2**40])))
    for key, values in {
        "record_bytes": (0, -128, 2**31 + 128, 2**40, 1.5, True, "4096"),
        "experts": (0, -1, 65537, 2**31, 2**63, 1.5, True),
        "layer": (-1, 2048, 2**31), "slot_bytes": (128, 2**40), "path": ("", "a" * 300, "../x", "x\0"),
        "matrices": ([], [["fc1", 2**31, 1]], [["gate_proj", 1, 1]] * 5000, "x"),
    }.items():  # fmt: skip
        for value in values:
            yield f"converted: {key} {str(value)[:20]}", Case(CONVERTED, layer(**{key: value}))


# ---- what libraries trip over

POST = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
POST["single"] = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
PANICS = {  # of tokenizers, in Rust: no `Exception` in Python
    "cuts of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a map of characters that leads out": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}
    },
    "a map of characters that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "nothing replaced": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}},
    "a special token that is not there": {"post_processor": POST},
}


def one_id(directory: Path) -> None:
    """A vocabulary whose tokens all have the same number, so that it has holes."""
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] = dict.fromkeys(value["model"]["vocab"], 3)
    path.write_text(json.dumps(value))


def library_cases() -> Iterator[tuple[str, Case]]:
    """Files that are read, and that a library trips over or quotes."""
    plain = (*BYTES, "convert")  # no tokens without a calibration
    for base in (ORIGINAL, CONVERTED):
        for what, change in PANICS.items():
            yield f"{base}: a tokenizer with {what}", Case(base, edit("tokenizer.json", **change), blind=plain)
        other = edit("tokenizer_config.json", tokenizer_class="BertTokenizer")
        yield f"{base}: a tokenizer of another class", Case(base, other, None)
        for value in ("x", 5, [1], True):
            yield f"{base}: text_config {value}", Case(base, edit("config.json", text_config=value))
        for value in ("x", [1]):
            yield (
                f"{base}: rope_theta {value}",
                Case(base, edit("config.json", rope_theta=value), blind=(*plain, "server")),
            )
        quoted = {"a": "a" * 100_000, "escapes": "\x1b]0;pwned\x07"}
        for what, text in quoted.items():
            yield f"{base}: a model_type of {what}", Case(base, edit("config.json", model_type=text), blind=BYTES)
        yield (
            f"{base}: an unknown rope_scaling",
            Case(base, edit("config.json", rope_scaling={"rope_type": "evil"}), None),
        )
        yield f"{base}: eos_token_id -5", Case(base, edit("config.json", eos_token_id=-5), None)
    holes = (*PROMPTS, "convert", "evaluate")
    yield "converted: a vocabulary with holes", Case(CONVERTED, one_id, blind=holes)


def cases() -> dict[str, Case]:
    """All of them."""
    found = dict([*code_cases(), *path_cases(), *size_cases(), *library_cases()])
    for what, text in TEMPLATES.items():
        found[f"{CONVERTED}: a template with {what}"] = Case(CONVERTED, template(text), TAKEN.get(what, False), PROMPTS)
    return found
