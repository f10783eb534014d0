"""The skeleton of a converted model on the hub: opens and plans like the model, of headers alone."""

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
import records

from tiny_qmoe_mlx import budget, container
from tiny_qmoe_mlx.hub import headers

pytest_plugins = ["command_fixtures", "hub_server"]
REST, EXPERTS = "model.safetensors", "model-experts-00000.safetensors"
MAKE = """
import json
from tiny_qmoe_mlx.hub.headers import skeleton
"""
ONE = MAKE + 'print(skeleton("org/name", None, Path("skeleton"), quiet=True))'
EVERY = (
    MAKE
    + """
for model in sys.argv[1:]:
    try:
        found = str(skeleton(model, None, Path("skeletons") / model))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps([model, found]))
"""
)


@pytest.fixture
def big(hub, tmp_path) -> Path:
    """Two experts files of 40 MB, on the hub."""
    directory = tmp_path / "big"
    records.write_model(directory, hidden=256, width=512, experts=96, layers=2, alignment=4096, rates=[4] * 20)
    hub.repositories["org/name"] = directory
    return directory


@pytest.fixture
def small(tmp_path) -> Path:
    """A model of a few records, to damage copies of."""
    records.write_model(tmp_path / "small")
    return tmp_path / "small"


def header_bytes(file: Path) -> int:
    with open(file, "rb") as handle:
        return 8 + struct.unpack("<Q", handle.read(8))[0]


def same_plan(directory: Path, found: Path) -> None:
    """Everything that `plan` takes from the files, of the model and of its skeleton."""
    whole, bones = container.open_model(directory), container.open_model(found)
    assert bones.files == whole.files and bones.spec == whole.spec and bones.config == whole.config
    assert {**container.sizes(found), "path": ""} == {**container.sizes(directory), "path": ""}
    enough = budget.split(whole, sys.maxsize, 128)
    for memory in (sys.maxsize, enough.min_budget_bytes):
        for cpu in (True, False):
            memory = max(memory, budget.split(whole, sys.maxsize, 128, cpu).min_budget_bytes)
            assert budget.split(bones, memory, 128, cpu) == budget.split(whole, memory, 128, cpu)


def weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_headers_alone_of_a_large_model(hub, script, big, tmp_path):
    """Of each weights file its header is sent, to the byte, and nothing else is."""
    done = script(ONE)
    assert done.status == 0 and done.err == "" and done.out == "skeleton\n", done
    same_plan(big, tmp_path / "skeleton")
    assert {f.name: hub.served[f.name] for f in weights(big)} == {f.name: header_bytes(f) for f in weights(big)}
    assert hub.sent < 50_000 < sum(f.stat().st_size for f in weights(big)) / 1000
    for file in weights(big):
        bones, count = (tmp_path / "skeleton" / file.name).read_bytes(), header_bytes(file)
        with open(file, "rb") as handle:
            assert bones[:count] == handle.read(count) and not any(bones[count:]), file
    taken = sum(f.stat().st_blocks * 512 for f in weights(tmp_path / "skeleton"))
    assert taken <= sum(header_bytes(f) + 16384 for f in weights(big)), "sparse"


def test_a_converted_model_of_many_files(hub, script, converted, tmp_path):
    """As the convert command leaves it: tokenizer, model card, weights of each layer by themselves."""
    hub.repositories["org/name"] = converted
    done = script(ONE)
    assert done.status == 0 and done.err == "", done
    same_plan(converted, tmp_path / "skeleton")
    assert {f.name: hub.served[f.name] for f in weights(converted)} == {
        f.name: header_bytes(f) for f in weights(converted)
    }
    for name in ("config.json", "tokenizer.json", container.MANIFEST):
        assert (tmp_path / "skeleton" / name).read_bytes() == (converted / name).read_bytes()


def test_what_passes_is_asked_for_again(hub, script, big, tmp_path):
    hub.failures = {
        rf"GET .*resolve/.*{EXPERTS}": [503, 2],
        rf"GET .*resolve/.*/{REST}": [0, 2],
    }
    done = script(ONE)
    assert done.status == 0 and done.err == "", done
    same_plan(big, tmp_path / "skeleton")
    assert [left for _, left in hub.failures.values()] == [0, 0]


# ---- refused


def set_length(file: Path, length: int) -> None:
    with open(file, "r+b") as handle:
        handle.write(struct.pack("<Q", length))


def resize(file: Path, change: int) -> None:
    os.truncate(file, file.stat().st_size + change)


