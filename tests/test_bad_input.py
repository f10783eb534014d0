"""Every bad input of the commands: one sentence on stderr, exit status not 0, no traceback, nothing half-written.

What container, staging and terminal refuse by themselves is tested beside them; here a person's command lines are.
"""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from commands import FILES, names, process, refusal

from tiny_qmoe_mlx import container, container_writer, native, spec

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
EXPERTS = "model-experts-00002.safetensors"
MANIFEST = "tiny_qmoe_manifest.json"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ---- command lines

NO_MODEL = {
    "nowhere": "should be a directory with config.json, or a hub id such as org/name; no such directory",
    "/nowhere/at/all": "should be a directory with config.json, or a hub id",
    "a.file": "should be a directory, it is a file",
    "empty": "config.json",
    "other-json": "unconverted checkpoint; convert it first|should be an object with a model_type",
    "other-text": "should be (a )?JSON",
    "unfinished": "has no tiny_qmoe_manifest.json, so it was not finished or not copied whole",
    "org/name": "org/name is no directory here, and the hub could not be asked: ",
    "loop": "should be a directory with config.json, or a hub id",
    "~nobody-of-this-name/model": "should be a directory with config.json, or a hub id",
    "''": "cannot be looked at|is a link that leaves the model's directory",  # the directory that we are in
}


@pytest.fixture(scope="session")
def place(tmp_path_factory, converted, checkpoint, text) -> Path:
    """A directory with all that the command lines below name."""
    root = tmp_path_factory.mktemp("place")
    for name in ("empty", "other-json", "other-text", "unfinished", "foreign"):
        (root / name).mkdir()
    (root / "a.file").write_text("not a model")
    (root / "other-json" / "config.json").write_text('{"a": 1}')
    (root / "other-text" / "config.json").write_text("hello")
    (root / "unfinished" / "config.json").write_text('{"model_type": "qwen3_moe", "tiny_qmoe": {}}')
    (root / "foreign" / "thesis.tex").write_text("years of work")
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n\n ")
    (root / "short.txt").write_text("too short")
    (root / "binary.bin").write_bytes(random.Random(0).randbytes(3000))
    (root / "nul.txt").write_bytes(b"abc\0def")
    (root / "long.txt").write_text("long " * 300)
    (root / "loop").symlink_to("loop")
    for name, target in (("converted", converted), ("checkpoint", checkpoint), ("text.txt", text)):
        (root / name).symlink_to(target)
    return root


