"""How the server draws tokens, and what it tells of their probabilities."""

import mlx.core as mx
import pytest
from server_process import TEXT, chat

pytest_plugins = ["command_fixtures", "server_fixtures"]


@pytest.mark.parametrize("cold", [{"temperature": 5e-324}, {"temperature": 1e-40}, {"top_p": 0}, {"top_p": 1e-300}])
def test_numbers_that_vanish_leave_the_likeliest_token(live, alone, cold):
    """And what others sample: MLX takes the whole number 1 for 5e-324 where it has compiled for that before."""
    for options in ({"temperature": 1, **cold}, {"temperature": 1, "top_k": 1}, {"temperature": 1, "min_p": 1}):
        answer = live.get(TEXT, {"prompt": "wind rain", "max_tokens": 6, **options})
        assert answer["choices"][0]["text"] == alone("wind rain", 6), options


@pytest.mark.parametrize("alone_too", [{}, {"seed": 1}], ids=["in a batch", "alone"])
@pytest.mark.parametrize("stream", [False, True])
def test_logarithms_are_those_of_the_tokens_that_were_written(client, alone, stream, alone_too):
    """Drawn, so that the one that was written is not the likeliest; beside it are these, in order."""
    how = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, "temperature": 2.0, "stream": stream, **alone_too}
    answer = client.chat.completions.create(model="default_model", messages=chat("small green"), **how)
    choices = [piece.choices[0] for piece in answer] if stream else answer.choices
    found = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    prompt = alone.tokenizer.apply_chat_template(chat("small green"), add_generation_prompt=True)
    for token in found:
        logits = alone.model(mx.array([prompt]))[0, -1].astype(mx.float32)
        known = (logits - mx.logsumexp(logits)).tolist()
        likeliest = sorted(range(len(known)), key=lambda i: -known[i])[:3]
        assert abs(token.logprob - known[token.id]) < 0.01 and token.token == alone.tokenizer.decode([token.id])
        assert bytes(token.bytes).decode() == token.token
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([known[i] for i in likeliest], abs=0.01)
        prompt = [*prompt, token.id]
    assert len(found) == 8


def test_a_seed_is_its_own_requests_alone(live):
    """What others draw after it does not repeat."""
    asked, texts = {"prompt": "wind rain", "max_tokens": 12, "temperature": 1.0}, set()
    for _ in range(3):
        live.get(TEXT, {**asked, "seed": 7})
        texts.add(live.get(TEXT, asked)["choices"][0]["text"])
    assert len(texts) == 3
