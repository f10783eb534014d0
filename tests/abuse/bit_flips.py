"""Silent corruption: flips bits of a converted model's files, one at a time, and does worse to whole records and files.

    PYTHONPATH=tests python -m abuse.bit_flips --count 10000

Each time `verify` has to name the file, and the record where it is one; and a run has to stop with a sentence, or to
write the tokens that the whole model writes.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from abuse import models as tiny
from abuse import record
from tiny_qmoe_mlx import container, models, verify
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.plan import plan

PROMISE = "No flipped bit escapes verify, and none lets a run write a wrong token."
PART = 200  # flips of a part of a run
KINDS = (
    (r"model-experts-.*", "experts"),
    (r"model.*\.safetensors", "other weights"),
    (r"config\.json", "config"),
    (r"tiny_qmoe_manifest\.json", "manifest"),
    (r"tokenizer.*|chat_template.*|generation_config.*", "tokenizer and templates"),
    (r".*\.py", "model file"),
    (r".*", "card, pictures, quality"),
)
SENTENCE = re.compile(r"\[[^\]]+\] .+")


@dataclass
class Found:
    """Outcomes by kind of file, and what broke the promise."""

    outcomes: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, kind: str, named: bool, run: str, what: str) -> None:
        self.outcomes[kind, "tried"] += 1
        self.outcomes[kind, run] += 1
        if not named:
            self.broken.append(f"{what}: verify does not name it")
        if run == "wrong":
            self.broken.append(f"{what}: the run wrote other tokens")

    def rows(self) -> list[tuple[str, str, int]]:
        """The outcomes, as JSON can hold them."""
        return [(*key, count) for key, count in self.outcomes.items()]

    @staticmethod
    def of(rows: list[list], broken: list[str], seconds: float) -> "Found":
        """What `rows` and the other fields were."""
        return Found(Counter({(kind, key): count for kind, key, count in rows}), broken, seconds)

    def add(self, other: "Found") -> None:
        self.outcomes += other.outcomes
        self.broken += other.broken
        self.seconds += other.seconds


def kind_of(name: str) -> str:
    return next(kind for pattern, kind in KINDS if re.fullmatch(pattern, name))


def one_sentence(error: Exception) -> bool:
    """Whether an error is the package's own: one line that says where."""
    text = str(error)
    return isinstance(error, ValueError | OSError) and bool(SENTENCE.fullmatch(text)) and len(text) < 700


def problems(directory: Path) -> list[verify.Problem]:
    """What verify finds; a manifest that cannot be trusted ends it."""
    try:
        return list(verify.find_problems(directory))
    except ValueError as error:
        if not one_sentence(error):
            raise
        return [verify.Problem(container.MANIFEST, str(error))]


def outcome(run: Callable[[], list[int]], right: list[int]) -> str:
    """ "stopped" with a sentence, "same" tokens, or "wrong" ones; any other error is raised."""
    try:
        return "same" if run() == right else "wrong"
    except (ValueError, OSError) as error:
        if not one_sentence(error):
            raise
        return "stopped"


def is_named(found: list[verify.Problem], name: str, place: tuple[int, int] | None) -> bool:
    """Whether verify names the file, and of a record (decoder layer, expert) exactly that."""
    if place is not None:
        return [(p.file, p.layer, p.expert) for p in found] == [(name, *place)]
    return any(not name or p.file == name or f"[{name}]" in p.problem for p in found)


