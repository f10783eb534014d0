"""Masked spans: T5's noise, QMoE's way to write it down, the loss on it, and prompts whose sentinels are filled."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import switch_models

from tiny_qmoe_mlx import masked_spans, models, native
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.generate import generate, stream_generate
from tiny_qmoe_mlx.original.checkpoint import load_lazy
from tiny_qmoe_mlx.plan import plan

pytest_plugins = ["command_fixtures"]
needs_compiler = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
MARKS = list(range(900, 1000))
START, END = 0, 1


def budget(directory, share):
    """A budget that holds all experts (1), or the fewest that work (0)."""
    found = plan(directory, probe=False)
    return found["resident_budget_bytes" if share else "min_budget_bytes"]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- masking


def test_a_text_of_568_tokens_fills_the_encoders_512_as_in_qmoe():
    example = masked_spans.mask(list(range(2, 570)), MARKS, START, END, rng())
    assert masked_spans.counts(568) == (85, 28)
    assert len(example.inputs) == 512 and len(example) == 1 + 85 + 28 + 1
    assert len(example.inputs) + len(example) == 568 + masked_spans.extra(568)


@pytest.mark.parametrize("length", [2, 3, 5, 7, 20, 64, 333])
@pytest.mark.parametrize("seed", range(5))
def test_inputs_and_outputs_hold_the_text(length, seed):
    text = list(range(2, 2 + length))
    example = masked_spans.mask(text, MARKS, START, END, rng(seed))
    used = [token for token in example.inputs if token in MARKS]
    assert example[0] == START and example.inputs[-1] == END and example[-1] == MARKS[len(used)]
    assert used == MARKS[: len(used)] == [t for t in example if t in MARKS][:-1] and used
    spans = {}
    for token in example[1:]:
        spans.setdefault(token, []) if token in MARKS else spans[list(spans)[-1]].append(token)
    rebuilt = [t for token in example.inputs[:-1] for t in (spans[token] if token in MARKS else [token])]
    assert rebuilt == text and all(spans[mark] for mark in used)
    assert example.inputs[0] == text[0]


def test_every_way_to_place_the_spans_is_equally_likely():
    """Of 40 tokens 6 are masked in two spans: all ways to cut 6 and 34 into two parts."""
    masked, count = masked_spans.counts(40)
    assert (masked, count) == (6, 2)
    ways = {(a, b) for a in range(1, 6) for b in range(1, 34)}
    generator, seen = rng(), Counter()
    for _ in range(40 * len(ways)):
        (begin, end), (_, last) = masked_spans.spans(40, generator)
        assert last == 40
        seen[(end - begin, begin)] += 1
    expected = 40.0
    statistic = sum((seen[way] - expected) ** 2 / expected for way in ways)
    assert set(seen) == ways and statistic < len(ways) + 6 * (2 * len(ways)) ** 0.5  # chi squared, six deviations


def test_as_t5_cuts_lengths():
    """Parts of a sum are drawn as T5 does: by all ways to choose where they end."""
    ways = Counter(tuple(masked_spans._parts(5, 3, rng(seed))) for seed in range(3000))
    assert len(ways) == len(list(combinations(range(4), 2))) and min(ways.values()) > 400


def test_the_same_seed_masks_the_same_spans():
    texts = [list(range(100, 160))] * 3
    tokenizer = type("T", (), {"unk_token_id": 2, "convert_tokens_to_ids": lambda self, t: 900 + int(t[10:-1])})()
    one, two, other = (masked_spans.mask_all(texts, tokenizer, {}, seed) for seed in (0, 0, 1))
    assert [(e.inputs, list(e)) for e in one] == [(e.inputs, list(e)) for e in two]
    assert [e.inputs for e in one] != [e.inputs for e in other] and one[0].inputs != one[1].inputs
    assert one[0][0] == 0 and one[0].inputs[-1] == 1


def test_what_a_quantizer_learns_from():
    tokens = np.array([[5, 900, 6, 1, 0, 900, 7, 8, 901]])
    kept = [[True, False, True, True, False, True, True, False, False]]
    assert masked_spans.counted(tokens, MARKS, START).tolist() == kept


def test_texts_that_cannot_be_masked_are_refused():
    for text in ([], [5], list(range(5000))):
        with pytest.raises(ValueError, match=r"should have 2 to 1990 tokens, by the tokenizer's 100 sentinels"):
            masked_spans.mask(text, MARKS, START, END, rng())
    assert len(masked_spans.mask([5] * 1990, MARKS, START, END, rng()).inputs) == 1990 - 298 + 99 + 1


@pytest.mark.parametrize("token", [START, MARKS[0], MARKS[-1]])
def test_texts_that_hold_what_parts_them_are_refused(token):
    with pytest.raises(ValueError, match=rf"start token 0, this one holds token {token}; take it out"):
        masked_spans.mask([5, 6, token, *range(100, 150)], MARKS, START, END, rng())


@pytest.mark.parametrize("end", [10**9, 384, -5, None, [], True, "1", [None], 1.0])
def test_an_end_token_that_is_none_is_refused(end):
    with pytest.raises(FormatError, match=r"eos_token_id should be a token of the model, 0 to 383, received"):
        masked_spans.end_token({"vocab_size": 384, "eos_token_id": end})
    assert masked_spans.end_token({"vocab_size": 384, "eos_token_id": [7, 8]}) == 7


@pytest.mark.parametrize(
    ("text", "written", "want"),
    [
        ("The <extra_id_0> is <extra_id_1>.", "<extra_id_0> cat<extra_id_1> black<extra_id_2>", "The cat is black."),
        ("The <extra_id_0> is <extra_id_1>.", "<extra_id_0> cat", "The cat is <extra_id_1>."),
        ("<extra_id_1> <extra_id_0>", "<extra_id_0> a <extra_id_1> b <extra_id_2> c", "b a"),
        ("<extra_id_0>", "nothing", "<extra_id_0>"),
        ("no mark", "<extra_id_0> a", "no mark"),
    ],
)
def test_filling(text, written, want):
    assert masked_spans.fill(text, written) == want


# ---- with a model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return switch_models.write(tmp_path_factory.mktemp("switch") / "hf")


@pytest.fixture(scope="module")
def converted(source) -> Path:
    return convert(source, source.parent / "out", Settings(bits=2.0, sequences=4, sequence_tokens=60))


def loss_by_hand(model, tokenizer, text, window, count):
    """Mean cross entropy over the masked tokens and sentinels of `count` windows, in float64."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    generator, marks, total, tokens = rng(), masked_spans.sentinels(tokenizer), 0.0, 0
    for i in range(count):
        example = masked_spans.mask(ids[i * window : (i + 1) * window], marks, START, END, generator)
        inputs, outputs = mx.array(example.inputs)[None], np.array(example)
        scores = np.array(model(mx.array(outputs[:-1])[None], cache=model.make_cache(inputs)))[0].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), outputs[1:]]
        total, tokens = total + nll.sum(), tokens + len(nll)
    return total / tokens, tokens


