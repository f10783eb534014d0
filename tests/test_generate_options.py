"""mlx_lm.generate's options in ours: each gives what mlx-lm's own functions give for plain weights, or is refused with
a sentence before anything is written."""

import json
import os
import re
import shlex
import shutil
import stat
import threading
from pathlib import Path

import mlx.core as mx
import pytest
import tiny_models
from command_fixtures import Here
from commands import generate, process, refusal
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import footprint, generate_options, generate_setup, models, native, prompt_cache
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.plan import plan

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
SMALL = Settings(bits=3.0, sequences=8, sequence_tokens=64)
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if loud %}!{% endif %}{% if not loop.last or add_generation_prompt %};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = "what the long river carries down to the sea " * 4


@pytest.fixture
def here(capfd) -> Here:
    return Here(capfd)


def write_template(directory):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A checkpoint with a chat template, its attention wide enough for a quantized cache."""
    directory = tiny_models.make_checkpoint(tmp_path_factory.mktemp("original") / "hf", "qwen3_moe", head_dim=32)
    write_template(directory)
    return directory


@pytest.fixture(scope="session")
def model(original):
    return convert(original, original.parent / "model", SMALL)


@pytest.fixture(scope="session")
def plain(model):
    """mlx-lm's own model on the same weights, and the tokenizer."""
    return tiny_models.plain_model(open_model(model)), models.open_tokenizer(model)


def raw(here, model, *options, prompt=LONG):
    return generate(here, model, "--ignore-chat-template", *options, prompt=prompt)


def reference(plain, prompt=LONG, **options):
    """Tokens that mlx-lm's own generation gives."""
    mx.random.seed(3)
    return [r.token for r in stream_generate(*plain, prompt, max_tokens=40, **options)]


# ---- what they do


def test_quantized_cache_is_mlx_lms(here, model, plain):
    options = ("--kv-bits", 2, "--kv-group-size", 32, "--quantized-kv-start")
    expected = reference(plain, kv_bits=2, kv_group_size=32, quantized_kv_start=0)
    assert raw(here, model, *options, 0)["tokens"] == expected != reference(plain)
    assert raw(here, model, *options, 5000)["tokens"] == reference(plain)


def test_rotating_cache_is_mlx_lms(here, model, plain):
    found = raw(here, model, "--max-kv-size", 32)["tokens"]
    assert found == reference(plain, max_kv_size=32) != reference(plain)


def test_rotating_cache_lowers_the_context_that_the_budget_provides_for(here, model):
    prompt = "x" * 900
    small = plan(model, context=32 + footprint.PREFILL_CHUNK, probe=False)["min_budget_bytes"]
    done = raw(here, model, "--max-kv-size", 32, "--memory", small, prompt=prompt)
    assert done["prompt_tokens"] == 900 and done["mode"] == "streamed"
    sentence = refusal(here("generate", "--model", model, "--prompt", prompt, "--memory", small, "-m", 40))
    assert "is too small for this model with a context of 1024 tokens" in sentence


SAMPLING = {
    "--top-k 3": {"top_k": 3},
    "--min-p 0.5": {"min_p": 0.5},
    "--min-p 0.9 --min-tokens-to-keep 20": {"min_p": 0.9, "min_tokens_to_keep": 20},
    "--xtc-probability 0.8 --xtc-threshold 0.05": {
        "xtc_probability": 0.8,
        "xtc_threshold": 0.05,
        "xtc_special_tokens": [ord("\n"), tiny_models.BASE["eos_token_id"]],
    },
}


@pytest.mark.parametrize("line", SAMPLING)
def test_sampling_is_mlx_lms(here, model, plain, line):
    special = plain[1].encode("\n")
    options = {**SAMPLING[line], **({"xtc_special_tokens": [*special, 257]} if "xtc" in line else {})}
    found = raw(here, model, "--temp", 2, "--seed", 3, *line.split())["tokens"]
    assert (
        found == reference(plain, sampler=make_sampler(2.0, **options)) != reference(plain, sampler=make_sampler(2.0))
    )


