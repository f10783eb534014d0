"""A conversation's answers are those that plain mlx-lm gives for the whole text, though only what is new is read."""

import chat_model
import mlx.core as mx
import pytest
import tiny_models
from chat_model import text_of
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import footprint, models, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.conversation import ContextFull, Conversation

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
LENGTH = 12


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return chat_model.make(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(converted):
    model, tokenizer = models.load(converted)
    with model:
        yield model, tokenizer


@pytest.fixture(scope="module")
def plain(converted):
    """mlx-lm's own model on the same weights."""
    return tiny_models.plain_model(open_model(converted))


@pytest.fixture(scope="module")
def letters(loaded):
    """A logits processor that leaves ASCII letters alone, so that a text has the tokens that it was written with."""
    size, tokenizer = tiny_models.BASE["vocab_size"], loaded[1]
    wanted = mx.array([tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii() for i in range(size)])
    return [lambda tokens, logits: mx.where(wanted, logits, -1e9)]


def whole(plain, loaded, conversation, question, processors, length=LENGTH):
    """What plain mlx-lm answers when it reads the whole conversation anew."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    ids = loaded[1].encode(text_of(messages), add_special_tokens=False)
    answer = stream_generate(plain, loaded[1], ids, max_tokens=length, logits_processors=processors)
    return "".join(r.text for r in answer)


def ask(conversation, question, letters, length=LENGTH, **options):
    """(text, tokens that were read before its first) of an answer."""
    answers = list(conversation.ask(question, length, logits_processors=letters, **options))
    return "".join(r.text for r in answers), answers[-1].prompt_tokens if answers else 0


def test_only_what_is_new_is_read_and_the_answer_is_that_to_the_whole(plain, loaded, letters):
    chat = Conversation(*loaded, system="be brief")
    read = []
    for question in ("why", "and how", "say more"):
        expected = whole(plain, loaded, chat, question, letters)
        found, count = ask(chat, question, letters)
        assert found == expected and len(found) == LENGTH
        read.append(count)
    new = [len(f";<user>{question};<assistant>") for question in ("and how", "say more")]
    assert read == [len("<system>be brief;<user>why;<assistant>"), *new]
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert loaded[1].decode(chat.tokens) == text_of(chat.messages).removesuffix(";<assistant>")


def test_a_stopped_answer_is_part_of_the_conversation(plain, loaded, letters):
    chat, seen = Conversation(*loaded), []

    def stopped():
        seen.append(0)
        return len(seen) >= 6  # twice before the last token of the prompt is read

    first = whole(plain, loaded, chat, "why", letters)
    assert ask(chat, "why", letters, stopped=stopped)[0] == chat.messages[-1]["content"] == first[:4]
    answer = chat.ask("how", LENGTH, logits_processors=letters)
    expected = whole(plain, loaded, chat, "how", letters)
    assert [next(answer).text, next(answer).text] == list(expected[:2])
    answer.close()  # as leaving a loop does
    assert chat.messages[-1] == {"role": "assistant", "content": expected[:2]}
    expected = whole(plain, loaded, chat, "then", letters)
    assert ask(chat, "then", letters) == (expected, len(";<user>then;<assistant>"))


def test_a_stop_while_the_prompt_is_read_leaves_out_the_question(plain, loaded, letters):
    chat, seen = Conversation(*loaded), []
    ask(chat, "why", letters)
    before, question = list(chat.messages), "x" * (footprint.PREFILL_CHUNK + 50)

    def stopped():
        seen.append(0)
        return len(seen) > 1  # after the first chunk

    assert ask(chat, question, letters, stopped=stopped) == ("", 0)
    assert chat.messages == before and len(chat.tokens) > footprint.PREFILL_CHUNK
    expected = whole(plain, loaded, chat, "xxxhow", letters)
    assert ask(chat, "xxxhow", letters) == (expected, len("how;<assistant>"))


def test_an_answer_that_broke_changes_nothing(plain, loaded, letters):
    chat = Conversation(*loaded)
    ask(chat, "why", letters)
    before = list(chat.messages)

    def breaks(tokens, logits):
        if len(tokens) > 25:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("how", 40, logits_processors=[breaks]))
    assert chat.messages == before and chat.tokens == []
    expected = whole(plain, loaded, chat, "how", letters)
    assert ask(chat, "how", letters) == (expected, len(text_of([*before, {"role": "user", "content": "how"}])))


def test_another_system_message_and_another_history(plain, loaded, letters):
    chat = Conversation(*loaded)
    ask(chat, "why", letters)
    chat.system = "be brief"
    assert chat.system == "be brief" and chat.messages[0] == {"role": "system", "content": "be brief"}
    expected = whole(plain, loaded, chat, "how", letters)
    assert ask(chat, "how", letters)[0] == expected
    other = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat.load(other)
    assert chat.system is None
    expected = whole(plain, loaded, chat, "three", letters)
    assert ask(chat, "three", letters)[0] == expected and chat.messages[:2] == other
    chat.system = "s"
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "s"}] and chat.tokens == []
    chat.system = None
    assert chat.messages == []


def test_a_quantized_cache_is_kept_over_answers(plain, loaded, letters):
    quantized = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    chat, cache, tokenizer = Conversation(*loaded), make_prompt_cache(plain), loaded[1]
    found = [ask(chat, question, letters, **quantized)[0] for question in ("why", "how")]
    expected = []
    for text in ("<user>why;<assistant>", ";<user>how;<assistant>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        options = {"max_tokens": LENGTH, "prompt_cache": cache, "logits_processors": letters, **quantized}
        expected.append("".join(r.text for r in stream_generate(plain, tokenizer, ids, **options)))
    assert found == expected != [ask(Conversation(*loaded), "why", letters)[0], found[1]]


def test_a_cache_that_forgets_is_read_anew_where_it_cannot_go_back(plain, loaded, letters):
    chat = Conversation(*loaded, context=1000, max_kv_size=32)
    for question in ("why", "how"):
        ask(chat, question, letters, 30)
    assert len(chat.tokens) > 64
    chat.messages[1] = {"role": "assistant", "content": "what"}
    ids = loaded[1].encode(text_of([*chat.messages, {"role": "user", "content": "x"}]), add_special_tokens=False)
    options = {"max_tokens": LENGTH, "max_kv_size": 32, "logits_processors": letters}
    expected = "".join(r.text for r in stream_generate(plain, loaded[1], ids, **options))
    assert ask(chat, "x", letters) == (expected, len(ids))


def test_a_draft_model_changes_no_answer(loaded, converted, letters):
    draft, _ = load_model(converted.parent / "hf")
    draft.set_dtype(mx.float32)
    with_draft, without = Conversation(*loaded, draft=draft), Conversation(*loaded)
    for question in ("why", "and how", "say more"):
        expected = ask(without, question, letters)
        found, read = ask(with_draft, question, letters, num_draft_tokens=3)
        assert found == expected[0] and read <= expected[1] + 1 + 3  # what the pair had not both read
    answer = with_draft.ask("x", LENGTH, logits_processors=letters)
    begun = next(answer).text + next(answer).text
    answer.close()
    without.load(with_draft.messages)
    assert with_draft.messages[-1]["content"] == begun
    assert ask(with_draft, "y", letters)[0] == ask(without, "y", letters)[0]


def test_a_full_context(loaded, letters):
    chat = Conversation(*loaded, context=60)
    text = ask(chat, "why", letters, 1000)[0]
    assert len(text) == 60 - len("<user>why;<assistant>") and len(chat.tokens) == 60
    before = list(chat.messages)
    with pytest.raises(ContextFull, match=r"the context of 60 tokens is full: .* has 8\d; begin anew"):
        next(chat.ask("more"))
    with pytest.raises(ContextFull):
        chat.load([{"role": "user", "content": "x" * 60}])
    with pytest.raises(ValueError, match="the model's chat template refuses it: .*not that"):
        next(chat.ask("no"))
    assert chat.messages == before
    chat.reset()
    assert len(ask(chat, "why", letters)[0]) == LENGTH


@pytest.mark.parametrize("words", ["a" * 3_000_000, "<user>" * 8000])
def test_a_message_longer_than_the_context_never_becomes_tokens_whole(loaded, monkeypatch, words):
    model, tokenizer = loaded
    conversation, given, own = Conversation(model, tokenizer), [], type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda *a, **k: given.append(len(a[1])) or own(*a, **k))
    with pytest.raises(
        ContextFull, match=f"with this message the conversation has {len(words) // 10000}.* characters, "
    ):
        next(conversation.ask(words))
    assert conversation.messages == [] and max(given, default=0) <= 1 << 14