@needs_compiler
def test_evaluate_gives_the_loss_on_masked_spans_beside_the_original(here, source, converted, text):
    options = ("--text", text, "--window", 80, "--tokens", 60, "--memory", budget(converted, 0), "--json")
    done = here("evaluate", "--model", converted, "--against", source, *options)
    assert done.status == 0, done
    found = json.loads(done.out)
    tokenizer, words = models.open_tokenizer(converted), text.read_text()
    each = sum(masked_spans.counts(80)) + 1
    loss, tokens = loss_by_hand(switch_models.plain_model(converted), tokenizer, words, 80, 60 // each)
    original, _ = loss_by_hand(load_lazy(source)[0], tokenizer, words, 80, 60 // each)
    assert found["tokens"] == tokens == 60 // each * each and "bits_per_byte" not in found
    assert found["nll"] == pytest.approx(loss, rel=1e-4)
    assert np.log(found["against_perplexity"]) == pytest.approx(original, rel=1e-4)
    assert found["kl_mean"] > 0.001
    plain = here("evaluate", "--model", source, *options[:-1])
    assert f"{tokens} tokens of masked spans: loss {original:.4f}" in plain.out


@needs_compiler
@pytest.mark.parametrize("turned", [False, True])
def test_an_encoder_decoder_beside_another_kind_is_refused(here, source, checkpoint, text, turned):
    pair = (checkpoint, source) if turned else (source, checkpoint)
    done = here("evaluate", "--model", pair[0], "--against", pair[1], "--text", text)
    assert done.status == 1 and "should be both encoder-decoders or neither, one of them is" in done.err, done


@needs_compiler
def test_an_original_that_is_read_anew_gives_the_same(here, source, converted, text, monkeypatch):
    from tiny_qmoe_mlx.conversion import writer

    options = ("--text", text, "--window", 80, "--tokens", 40, "--json")
    want = here("evaluate", "--model", source, *options)
    monkeypatch.setattr(writer, "available_bytes", lambda: 0)
    assert json.loads(here("evaluate", "--model", source, *options).out) == json.loads(want.out)


@needs_compiler
def test_a_report_measures_masked_spans(here, source, converted, text):
    options = ("--model", converted, "--against", source, "--report", "--window", 80, "--tokens", 40)
    assert "--report --text A_TEXT" in (converted / "README.md").read_text()
    refused = here("evaluate", *options)
    assert refused.status == 1 and "an encoder-decoder writes no text to be measured on" in refused.err
    done = here("evaluate", *options, "--text", text)
    assert done.status == 0, done
    quality = json.loads((converted / "quality.json").read_text())
    assert quality["text"]["masked"] and "tasks" not in quality and len(quality["layers"]) >= 3
    assert all(row["kl"] >= 0 for row in quality["layers"] if "kl" in row)
    card = (converted / "README.md").read_text()
    assert "text2text-generation" in card and "tokens in masked spans of `text.txt`" in card and "<extra_id_0>" in card
    assert here("verify", "--model", converted).status == 0


def greedy(model, inputs, count):
    """Tokens by full passes, without a cache that is kept."""
    out = [START]
    for _ in range(count):
        scores = model(mx.array(out)[None], cache=model.make_cache(mx.array(inputs)[None]))
        out.append(int(scores[0, -1].argmax()))
    return out[1:]


@needs_compiler
@pytest.mark.parametrize("share", [0, 1])
def test_greedy_tokens_are_the_plain_models(converted, share):
    model, tokenizer = models.load(converted, memory=budget(converted, share), context=1024)
    prompt = "the river <extra_id_0> under old trees"
    ids = tokenizer.encode(prompt)
    assert ids[-1] == END and masked_spans.sentinels(tokenizer)[0] in ids
    want = greedy(switch_models.plain_model(converted), ids, 15)
    got = list(stream_generate(model, tokenizer, prompt, max_tokens=15))
    assert [r.token for r in got] == want[: len(got)] and (len(got) == 15 or got[-1].token in tokenizer.eos_token_ids)
    assert got[-1].prompt_tokens == len(ids) and generate(model, tokenizer, ids, max_tokens=15) == "".join(
        r.text for r in got
    )
    model.close()


@needs_compiler
@pytest.mark.parametrize("token", [384, 10**9, -1])
def test_tokens_that_the_model_does_not_have_are_refused(converted, token):
    model, tokenizer = models.load(converted, memory=budget(converted, 1), context=1024)
    wrong = rf"^\[prompt\] tokens should lie in 0 to 383, received {token}; is the tokenizer another's\?$"
    with pytest.raises(ValueError, match=wrong):
        generate(model, tokenizer, [5, token, 1])
    with pytest.raises(ValueError, match=r"^\[prompt\] it should have at least one token, it has none\.$"):
        generate(model, tokenizer, [])
    model.close()


def forced(tokens):
    """A logits processor that lets these come, one after the other."""
    left = iter(tokens)
    return lambda seen, scores: mx.where(mx.arange(scores.shape[-1]) == next(left), 1e4, scores)


@needs_compiler
def test_writing_ends_after_the_prompts_last_sentinel(converted):
    model, tokenizer = models.load(converted, memory=budget(converted, 1), context=1024)
    marks, prompt = masked_spans.sentinels(tokenizer), "a <extra_id_0> c <extra_id_1> e"
    written = [marks[0], *tokenizer.encode("b", add_special_tokens=False), marks[1]]
    written += [*tokenizer.encode("d", add_special_tokens=False), marks[2], marks[3], 50]
    got = list(stream_generate(model, tokenizer, prompt, max_tokens=20, logits_processors=[forced(written)]))
    assert [r.token for r in got] == written[:5] and got[-1].finish_reason == "stop"
    text = tokenizer.decode([r.token for r in got])
    assert masked_spans.fill(prompt, text) == "a b c d e"
    model.close()


@needs_compiler
def test_the_command_fills_a_prompt(here, converted):
    options = ("--model", converted, "--max-tokens", 8, "--memory", budget(converted, 1))
    done = here("generate", *options, "--prompt", "the <extra_id_0> river")
    stats = json.loads(here("generate", *options, "--prompt", "the <extra_id_0> river", "--json").out)
    assert done.status == 0 and done.out == stats["filled"] + "\n" and stats["filled"].startswith("the ")
    assert stats["filled"] == masked_spans.fill("the <extra_id_0> river", stats["text"])
    assert stats["generation_tokens"] <= 8 and stats["mode"] == "resident" and stats["prompt_tokens"] > 5
    bare = json.loads(here("generate", *options, "--prompt", "the river", "--json").out)
    assert "filled" not in bare and bare["generation_tokens"] >= 1


@needs_compiler
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", "--prompt", "a", "--kv-bits", 8), "--kv-bits is not there for encoder-decoders"),
        (("generate", "--prompt", "a", "--system-prompt", "b"), "--system-prompt is not there"),
        (("generate", "--prompt", "a", "--draft-model", "b"), "--draft-model is not there"),
        (("generate", "--prompt", "a" * 1000), "together they should be at most the model's 1024"),
        (("chat",), "chat should be given a model that goes on from a text"),
        (("server",), "the server should be given a model that goes on from a text"),
        (("evaluate", "--text", __file__, "--window", 1000), "--window should be at most the model's context of 1024"),
    ],
)
def test_commands_that_are_refused(here, converted, argv, message):
    done = here(argv[0], "--model", converted, *argv[1:])
    assert done.status in (1, 2) and message in done.err and done.out == "", done


@needs_compiler
def test_library_options_that_are_refused(converted):
    model, tokenizer = models.load(converted, memory=budget(converted, 1), context=1024)
    with pytest.raises(ValueError, match="kv_bits is not there for encoder-decoders"):
        next(stream_generate(model, tokenizer, "a", kv_bits=8))
    model.close()


@needs_compiler
def test_plan_and_check(here, converted):
    done = here("plan", "--model", converted, "--memory", budget(converted, 1) + 50_000_000, "--check", "--json")
    assert done.status == 0, done
    found = json.loads(done.out)
    assert found["context"] == 1024 and found["fits"] and found["tokens_per_s"] > 0
    assert {row["what"] for row in found["check"]} == {"peak_memory_bytes", "tokens_per_s"}
    (peak,) = (row for row in found["check"] if row["what"] == "peak_memory_bytes")
    assert 0.3 < peak["measured"] / peak["planned"] <= 1.0