RUN = "generate --model converted --prompt x"
CONVERT = "convert --hf-path checkpoint --mlx-path new --calibration text.txt"
REFUSED = [
    *((f"{command} --model {name}", message) for name, message in NO_MODEL.items()
      for command in ("generate --prompt x", "plan", "verify", "evaluate --text text.txt")),
    ("generate --prompt x", "required: --model"),
    ("generate --model checkpoint --prompt x",
     "convert it first: python -m tiny_qmoe_mlx.convert --hf-path .*checkpoint --mlx-path .*-tiny-qmoe --bits"),
    ("plan --model checkpoint", "is an unconverted checkpoint; convert it first"),
    ("verify --model checkpoint", "is an unconverted checkpoint; convert it first"),
    (f"{RUN} --memory 10MB",
     r"10MB is too small .* the smallest that works is \d+(\.\d+)?MB, and .* keeps every expert in memory"),
    ("evaluate --model converted --text text.txt --memory 10MB", "10MB is too small .* the smallest that works is"),
    *((f"{command} --memory{value}", message) for command in (RUN, "plan --model converted") for value, message in (
        (" banana", "should look like 6GB, 512MiB, 60%, auto or a number of bytes, received 'banana'"),
        (" 0", "should be more than 0 and at most this machine's .*, received '0'"),
        ("=-1GB", "should look like .* received '-1GB'"),
        (" -1GB", "--memory: expected one argument"), (" 999TB", "at most this machine's .*, received '999TB'"),
        (" 101%", "at most this machine's"), (" nan", "should look like"), (" ''", "should look like"),
        (" 1e400", "should look like"))),
    ("generate --model converted", "should be some text, it is empty; give --prompt TEXT"),
    ("generate --model converted --prompt ''", "should be some text, it is empty"),
    ("generate --model converted --prompt ' \n\t '", "should be some text, it is empty"),
    (f"generate --model converted --max-tokens 1 --prompt '{'word ' * 4000}'",
     r"\[prompt\] has 20000 characters, at least 5000 tokens; the model's context is 1024; give a shorter prompt"),
    (f"generate --model converted --max-tokens 1 --prompt '{'word ' * 300}'",
     "has 1500 tokens and --max-tokens is 1; .* the model's 1024; give a shorter prompt"),
    (f"{RUN} --max-tokens 1024", "has 1 tokens and --max-tokens is 1024; .* the model's 1024"),
    (f"{RUN} --max-tokens 10 --context 10", "--context should lie between 11 .* and the model's 1024, received 10"),
    (f"{RUN} --context 4000", "--context should lie between .* and the model's 1024, received 4000"),
    *((f"{RUN} {option}", f"{option.split()[0]} should lie in .*, received {option.split()[1]}") for option in (
        "--max-tokens 0", "--max-tokens -5", "--temp -1", "--temp nan", "--top-p 2", "--min-p 2",
        "--repetition-penalty 0", "--seed -1", "--seed 99999999999999999999")),
    (f"{RUN} --max-tokens many", "--max-tokens: invalid int value: 'many'"),
    (f"{RUN} --nonsense", "unrecognized arguments: --nonsense"),
    (f"{RUN} --stats nowhere/stats.json", "--stats should name a file in a directory that exists"),
    (f"{RUN} --stats empty", "--stats should name a file"),
    ("plan --model converted --context 0", "--context should lie in 1 to the model's 1024, received 0"),
    ("plan --model converted --context 2000", "--context should lie in 1 to the model's 1024, received 2000"),
    *((f"evaluate --model converted --text {name}", message) for name, message in (
        ("nowhere.txt", r"\[text\] nowhere.txt should be a text file"), ("empty.txt", "is empty"),
        ("binary.bin", "binary file"), ("nul.txt", "binary file"))),
    ("evaluate --model converted --text text.txt --window 0", "should be at least 1, received 0"),
    ("evaluate --model converted --text text.txt --window 2000",
     "--window should be at most the model's context of 1024 tokens, received 2000"),
    ("evaluate --model converted --text text.txt --against nowhere", "nowhere should be a directory"),
    *((f"{CONVERT} --bits {bits}", f"bits should lie in 0.5 to 4.0, received {bits}")
      for bits in ("0.1", "9", "nan", "inf", "-1")),
    (f"{CONVERT} --bits 0.5", "experts of 64 x 64, .* need at least .* bits per weight, received 0.5"),
    (f"{CONVERT} --bits two", "--bits: invalid float value: 'two'"),
    (f"{CONVERT} --rest-bits 5", "rest bits should be 4, 6, 8 or 16, received 5"),
    (f"{CONVERT} --trellis-length 13", "trellis length should be one of"),
    (f"{CONVERT} --seed -1", "seed should lie in 0 to 4294967295, received -1"),
    (f"{CONVERT} --calibration-sequences 0", "at least one sequence of one token"),
    (f"{CONVERT} --calibration-tokens 0", "at least one sequence of one token"),
    *((f"convert --hf-path checkpoint --mlx-path new --calibration {name}", message) for name, message in (
        ("nowhere.txt", r"\[calibration\] nowhere.txt should be a text file; there is no such file"),
        ("empty.txt", "should hold text, it is empty"), ("blank.txt", "should hold text, it is empty"),
        ("short.txt", "short.txt should have at least 256 tokens, it has 9"),
        ("binary.bin", r"should be UTF-8 text, byte \d+ is not; is it a binary file"),
        ("nul.txt", "byte 3 is NUL"), ("empty", "should be a text file"))),
    *((f"convert --hf-path {name} --mlx-path new", message) for name, message in NO_MODEL.items()
      if name not in ("other-json", "unfinished")),
    ("convert --hf-path converted --mlx-path new", "is converted already; give the original checkpoint"),
    ("convert --hf-path checkpoint --mlx-path foreign",
     "foreign.* exists, is not empty and is no converted model; choose another directory"),
    ("convert --hf-path checkpoint --mlx-path foreign --overwrite",
     "foreign.* exists, is not empty and is no converted model"),
    ("convert --hf-path checkpoint --mlx-path checkpoint --overwrite",
     "exists, is not empty and is no converted model"),
    ("convert --hf-path checkpoint --mlx-path a.file --overwrite", "exists and is no directory"),
    ("convert --hf-path checkpoint --mlx-path a.file/new --calibration none", "a.file"),
    ("convert --hf-path checkpoint --mlx-path / --overwrite", "is the root of a file system"),
    ("convert --hf-path checkpoint --mlx-path converted", "is a converted model already; --overwrite replaces it"),
    ("convert --hf-path checkpoint --mlx-path loop", "loop. is a link that leads in a circle; remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line[:80] for line, _ in REFUSED])
@pytest.mark.parametrize("way", ["here", pytest.param("process", marks=pytest.mark.slow)])
def test_a_wrong_command_line_is_one_sentence(place, here, monkeypatch, way, line, message):
    monkeypatch.chdir(place)
    before = names(place)
    sentence = refusal(here(*shlex.split(line)) if way == "here" else process(*shlex.split(line)))
    assert re.search(message, sentence), sentence
    assert names(place) == before and names(place / "foreign") == ["thesis.tex"]


@pytest.mark.parametrize("line", [
    "generate --prompt x --model nowhere", "generate --model checkpoint --prompt x", f"{RUN} --memory 10MB",
    f"{CONVERT} --bits 9", "convert --hf-path checkpoint --mlx-path new --calibration binary.bin",
])  # fmt: skip
def test_a_few_in_their_own_process(place, monkeypatch, line):
    monkeypatch.chdir(place)
    sentence = refusal(process(*shlex.split(line)))
    assert re.search(dict(REFUSED)[line], sentence), sentence


def test_a_name_that_is_no_text_is_refused(place, here, monkeypatch, tmp_path):
    """Neither MLX nor the tokenizers open such a file; nobody should learn that from them after an hour."""
    monkeypatch.chdir(tmp_path)
    bad = "bad\udcff"
    for command in ("generate --prompt x --model", "verify --model", "convert --mlx-path new --hf-path"):
        if not Path(bad).is_symlink():
            Path(bad).symlink_to(place / "checkpoint")
        assert "[model] bad? should have a name of UTF-8" in refusal(here(*command.split(), bad))
    Path(bad).unlink()
    convert = ("convert", "--hf-path", place / "checkpoint")
    assert "[--mlx-path]" in refusal(here(*convert, "--mlx-path", bad, "--calibration", "none"))
    shutil.copy(place / "text.txt", bad)
    assert "[calibration] bad? should have" in refusal(here(*convert, "--mlx-path", "new", "--calibration", bad))
    said = refusal(here("evaluate", "--model", place / "converted", "--text", bad))
    assert "[text] bad? should have a name of UTF-8, it has other bytes; rename it" in said
    assert names(tmp_path) == [bad]


def test_a_path_through_a_directory_that_is_not_there(place, here, tmp_path):
    """The directory that is written is the one that is named afterwards."""
    out = tmp_path / "nowhere" / ".." / "new"
    done = here("convert", "--hf-path", place / "checkpoint", "--mlx-path", out, "--calibration", "none",
                "--report", "none")  # fmt: skip
    assert done.status == 0 and done.out.startswith(f"{tmp_path / 'new'}: "), done
    assert names(tmp_path) == ["new"] and names(tmp_path / "new")[-1] == "tokenizer_config.json"


def test_the_smallest_budget_that_is_named_works(converted, here):
    sentence = refusal(here("generate", "--model", converted, "--prompt", "hello", "--memory", "10MB"))
    smallest = re.search(r"the smallest that works is ([\d.]+MB)", sentence)[1]
    done = here("generate", "--model", converted, "--prompt", "hello", "--memory", smallest, "--max-tokens", 5)
    assert done.status == 0 and "experts streamed" in done.err


# ---- damaged files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "grown"])
def test_a_file_of_another_size_is_refused_by_every_command(model, text, here, name, damage):
    data = (model / name).read_bytes()
    if damage == "missing":
        (model / name).unlink()
    else:
        (model / name).write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "grown": data + b"\n"}[damage])
    before = {p.name: p.stat().st_size for p in model.iterdir()}
    for command in (("generate", "--prompt", "x"), ("plan",), ("evaluate", "--text", text)):
        sentence = refusal(here(command[0], "--model", model, *command[1:]))
        assert name in sentence, sentence
    found = here("verify", "--model", model)
    assert found.status == 1 and found.err.startswith("error: ") and found.err.count("\n") == 1
    assert name in found.out + found.err
    assert {p.name: p.stat().st_size for p in model.iterdir()} == before