DAMAGE = {  # name -> what is done to a repository, and what is said of it
    "absurd": (
        lambda d: set_length(d / EXPERTS, 2**63),
        rf"{EXPERTS} should begin .* it says {2**63};",
    ),
    "none": (lambda d: set_length(d / REST, 0), rf"{REST} should begin with the length .*, it says 0; it is damaged"),
    "beyond": (
        lambda d: set_length(d / REST, (d / REST).stat().st_size - 7),
        rf"{REST} should begin with the length of its header, 2 to \d+ bytes, it says \d+; .* upload the model again",
    ),
    "short": (lambda d: resize(d / EXPERTS, -1), rf"{EXPERTS} should have (\d+) bytes, has \d+ on the hub; upload"),
    "long": (lambda d: resize(d / REST, 8), rf"{REST} should have \d+ bytes, has \d+ on the hub; upload"),
    "edited": (lambda d: resize(d / "tokenizer.json", 1), r"tokenizer.json should have \d+ bytes, has \d+ on the hub"),
    "lacking": (
        lambda d: (d / EXPERTS).unlink(),
        rf"{EXPERTS} should have \d+ bytes, the hub does not have it",
    ),
    "stray": (
        lambda d: (d / "model-x.safetensors").write_bytes(b"x"),
        "model-x.safetensors on the hub does not",
    ),
    "unfinished": (lambda d: (d / container.MANIFEST).unlink(), "has no tiny_qmoe_manifest.json, so it was not"),
    "empty": (
        lambda d: [f.rename(f.with_suffix(".txt")) for f in d.glob("*.json")],
        "is no model: it has no config.json",
    ),
    "manifest": (lambda d: (d / container.MANIFEST).write_text("{}"), "does not have the hash that it says"),
}


def test_damaged_repositories(hub, script, small, tmp_path):
    """One sentence each, and of no file more than its header is sent."""
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(small, tmp_path / "damaged" / name)
        damage(tmp_path / "damaged" / name)
        hub.repositories[f"org/{name}"] = tmp_path / "damaged" / name
    hub.repositories["org/gated"] = (403, "GatedRepo")
    said = {"gated": "needs a login and accepted terms", "missing": "is no directory here and not on the hub"}
    said |= {name: message for name, (_, message) in DAMAGE.items()}
    done = script(EVERY, *(f"org/{name}" for name in said))
    assert done.status == 0 and done.err == "", done
    found = dict(map(json.loads, done.out.splitlines()))
    for name, message in said.items():
        assert re.match(r"FormatError: \[", found[f"org/{name}"]), (name, found)
        assert re.search(message, found[f"org/{name}"]) and "\n" not in found[f"org/{name}"], (name, found)
        assert name in found[f"org/{name}"], "says which model"
    sent = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert all(count <= len(said) * header_bytes(small / name) for name, count in sent.items()), sent


def test_an_absurd_length_is_not_asked_for(hub, script, big):
    """A length that fits in the file but not in the format: its eight bytes are all that is sent of it."""
    set_length(big / EXPERTS, container.MAX_HEADER + 1)
    refused = script(ONE)
    assert f"2 to {container.MAX_HEADER} bytes, it says {container.MAX_HEADER + 1}" in refused.err, refused
    assert hub.served[EXPERTS] == 8


def test_an_original_checkpoint_is_to_be_converted(hub, script, checkpoint):
    """By the id that it has on the hub; its weights' headers are not fetched."""
    hub.repositories["org/name"] = checkpoint
    refused = script(ONE)
    command = "python -m tiny_qmoe_mlx.convert --hf-path org/name --mlx-path name-tiny-qmoe --bits 2.0"
    assert refused.status == 1 and len(refused.err.splitlines()) == 1, refused
    assert f"is an unconverted checkpoint; convert it first: {command}" in refused.err
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("broken", r"\[model\] org/name is no directory here, and the hub could not be asked: .*(bytes|peer|body)"),
        ("whole", rf"{EXPERTS} should come in parts, bytes 0-7/\d+ were asked for and the whole file offered; see"),
        ("offline", r"\[model\] org/name is no directory here, and the hub could not be asked: "),
    ],
)
def test_answers_that_cannot_be_used(hub, script, big, trouble, message):
    """An answer that ends early (each time), one that is the whole file, and none."""
    if trouble != "offline":
        setattr(hub, trouble, EXPERTS)
    refused = script(ONE, **({"HF_HUB_OFFLINE": "1"} if trouble == "offline" else {}))
    assert refused.status == 1 and len(refused.err.splitlines()) == 1, refused
    assert re.search(message, refused.err), refused.err


@pytest.mark.parametrize("model", ["no id", "../up", __file__])
def test_what_is_no_id(script, model, hub):
    refused = script(MAKE + "skeleton(sys.argv[1], None, Path('skeleton'))", model)
    assert refused.status == 1 and "[model]" in refused.err and not hub.requests, refused


@pytest.mark.parametrize("reader", ["iter_bytes", "iter_content"])  # of httpx, and of requests
def test_a_body_of_another_length_than_it_said(reader):
    """As with an answer that names no length: what is short is refused, what goes on is not read to its end."""
    read: list[bytes] = []

    def answer(pieces: list[bytes]):
        read.clear()
        return type("Answer", (), {reader: lambda self, *size: (read.append(p) or p for p in pieces)})()

    assert headers._body(answer([b"ab", b"cd"]), 4, "file") == b"abcd"
    for pieces, taken in (([b"ab"], 1), ([b"abc", b"de", b"f", b"g"], 2)):
        with pytest.raises(ConnectionError, match=r"file: 4 bytes were asked for, \d or more came"):
            headers._body(answer(pieces), 4, "file")
        assert len(read) == taken