def test_extra_eos_token_ends_the_text(here, model):
    whole = raw(here, model)
    token = next(t for t in whole["tokens"][5:] if t < 128)
    first = whole["tokens"].index(token)
    by_number = raw(here, model, "--extra-eos-token", token)
    assert by_number["tokens"] == whole["tokens"][: first + 1] and by_number["finish_reason"] == "stop"
    letters = models.open_tokenizer(model).convert_ids_to_tokens([token])
    assert raw(here, model, "--extra-eos-token", "</s>", *letters)["tokens"] == by_number["tokens"]


CHATS = {
    "": "<user>hi there;<assistant>",
    "--system-prompt 'be brief'": "<system>be brief;<user>hi there;<assistant>",
    "--prefill-response 'well, '": "<user>hi there;<assistant>well, ",
    "--chat-template-config '{\"loud\": true}'": "<user>hi there!;<assistant>",
    "--ignore-chat-template": "hi there",
    "--prompt-cache-file x": "hi there;<assistant>",  # only what comes after the cache
}


@pytest.mark.parametrize("line", CHATS)
def test_prompt_in_the_chat_template(plain, line):
    args = generate_options.parse(["--model", "m", "--prompt", "hi there", *shlex.split(line)])
    ids = generate_setup.prompt_ids(plain[1], generate_options.prompt_text(args), args)
    assert plain[1].decode(ids) == CHATS[line]


def cache_file(path, model, text, name=None, **options):
    """What mlx_lm.cache_prompt writes."""
    with models.load(model, context=512)[0] as loaded:
        tokenizer = models.open_tokenizer(model)
        prompt, cache = mx.array(tokenizer.encode(text, add_special_tokens=False)), make_prompt_cache(loaded)
        for _ in generate_step(prompt, loaded, max_tokens=0, prompt_cache=cache, **options):
            pass
        save_prompt_cache(str(path), cache, {"model": str(name or model), "tokenizer_config": "{}"})
    return path


def test_saved_prompt_cache_is_gone_on_from(here, model, tmp_path):
    file = cache_file(tmp_path / "c.safetensors", model, "<user>" + LONG)
    found = generate(here, model, "--prompt-cache-file", file, prompt="now")
    whole = generate(here, model, prompt=LONG + "now")
    assert found["tokens"] == whole["tokens"]
    assert found["prompt_tokens"] == len("now;<assistant>") < whole["prompt_tokens"]
    assert raw(here, model, "--prompt-cache-file", file, prompt="now;<assistant>")["tokens"] == whole["tokens"]


def test_quantized_prompt_cache_brings_its_bits(here, model, plain, tmp_path):
    quantized = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    file = cache_file(tmp_path / "c.safetensors", model, LONG, **quantized)
    found = raw(here, model, "--prompt-cache-file", file, prompt="now")
    assert (
        raw(here, model, "--prompt-cache-file", file, "--kv-bits", 4, "--kv-group-size", 32, prompt="now")["tokens"]
        == found["tokens"]
    )
    line = ("generate", "--model", model, "--prompt", "x", "--prompt-cache-file", file, "--kv-bits", 8)
    assert "--kv-bits and --kv-group-size should be 4 and 32" in refusal(here(*line))


def changed(file, out, offset=None, keys=None):
    """A saved cache whose every layer says another number of tokens, or whose keys and values are others."""
    arrays, metadata = mx.load(str(file), return_metadata=True)
    scalars = {name: a for name, a in arrays.items() if a.ndim == 0}
    new = {n: keys(a) if keys is not None and a.ndim == 4 else a for n, a in arrays.items()}
    new |= {n: mx.array(offset) for n in scalars} if offset is not None else {}
    mx.save_safetensors(str(out), new, metadata)
    return out