def places_in(path: Path, count: int, seed: int) -> list[int]:
    """Bits of a file: some of the first, some of the last, and random ones."""
    bits = 8 * path.stat().st_size
    return [3, bits // 2, bits - 5, *(random.Random(seed).randrange(bits) for _ in range(count - 3))]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(converted, model, text, here, name):
    """`generate` with all experts in memory reads every byte; `plan` reads headers only, and never breaks."""
    for bit in places_in(model / name, 5, len(name)):
        flip(model / name, bit)
        sentence = refusal(here("generate", "--model", model, "--prompt", "x"))
        assert name in sentence or "config.json" in sentence, sentence
        refusal(here("evaluate", "--model", model, "--text", text))
        planned = here("plan", "--model", model, "--no-probe")
        assert planned.status == 0 or refusal(planned)
        shutil.copyfile(converted / name, model / name)


def record_bit(model: Path, layer: int, expert: int) -> int:
    opened = container.open_model(model)
    return 8 * opened.record_offset(layer, expert) + 4000


def test_a_flipped_record_names_its_expert_even_when_streamed(model, here):
    """With the fewest slots, experts are read while text is written: that stays, and the error is one sentence."""
    for expert in range(8):
        flip(model / EXPERTS, record_bit(model, 1, expert))
    smallest = json.loads(here("plan", "--model", model, "--json", "--no-probe").out)["min_budget_bytes"]
    found = here("generate", "--model", model, "--prompt", "x", "--memory", smallest)
    sentence = refusal(found, found.out)
    assert re.search(rf"{EXPERTS}, expert [0-7]\] the record's checksum does not match", sentence)


def test_verify_finds_random_flips_and_names_file_and_expert(model, here):
    opened = container.open_model(model)
    pick = random.Random(5)
    for _ in range(60):
        name = pick.choice(FILES)
        data = (model / name).read_bytes()
        bit = pick.randrange(8 * len(data))
        flip(model / name, bit)
        found = here("verify", "--model", model, "--json")
        (model / name).write_bytes(data)
        if name == MANIFEST:
            assert name in refusal(found)
            continue
        report = json.loads(found.out)
        assert found.status == 1 and not report["ok"] and name in {p["file"] for p in report["problems"]}, (
            name,
            bit,
            found,
        )
        layer = next((layer for layer in opened.spec.layers if layer.file == name), None)
        expert = (bit // 8 - opened.files[name]["header_bytes"]) // layer.record_bytes if layer else -1
        if layer and 0 <= expert < layer.experts:
            (problem,) = report["problems"]
            assert (problem["file"], problem["layer"], problem["expert"]) == (name, layer.layer, expert)
    assert here("verify", "--model", model).status == 0


# ---- files that agree with one another and are wrong


def forge(model: Path, change, name: str = "config.json") -> None:
    """Change a JSON file and make the manifest agree with every file again, by the rules of FORMAT.md."""
    if name != MANIFEST:
        value = json.loads((model / name).read_text())
        change(value)
        (model / name).write_text(json.dumps(value))
    manifest = json.loads((model / MANIFEST).read_text())
    for other, entry in manifest["files"].items():
        data = (model / other).read_bytes()
        entry["bytes"] = len(data)
        if "header_bytes" in entry:
            start = entry["header_bytes"] = 8 + int.from_bytes(data[:8], "little")
            head = json.loads(data[8:start])
            first, last = next(t["data_offsets"] for key, t in head.items() if key.endswith(".checksums"))
            data = data[:start] + data[start + first : start + last]
        entry["xxh3_128"] = xxhash.xxh3_128_hexdigest(data)
    if name == MANIFEST:
        change(manifest)
    manifest["self_xxh3_128"] = "0" * 32
    raw = json.dumps(manifest)
    (model / MANIFEST).write_text(raw.replace("0" * 32, xxhash.xxh3_128_hexdigest(raw.encode())))


def test_the_forgery_itself_is_sound(model, here):
    forge(model, lambda config: None)
    assert here("verify", "--model", model).status == 0
    assert here("generate", "--model", model, "--prompt", "x", "--max-tokens", 3).status == 0


def set_key(key: str, value):
    return lambda config: config.update({key: value})


def set_layer(key: str, value):
    return lambda config: config["tiny_qmoe"]["layers"][1].update({key: value})


def longer_records(config):
    config["tiny_qmoe"]["layers"][1]["record_bytes"] += config["tiny_qmoe"]["alignment"]


VERSIONS = [
    (2, "format version 1 is read here, received version 2; install a newer"),
    (0, "format_version should be 1, received 0"),
    ("1", "should be 1"),
]


@pytest.mark.parametrize(("version", "message"), VERSIONS)
@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_another_format_version(model, text, here, name, version, message):
    forge(model, lambda v: (v if name == MANIFEST else v["tiny_qmoe"]).update(format_version=version), name)
    for command in (("generate", "--prompt", "x"), ("plan",), ("evaluate", "--text", text)):
        sentence = refusal(here(command[0], "--model", model, *command[1:]))
        assert message in sentence and name in sentence


FORGERIES = {
    "longer records": longer_records,
    "tiny records": set_layer("record_bytes", 128),
    "huge records": set_layer("record_bytes", 1 << 40),
    "odd records": set_layer("record_bytes", 4097),
    "more experts": set_layer("experts", 9),
    "other shapes": set_layer("matrices", [["gate_proj", 32, 64], ["up_proj", 32, 64], ["down_proj", 64, 32]]),
    "biases": set_layer("bias", True),
    "another trellis length": lambda config: config["tiny_qmoe"].update(length=16),
    "no trellis length": lambda config: config["tiny_qmoe"].pop("length"),
    "another layer's path": set_layer("path", "model.layers.0.mlp.switch_mlp"),
    "experts of the model": set_key("num_experts", 16),
    "hidden size": set_key("hidden_size", 128),
    "expert width": set_key("moe_intermediate_size", 32),
    "layers of the model": set_key("num_hidden_layers", 4),
    "no hidden size": lambda config: config.pop("hidden_size"),
    "heads that are text": set_key("num_attention_heads", "four"),
    "layers that are a list": set_key("num_hidden_layers", [3]),
    "negative heads": set_key("num_key_value_heads", -2),
    "unknown type": set_key("model_type", "qwen9_moe"),
    "no type": lambda config: config.pop("model_type"),
    "a dense type": set_key("model_type", "llama"),
    "code to run": set_key("model_file", "evil.py"),
    "quantization that is text": set_key("quantization", "8 bits"),
    "vocabulary": set_key("vocab_size", 100),
    "too many experts a token": set_key("num_experts_per_tok", 9),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_config_that_contradicts_the_files(model, here, what):
    forge(model, FORGERIES[what])
    refusal(here("generate", "--model", model, "--prompt", "x", "--max-tokens", 3))
    planned = here("plan", "--model", model, "--no-probe")
    assert planned.status == 0 or refusal(planned)


def test_records_cut_to_a_size_that_config_header_and_checksums_agree_on(model, here):
    """Only the record itself can tell: it says how many bytes it uses."""
    opened = container.open_model(model)
    old, alignment = opened.spec.layers[1], opened.spec.alignment
    data = (model / EXPERTS).read_bytes()
    used = [int(np.frombuffer(data, "<u4", 1, opened.record_offset(1, e) + 8)[0]) for e in range(old.experts)]
    size = (min(used) - 1) // alignment * alignment
    records = [np.frombuffer(data, np.uint8, size, opened.record_offset(1, e)) for e in range(old.experts)]
    fields = old.to_dict() | {"record_bytes": size}
    container_writer.write_experts_file(model, spec.LayerSpec.from_dict(fields), alignment, iter(records))
    forge(model, set_layer("record_bytes", size))
    sentence = refusal(here("generate", "--model", model, "--prompt", "x"))
    assert re.search(rf"{EXPERTS}, expert \d\]", sentence), sentence
    found = json.loads(here("verify", "--model", model, "--json").out)
    assert [p["expert"] for p in found["problems"] if p["file"] == EXPERTS] == list(range(8))
