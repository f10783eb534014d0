"""What `--calibration` may name: texts, chats, and what a model writes for itself."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tiny_qmoe_mlx.conversion import text as calibration_text
from tiny_qmoe_mlx.conversion import writer
from tiny_qmoe_mlx.errors import BudgetError, FormatError
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.report.compare import cut, windows_of

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if tools %}[{{ tools | length }} tools]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_models.make_checkpoint(tmp_path_factory.mktemp("original"), "qwen3_moe")


def open_tokenizer(directory: Path, template: str | None = None):
    tokenizer = checkpoint.open_tokenizer(directory, checkpoint.read_config(directory))
    if template is not None:
        tokenizer._tokenizer.chat_template = template
        tokenizer.has_chat_template = True
    return tokenizer


def tokens_of(source, tokenizer, original, sequences=4, length=16, **options):
    return calibration_text.calibration_tokens(str(source), tokenizer, original, sequences, length, **options)


# ---- texts


def test_a_text_gives_stretches_spread_over_it(original, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 10)
    found = tokens_of(file, open_tokenizer(original), original, 4, 10)
    ids = Tokenizer.from_file(str(original / "tokenizer.json")).encode("abcdefghij" * 10).ids
    assert found.dtype == np.int32 and found.tolist() == [ids[s : s + 10] for s in (0, 30, 60, 90)]


def test_a_text_for_fewer_sequences_gives_as_many_as_it_has(original, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("x" * 35)
    assert tokens_of(file, open_tokenizer(original), original, 64, 16).shape == (2, 16)


def beginning_with_a_token(original, tmp_path):
    """The same tokenizer with <s> before each text, as Llama's and Gemma's put one."""
    file = Tokenizer.from_file(str(original / "tokenizer.json"))
    first = file.token_to_id("<s>")
    file.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    file.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(original / "tokenizer_config.json", tmp_path)
    return checkpoint.open_tokenizer(tmp_path, checkpoint.read_config(original)), first


def test_stretches_begin_as_the_tokenizer_begins_a_text(original, tmp_path):
    tokenizer, first = beginning_with_a_token(original, tmp_path)
    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 10)
    ids = Tokenizer.from_file(str(original / "tokenizer.json")).encode("abcdefghij" * 10).ids
    assert tokens_of(file, tokenizer, original, 4, 10).tolist() == [[first, *ids[s : s + 9]] for s in (0, 30, 60, 90)]
    assert tokens_of(file, tokenizer, original, 2, 1).tolist() == [[ids[0]], [ids[-1]]]
    assert calibration_text.beginning(tokenizer) == [first]
    assert calibration_text.beginning(open_tokenizer(original)) == []


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 30])
def test_windows_predict_as_many_tokens_with_and_without_a_beginning(count):
    ids = list(range(10))
    plain = cut(ids, 4, count, [])
    assert [t for w in plain for t in w[1:]] == ids[1 : count + 1]
    windows = cut(ids, 4, count, [77])
    assert [t for w in windows for t in w[1:]] == ids[:count]
    assert all(w[0] == 77 and len(w) <= 5 for w in windows) and all(len(w) <= 5 for w in plain)


def test_a_long_text_becomes_tokens_in_pieces(original, tmp_path, monkeypatch):
    """The same ones, and no more than are asked for."""
    tokenizer, given, own = open_tokenizer(original), [], checkpoint.Tokenizer.encode
    text = "".join(random.Random(0).choices("abc \n", k=4000)) + "x" * 700
    whole = list(tokenizer.encode(text, add_special_tokens=False))
    monkeypatch.setattr(checkpoint.Tokenizer, "encode", lambda *a, **k: given.append(a[1]) or own(*a, **k))
    monkeypatch.setattr(calibration_text, "PIECE", 300)
    assert calibration_text.text_tokens(tokenizer, text).tolist() == whole
    assert "".join(given) == text and max(map(len, given)) <= 300 and len(given[-2]) == 300
    assert all(piece[0] in " \n" for piece in given[1:10])
    given.clear()
    assert calibration_text.text_tokens(tokenizer, text, 1000).tolist()[:1000] == whole[:1000] and len(given) < 8
    given.clear()
    windows = windows_of(text, 10, 50, tokenizer, checkpoint.read_config(original))
    assert windows == cut(whole, 10, 50, []) and given[1:] == ["a"]  # what a text begins with
    monkeypatch.setattr(calibration_text, "MOST_TEXT", 4000)
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(FormatError, match=r"text.txt\] should have at most 4000 bytes, has 4700"):
        calibration_text.read_text(tmp_path / "text.txt")


def test_none_and_builtin(original):
    tokenizer = open_tokenizer(original)
    assert tokens_of("none", tokenizer, original) is None
    found = tokens_of("builtin", tokenizer, original, 3, 20)
    start = calibration_text.BUILTIN_TEXT.read_text()[:20]
    assert tokenizer.decode(found[0].tolist()) == start and found.shape == (3, 20)


# ---- chats


def test_chats_go_through_the_template(original, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]},
        {"prompt": "two?", "completion": "2"},
        {"text": "plain\u2028text"},
        {"messages": [{"role": "user", "content": "three"}], "tools": [{}, {}]},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    tokenizer = open_tokenizer(original, TEMPLATE)
    wanted = "<user>one?</><assistant>1</><user>two?</><assistant>2</>plain\u2028text<user>three</>[2 tools]"  # noqa: S105
    ids = calibration_text.chat_tokens(file, tokenizer)
    assert tokenizer.decode(ids) == wanted
    assert tokens_of(file, tokenizer, original, 2, 16).tolist() == [ids[:16], ids[-16:]]


@pytest.mark.parametrize(
    ("line", "template", "message"),
    [
        ("{", TEMPLATE, r"chats.jsonl, line 2, should be JSON, it is not: "),
        ("[" * 100000, TEMPLATE, r"line 2, should be JSON"),
        ("[1]", TEMPLATE, r'line 2, should be an object with "messages", .* received .\[1\]'),
        ('{"role": "user"}', TEMPLATE, r'should be an object with "messages", with "prompt" and "completion"'),
        ('{"messages": []}', TEMPLATE, r'"messages" should be a list of objects'),
        ('{"messages": "hello"}', TEMPLATE, r'"messages" should be a list of objects'),
        ('{"messages": ["hello"]}', TEMPLATE, r'"messages" should be a list of objects'),
        ('{"prompt": "x"}', TEMPLATE, r'"completion" should be a text, received .None'),
        ('{"prompt": 3, "completion": "x"}', TEMPLATE, r'"prompt" should be a text, received .3'),
        ('{"text": null}', TEMPLATE, r'"text" should be a text'),
        ('{"prompt": "x", "completion": "y"}', None, r"line 2, holds a chat, .* has no chat template; give a text"),
        (
            '{"prompt": "x", "completion": "y"}',
            "{{ raise_exception('roles must alternate') }}",
            r"line 2, does not go through the model's chat template: roles must alternate",
        ),
        ('{"prompt": "x", "completion": "y"}', "{{ nothing.at.all }}", r"does not go through .* undefined"),
        ('{"prompt": "\\ud800", "completion": "y"}', TEMPLATE, r'line 2, "prompt" should be Unicode'),
    ],
)
def test_chats_that_do_not_serve(original, tmp_path, line, template, message):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(FormatError, match=message) as caught:
        calibration_text.chat_tokens(file, open_tokenizer(original, template))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_too_few_chats(original, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "hello"}\n')
    with pytest.raises(FormatError, match=r"chats.jsonl should have at least 16 tokens, it has 5"):
        tokens_of(file, open_tokenizer(original), original)


# ---- self


def test_self_is_deterministic_by_its_seed(original):
    tokenizer = open_tokenizer(original)
    found = tokens_of("self", tokenizer, original, 6, 48, seed=1)
    assert found.shape == (6, 48) and found.dtype == np.int32 and found.min() >= 0 and found.max() < 258
    assert np.array_equal(found, tokens_of("self", tokenizer, original, 6, 48, seed=1))
    assert not np.array_equal(found, tokens_of("self", tokenizer, original, 6, 48, seed=2))


def test_openings_come_in_rounds_and_in_the_templates_words(original):
    plain = calibration_text.openings(open_tokenizer(original), random.Random(0))
    count = len(calibration_text.BEGUN) + len(calibration_text.ASKED)
    first, second = ([tuple(next(plain)) for _ in range(count)] for _ in range(2))
    assert len(set(first)) == count and set(first) == set(second) and first != second
    tokenizer = open_tokenizer(original, TEMPLATE)
    pool = calibration_text.openings(tokenizer, random.Random(0))
    texts = {tokenizer.decode(next(pool)) for _ in range(count)}
    assert "<user>What should I see in Kyoto in two days?</><assistant>" in texts
    failing = calibration_text.openings(open_tokenizer(original, "{{ nothing.at.all }}"), random.Random(0))
    assert len({tuple(next(failing)) for _ in range(count)}) == count


def test_an_original_larger_than_memory_is_refused(original, monkeypatch):
    assert calibration_text.can_write(original, 4, 16)
    monkeypatch.setattr(writer, "available_bytes", lambda: 100_000)
    assert not calibration_text.can_write(original, 4, 16)
    with pytest.raises(
        BudgetError, match=r"self needs the whole original in memory, .* can give 100KB; use --cal.* FILE"
    ):
        tokens_of("self", open_tokenizer(original), original)


# ---- many rows at once


def alone(model, prompt: list[int], limit: int, ends: set[int], after: list[list[int]]) -> list[int]:
    """One row by whole passes without a cache: greedy."""
    row = list(prompt)
    after = [list(a) for a in after]
    while len(row) < limit:
        row.append(int(np.array(model(mx.array([row]))[0, -1]).argmax()))
        if row[-1] in ends:
            if not after:
                break
            row += after.pop(0)
    return row[:limit]


def test_rows_of_different_lengths_are_what_each_would_write_alone(original):
    model, _ = load_model(original)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 3, 9, 17)]
    limits = [20, 5, 24, 18]
    free = [alone(model, p, n, set(), []) for p, n in zip(prompts, limits, strict=True)]
    greedy = lambda p: mx.argmax(p, axis=-1)  # noqa: E731
    assert writer.write(model, prompts, limits, greedy, set()) == free
    ends = {free[0][4], free[2][12]}  # two rows meet an end in their own text
    stopped = [alone(model, p, n, ends, []) for p, n in zip(prompts, limits, strict=True)]
    assert stopped != free and writer.write(model, prompts, limits, greedy, ends) == stopped
    nexts = [[[i, i + 1, i + 2]] * 30 for i in range(4)]
    going_on = [alone(model, p, n, ends, a) for p, n, a in zip(prompts, limits, nexts, strict=True)]
    assert writer.write(model, prompts, limits, greedy, ends, lambda row: [row, row + 1, row + 2]) == going_on
    assert [len(row) for row in going_on] == limits


def test_a_prompt_at_its_limit_is_returned_as_it_is(original):
    model, _ = load_model(original)
    assert writer.write(model, [[1, 2, 3, 4]], [3], lambda p: mx.argmax(p, axis=-1), set()) == [[1, 2, 3]]