CHANGES = {
    "more tokens than keys": ({"offset": 300}, "its arrays should hold the 300 tokens that it says, they hold"),
    "none of them": ({"keys": lambda a: a[:, :, :0]}, "its arrays should hold the .* they hold 0"),
    "before the first": ({"offset": -1}, "it should say how many tokens it holds, .*; it says -1"),
    "half a token": ({"offset": 2.5}, "it should say how many tokens it holds, .*; it says 2.5"),
    "no number": ({"offset": float("nan")}, "it should say how many tokens it holds, .*; it says nan"),
    "integers": ({"keys": lambda a: a.astype(mx.int32)}, "its arrays should be finite numbers of floating point"),
    "not finite": ({"keys": lambda a: a * float("nan")}, "its arrays should be finite numbers of floating point"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_prompt_cache_that_lies_is_refused(here, model, tmp_path, change, message):
    file = cache_file(tmp_path / "c.safetensors", model, "hello there")
    file = changed(file, tmp_path / "changed.safetensors", **change)
    said = refusal(here("generate", "--model", model, "--prompt", "x", "--prompt-cache-file", file))
    assert re.search(rf"--prompt-cache-file should be what .* {file} is not: .*{message}", said), said


def test_a_prompt_cache_of_another_format_is_not_opened(here, model, tmp_path):
    """MLX goes by a file's name, and its reader of GGUF crashes on tables that lie."""
    file = tmp_path / "c.gguf"
    file.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + 2 * (1).to_bytes(8, "little") + bytes([255]) * 100)
    said = refusal(process("generate", "--model", model, "--prompt", "x", "--prompt-cache-file", file))
    assert f"{file} is not: FormatError [c.gguf] its header is damaged" in said, said


@pytest.mark.parametrize("name", ["loop/x", "a\0b", "~nobody-of-this-name/x"])
def test_a_prompt_cache_names_any_model(here, model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    file = cache_file("c.safetensors", model, "hello there", name)
    said = refusal(here("generate", "--model", model, "--prompt", "x", "--prompt-cache-file", file))
    assert f"--prompt-cache-file {file} was made with" in said or f"{file} is not: ValueError" in said, said


def test_a_prompt_cache_takes_the_room_of_its_tokens_alone(here, model, tmp_path):
    """Its arrays are cut to what it says; a file larger than the budget is not even opened."""
    file = cache_file(tmp_path / "c.safetensors", model, "hello there")
    long = changed(file, tmp_path / "long.safetensors", keys=lambda a: mx.pad(a, [(0, 0), (0, 0), (0, 99_000), (0, 0)]))
    plain, padded = (raw(here, model, "--prompt-cache-file", f, prompt="now") for f in (file, long))
    assert plain["tokens"] == padded["tokens"]
    args = generate_options.parse(["--model", str(model), "--prompt", "x", "--prompt-cache-file", str(long)])
    held = prompt_cache.open_prompt_cache(model, args)
    assert prompt_cache.cached_tokens(held) == held[0].keys.shape[2] == held[0].values.shape[2] == len("hello there")
    args.memory = str(long.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"long.safetensors has .*MB, --memory is .*MB; raise it"):
        prompt_cache.open_prompt_cache(model, args)


def test_stats_go_where_they_are_named(here, model, tmp_path):
    """Through a link, and into a pipe or device: neither is replaced by a file."""
    done = here("generate", "--model", model, "--prompt", "x", "--max-tokens", 2, "--json", "--stats", "/dev/full")
    assert refusal(done) == "error: [/dev/full] No space left on device"
    (tmp_path / "target.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("target.json")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    for name in ("link.json", "pipe"):
        raw(here, model, "--stats", tmp_path / name, "--max-tokens", 3, prompt="a")
    reader.join(60)
    assert (tmp_path / "link.json").is_symlink() and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert json.loads((tmp_path / "target.json").read_text())["tokens"] == json.loads(read[0])["tokens"]


def test_it_ends_with_one_line(here, model):
    least = plan(model, probe=False)["min_budget_bytes"]
    for line, experts in (
        (
            ("--max-tokens", 20, "--memory", least),
            r"experts streamed, \d+\.\d % hits and 0\.0\d{3} GB a token in decode",
        ),
        (("--max-tokens", 1), "experts resident, no decode step"),
    ):
        done = here("generate", "--model", model, "--prompt", "x", *line)
        assert done.status == 0 and done.out.endswith("\n")
        assert re.fullmatch(
            r"\d+ prompt tokens at [\d.]+/s, first after [\d.]+ s; \d+ tokens at [\d.]+/s; "
            + experts
            + r"; peak memory \d+ MB of \d+ MB\n",
            done.err,
        ), done.err


# ---- a draft model


def test_draft_model_changes_no_token_and_counts_in_the_budget(here, model, original):
    draft, config = load_model(original)
    draft.set_dtype(mx.float32)
    beside = generate_setup.draft_bytes(original, config, 1024, 4)
    memory = plan(model, probe=False)["min_budget_bytes"] + beside + 20_000
    alone = raw(here, model, "--memory", memory)
    found = raw(here, model, "--memory", memory, "--draft-model", original, "--num-draft-tokens", 4)
    assert found["tokens"] == alone["tokens"] and 0 < found["draft_tokens"] < 40 and "draft_tokens" not in alone
    assert found["budget_bytes"] == alone["budget_bytes"] == memory
    weights = sum(array.nbytes for _, array in tree_flatten(draft.parameters()))
    cache = 2 * 3 * 2 * 32 * 4 * 1024  # keys and values, layers, heads, head size, float32, tokens
    assert weights + cache <= beside <= 1.3 * (weights + cache)
    assert raw(here, model, "--memory", memory - beside)["pool_bytes"] == found["pool_bytes"] <= alone["pool_bytes"]


def test_smallest_budget_with_a_draft_model_works(here, model, original):
    line = ("generate", "--model", model, "--prompt", "x", "--draft-model", original, "--memory")
    sentence = refusal(here(*line, plan(model, probe=False)["min_budget_bytes"]))
    assert "and the draft model's" in sentence
    smallest = re.search(r"the smallest that works is ([\d.]+MB)\.", sentence)[1]
    assert here(*line, smallest, "--max-tokens", 5).status == 0
    refusal(here(*line, f"{float(smallest[:-2]) - 0.02}MB"))


# ---- what is refused

RUN = "generate --model model --prompt x"
REFUSED = [
    *((f"{RUN} {option}", f"{option.split()[0]} should lie in .*, received {option.split()[1]}") for option in (
        "--top-k -1", "--min-tokens-to-keep 0", "--xtc-probability 1.5", "--xtc-probability nan",
        "--xtc-threshold 0.6", "--max-kv-size 3", "--max-kv-size -1", "--quantized-kv-start -1",
        "--num-draft-tokens 0", "--num-draft-tokens 65")),
    (f"{RUN} --kv-bits 7", "--kv-bits: invalid choice: 7"),
    (f"{RUN} --kv-bits many", "--kv-bits: invalid int value: 'many'"),
    (f"{RUN} --kv-group-size 48", "--kv-group-size: invalid choice: 48"),
    (f"{RUN} --top-k 258", "--top-k should be less than the model's 258 tokens, received 258"),
    (f"{RUN} --min-tokens-to-keep 300", "--min-tokens-to-keep should be less than the model's 258 tokens"),
    (f"{RUN} --max-kv-size 64 --kv-bits 4", "--max-kv-size and --kv-bits exclude each other"),
    (f"{RUN} --max-kv-size 64 --draft-model d", "--max-kv-size and --draft-model exclude each other"),
    (f"{RUN} --max-kv-size 64 --prompt-cache-file f", "--max-kv-size and --prompt-cache-file exclude each other"),
    (f"{RUN} --draft-model d --prompt-cache-file f", "--draft-model and --prompt-cache-file exclude each other"),
    (f"{RUN} --system-prompt s --prompt-cache-file f", "--system-prompt and --prompt-cache-file exclude each other"),
    (f"{RUN} --chat-template-config nonsense", "--chat-template-config should be JSON and is not"),
    (f"{RUN} --chat-template-config '[1]'", "--chat-template-config should be a JSON object without .*, received"),
    (f"{RUN} --chat-template-config '{{\"tokenize\": true}}'", "object without conversation, messages, tokenize"),
    (f"{RUN} --extra-eos-token nonsense", "--extra-eos-token should be a token of the model or its number, nonsense"),
    (f"{RUN} --extra-eos-token 258", "--extra-eos-token should be a token of the model or its number, 258 is not"),
    (f"{RUN} --extra-eos-token", "--extra-eos-token: expected at least one argument"),
    (f"{RUN} --prefill-response y --ignore-chat-template", "--prefill-response needs a chat template"),
    ("generate --model model --prompt no", "the model's chat template refuses it: .*not that; see --ignore-chat-templ"),
    (f"{RUN} --prompt-cache-file nowhere", "--prompt-cache-file should be a file, there is none at nowhere"),
    (f"{RUN} --prompt-cache-file model/config.json", "--prompt-cache-file should be what mlx_lm.cache_prompt wrote"),
    (f"{RUN} --prompt-cache-file cut.safetensors", "--prompt-cache-file should be what mlx_lm.cache_prompt wrote"),
    (f"{RUN} --prompt-cache-file other.safetensors", "other.safetensors was made with sliding, not with model"),
    (f"{RUN} --prompt-cache-file fewer.safetensors", "--prompt-cache-file should have 3 layers .*, it has 2"),
    (f"{RUN} --prompt-cache-file narrow.safetensors", "--prompt-cache-file does not fit this model's attention"),
    (f"{RUN} --draft-model nowhere", "nowhere should be a directory with config.json, or a hub id"),
    (f"{RUN} --draft-model model", "--draft-model should be a plain model of mlx-lm, model is a converted one"),
    (f"{RUN} --draft-model words", "--draft-model should have the model's tokenizer, that of words is another"),
    (f"{RUN} --draft-model cut", "cut.*its header is damaged"),
    ("generate --model sliding --prompt x --max-kv-size 64",
     "--max-kv-size has no effect on gpt_oss, which shapes its cache itself"),
    ("generate --model sliding --prompt x --kv-bits 4", "--kv-bits 4 does not fit this model's attention in mlx-lm"),
]  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory, model, original):
    """A directory with all that the command lines above name."""
    root = tmp_path_factory.mktemp("options")
    (root / "model").symlink_to(model)
    tiny_models.make_checkpoint(root / "gpt", "gpt_oss")
    convert(root / "gpt", root / "sliding", SMALL)
    for name in ("words", "cut"):
        shutil.copytree(original, root / name)
    config = json.loads((root / "words/config.json").read_text())
    (root / "words/config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    (root / "cut/model.safetensors").write_bytes((original / "model.safetensors").read_bytes()[:100])
    whole = cache_file(root / "whole.safetensors", model, "hello there")
    (root / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    cache_file(root / "other.safetensors", root / "sliding", "hello there", "sliding")
    save(root / "fewer.safetensors", 2, 32)
    save(root / "narrow.safetensors", 3, 16)
    return root


def save(file, layers, width):
    """A prompt cache of 5 tokens, of 2 heads."""
    from mlx_lm.models.cache import KVCache

    caches = [KVCache() for _ in range(layers)]
    for cache in caches:
        cache.update_and_fetch(mx.zeros((1, 2, 5, width)), mx.zeros((1, 2, 5, width)))
    save_prompt_cache(str(file), caches, {"model": "model", "tokenizer_config": "{}"})


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line[:80] for line, _ in REFUSED])
def test_a_wrong_option_is_one_sentence_and_writes_nothing(place, here, monkeypatch, line, message):
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.iterdir())
    sentence = refusal(here(*shlex.split(line)))
    assert re.search(message, sentence), sentence
    assert sorted(p.name for p in place.iterdir()) == before


def test_every_option_of_mlx_lms_generate_is_known_or_left_out_with_a_reason():
    from mlx_lm.generate import setup_arg_parser

    def options(parser):
        return {flag for action in parser._actions for flag in action.option_strings}

    left_out = {
        "--trust-remote-code", "--adapter-path", "--use-default-chat-template", "--image",  # not for these models
        "--prefill-step-size",  # the budget counts on ours
        "--quantize-activations", "-qa", "--verbose",  # --quiet and --json say what is printed
    }  # fmt: skip
    assert options(setup_arg_parser()) - options(generate_options.parser()) == left_out