class Model:
    """A converted model, its files' sizes, and the tokens that it writes while it is whole."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.opened = container.open_model(directory, hash_files=True)
        self.sizes = {p.name: p.stat().st_size for p in sorted(directory.iterdir())}
        self.tokens = tiny.tokens(directory)
        assert not problems(directory)

    def place(self, name: str, byte: int) -> tuple[int, int] | None:
        """Decoder layer and expert of a byte of a record; None of any other."""
        for index, layer in enumerate(self.opened.spec.layers):
            expert = (byte - self.opened.record_offset(index, 0)) // layer.record_bytes
            if layer.file == name and 0 <= expert < layer.experts:
                return layer.layer, expert
        return None


@contextmanager
def flipped(path: Path, bit: int, quietly: bool = False) -> Iterator[None]:
    """A file with one bit flipped; quietly: without a new time, as a disk that rots."""

    def flip() -> None:
        before = path.stat()
        with open(path, "r+b", buffering=0) as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))
        if quietly:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    flip()
    try:
        yield
    finally:
        flip()


def choose(model: Model, pick: random.Random) -> tuple[str, int]:
    """A file and a bit of it: half of the time any bit of the directory, else one of any file."""
    names = list(model.sizes)
    by_size = pick.random() < 0.5
    name = pick.choices(names, [model.sizes[n] for n in names] if by_size else None)[0]
    return name, pick.randrange(8 * model.sizes[name])


def flip_bits(found: Found, model: Model, count: int, pick: random.Random) -> None:
    """Flip `count` bits, one at a time, and look at each with verify and with a run."""
    for i in range(count):
        name, bit = choose(model, pick)
        checks = ("first", "always")[i % 2]
        with flipped(model.directory / name, bit):
            named = is_named(problems(model.directory), name, model.place(name, bit // 8))
            run = outcome(partial(tiny.tokens, model.directory, checks), model.tokens)
        found.note(kind_of(name), named, run, f"bit {bit} of {model.directory}/{name}")


# ---- a disk that rots while the model runs


def rot(found: Found, model: Model, count: int, pick: random.Random) -> None:
    """Flip bits of records between two answers of a model that streams with every read checked."""
    least = plan(model.directory, context=512, probe=False)["min_budget_bytes"]
    streaming = models.Streaming(checks="always")
    loaded, tokenizer = models.load(model.directory, least, 512, streaming=streaming)

    def answer() -> list[int]:
        return [r.token for r in stream_generate(loaded, tokenizer, tiny.PROMPT, max_tokens=tiny.TOKENS)]

    with loaded:
        for _ in range(count):
            index = pick.randrange(len(model.opened.spec.layers))
            layer = model.opened.spec.layers[index]
            byte = model.opened.record_offset(index, pick.randrange(layer.experts)) + pick.randrange(layer.record_bytes)
            with flipped(model.directory / layer.file, 8 * byte + pick.randrange(8), quietly=True):
                run = outcome(answer, model.tokens)
            found.note("records, flipped while the model runs", True, run, f"byte {byte} of {layer.file}")


# ---- whole records and files


def damages(model: Model, other: Model) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """(what, file, how) of truncations, swapped records, swapped files and files of another model's."""
    for name, size in model.sizes.items():
        for kept in sorted({0, size // 2, size - 1}):
            yield f"{name} cut to {kept} bytes", name, partial(cut, name, kept)
        if name in other.sizes and (model.directory / name).read_bytes() != (other.directory / name).read_bytes():
            whole = name == container.MANIFEST  # which is sound in itself: verify names the files that are not its own
            how = partial(copy_from, other.directory, name)
            yield f"{name} of another model", "" if whole else name, how
    for index, layer in enumerate(model.opened.spec.layers):
        if layer.experts > 1:
            yield f"two records of {layer.file}", layer.file, partial(swap_records, model, index)
    weights = [n for n in model.sizes if re.fullmatch(r"model-(rest|experts).*\.safetensors", n)]
    for one, two in zip(weights, weights[1:], strict=False):
        yield f"{one} for {two}", one, partial(swap_files, one, two)


def cut(name: str, kept: int, directory: Path) -> None:
    os.truncate(directory / name, kept)


def copy_from(other: Path, name: str, directory: Path) -> None:
    shutil.copyfile(other / name, directory / name)


def swap_records(model: Model, index: int, directory: Path) -> None:
    """The first two records of a layer in each other's place; their checksums stay."""
    layer, start = model.opened.spec.layers[index], model.opened.record_offset(index, 0)
    data = bytearray((directory / layer.file).read_bytes())
    size = layer.record_bytes
    first, second = data[start : start + size], data[start + size : start + 2 * size]
    data[start : start + 2 * size] = second + first
    (directory / layer.file).write_bytes(data)


def swap_files(one: str, two: str, directory: Path) -> None:
    first, second = (directory / one).read_bytes(), (directory / two).read_bytes()
    (directory / one).write_bytes(second)
    (directory / two).write_bytes(first)


def damage(found: Found, model: Model, other: Model, scratch: Path) -> None:
    """Each of `damages`, on a copy."""
    for what, name, how in damages(model, other):
        copy = Path(shutil.copytree(model.directory, scratch / "copy"))
        how(copy)
        named = is_named(problems(copy), name, None)
        run = outcome(partial(tiny.tokens, copy), model.tokens)
        found.note("truncated, swapped, another model's", named, run, what)
        shutil.rmtree(copy)


# ---- the run


def parts(codecs: list[str], count: int) -> Iterator[tuple[str, int, int]]:
    """(codec, number, flips) of pieces of a run that can each be kept by itself."""
    each = -(-count // len(codecs))
    for codec in codecs:
        for number, start in enumerate(range(0, each, PART)):
            yield codec, number, min(PART, each - start)


def break_part(root: Path, codec: str, number: int, flips: int, seed: int) -> Found:
    """Flip bits, and let records rot; the first part of a codec also damages whole records and files."""
    found, pick = Found(), random.Random(f"{seed} {codec} {number}")
    model = Model(tiny.make(root, codec))
    flip_bits(found, model, flips, pick)
    rot(found, model, max(5, flips // 20), pick)
    if number == 0:
        damage(found, model, Model(tiny.make(root, codec, seed=1)), root)
    return found


def break_models(root: Path, codecs: list[str], count: int, seed: int, keep: Path | None = None) -> Found:
    """All parts, together; those whose outcome lies in `keep` are taken from there."""
    found = Found()
    for codec, number, flips in parts(codecs, count):
        kept = keep / f"{codec}-{number}-{flips}-{seed}.json" if keep else None
        if kept is None or not kept.exists():
            begun = time.monotonic()
            part = break_part(root, codec, number, flips, seed)
            part.seconds = time.monotonic() - begun
            if kept:
                kept.write_text(json.dumps([part.rows(), part.broken, part.seconds]))
        else:
            part = Found.of(*json.loads(kept.read_text()))
        found.add(part)
    return found


def figures(found: Found) -> dict[str, int]:
    """Counts for people, by kind of file."""
    kinds = sorted({kind for kind, _ in found.outcomes})
    words = {"tried": "tried", "stopped": "stopped with a sentence", "same": "same tokens"}
    return {f"{kind}: {words[key]}": found.outcomes[kind, key] for kind in kinds for key in words}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="bits to flip (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="go on with a run that was stopped: models and outcomes"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as own:
        root = args.keep or Path(own)
        root.mkdir(parents=True, exist_ok=True)
        found = break_models(root, list(tiny.MADE), args.count, args.seed, args.keep)
    files = {kind for _, kind in KINDS}
    flips = sum(n for (kind, key), n in found.outcomes.items() if key == "tried" and kind in files)
    shown = {"codecs": ", ".join(tiny.MADE), "bits flipped": flips, **figures(found)}
    for line in found.broken[:20]:
        print(line, file=sys.stderr)
    record.keep(4, "bit_flips", PROMISE, "abuse.bit_flips", found.seconds, shown, len(found.broken))
    return int(bool(found.broken))


if __name__ == "__main__":
    sys.exit(main())
