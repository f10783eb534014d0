"""Texts with masked spans, which encoder-decoders of T5's kind are trained on and QMoE (2310.16795) measures its models
by: the encoder reads a text whose spans are sentinels, the decoder writes each sentinel and what it stands for.

15 % of the tokens are masked in spans of 3 on average (T5, arXiv 1910.10683). As with QMoE the encoder's text ends with
the end token, the decoder's with one more sentinel. QMoE's code gives the text an end token before it is masked too, so
that one of its targets is that token: ours are the text's own.
"""

import re
from typing import Any

import numpy as np

from tiny_qmoe_mlx.errors import FormatError, shown
from tiny_qmoe_mlx.vocabulary import check_ids, vocabulary

SHARE, SPAN = 0.15, 3.0
MODEL_TYPE = "switch_transformers"
SENTINELS = 100  # of T5's tokenizer: <extra_id_0> to <extra_id_99>
SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Masked(list):
    """The decoder's tokens, its start token first; `inputs`: the encoder's."""

    def __init__(self, inputs: list[int], outputs: list[int]):
        super().__init__(outputs)
        self.inputs = inputs


def is_encoder_decoder(config: dict[str, Any]) -> bool:
    """Whether a config is of the one kind of encoder-decoders that there is here."""
    return config.get("model_type") == MODEL_TYPE


def refuse(config: dict[str, Any], what: str) -> None:
    """Refuse an encoder-decoder where it makes no sense.

    Raises:
        ValueError: it is one.
    """
    if is_encoder_decoder(config):
        raise ValueError(
            f"[model] {what} should be given a model that goes on from a text, this encoder-decoder fills masked "
            "spans; use python -m tiny_qmoe_mlx.generate."
        )


def known_sentinels(tokenizer: Any) -> list[int]:
    """Ids of the tokenizer's sentinels, the first span's first; none where it has none."""
    ids = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(SENTINELS)]
    missing = next((i for i, found in enumerate(ids) if found in (None, tokenizer.unk_token_id)), SENTINELS)
    return ids[:missing]


def sentinels(tokenizer: Any) -> list[int]:
    """The same, where there must be some.

    Raises:
        FormatError: it has none.
    """
    known = known_sentinels(tokenizer)
    if not known:
        raise FormatError(
            "[tokenizer] that of an encoder-decoder should have sentinels, <extra_id_0> and more, and has none; copy "
            "the original's tokenizer files."
        )
    return known


def counts(length: int) -> tuple[int, int]:
    """(masked tokens, spans) of a text of so many tokens, at least two."""
    masked = min(max(round(length * SHARE), 1), length - 1)
    return masked, max(1, min(round(masked / SPAN), length - masked))


def extra(length: int) -> int:
    """How many more tokens encoder and decoder read together than a text of this length has."""
    return 2 * counts(length)[1] + 3 if length > 1 else 0


def spans(length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(begin, end) of the masked spans of a text, which begins with a token that is not masked."""
    masked, count = counts(length)
    inside, outside = _parts(masked, count, rng), _parts(length - masked, count, rng)
    ends = np.cumsum(inside + outside)
    return [(int(end - size), int(end)) for end, size in zip(ends, inside, strict=True)]


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive numbers that sum to `total`, all such equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def mask(tokens: list[int], marks: list[int], start: int, end: int, rng: np.random.Generator) -> Masked:
    """A text with spans masked.

    Args:
        tokens: at least two.
        marks: ids of the sentinels.
        start: the decoder's start token.
        end: the end token.

    Raises:
        ValueError: the text is shorter than that, has more spans than there are sentinels, or holds a sentinel or the
            start token, which part it.
    """
    if len(tokens) < 2 or counts(len(tokens))[1] >= len(marks):
        most = next(n for n in range(2, 1 << 20) if counts(n)[1] >= len(marks)) - 1
        raise ValueError(
            f"[spans] a text to mask should have 2 to {most} tokens, by the tokenizer's {len(marks)} sentinels, "
            f"received {len(tokens)}."
        )
    if found := {start, *marks}.intersection(tokens):
        raise ValueError(
            f"[spans] a text to mask should hold neither sentinels (<extra_id_0> ...) nor the decoder's start token "
            f"{start}, this one holds token {min(found)}; take it out."
        )
    inputs, outputs, done = [], [start], 0
    for mark, (begin, stop) in zip(marks, spans(len(tokens), rng), strict=False):
        inputs += [*tokens[done:begin], mark]
        outputs += [mark, *tokens[begin:stop]]
        done = stop
    inputs += [*tokens[done:], end]
    outputs.append(marks[counts(len(tokens))[1]])
    return Masked(inputs, outputs)


def mask_all(texts: list[list[int]], tokenizer: Any, config: dict[str, Any], seed: int = 0) -> list[Masked]:
    """Each of several texts with spans masked, the same ones for the same seed.

    Raises:
        FormatError: the tokenizer has no sentinels, the config no end token.
        ValueError: a text is too short or too long, or a token is none of the model's.
    """
    rng, marks = np.random.default_rng(seed), sentinels(tokenizer)
    masked = [mask(tokens, marks, start_token(config), end_token(config), rng) for tokens in texts]
    check_ids(config, [token for example in masked for token in (*example.inputs, *example)], "text")
    return masked


def end_token(config: dict[str, Any]) -> int:
    """What the encoder's text ends with.

    Raises:
        FormatError: the config has something else in its place.
    """
    end = config.get("eos_token_id", 1)
    end = end[0] if isinstance(end, list) and end else end
    size = vocabulary(config, 1 << 31)
    if type(end) is not int or not 0 <= end < size:
        raise FormatError(
            f"[config.json] eos_token_id should be a token of the model, 0 to {size - 1}, received {shown(end)}."
        )
    return end


def start_token(config: dict[str, Any]) -> int:
    """What the decoder begins with."""
    return config.get("decoder_start_token_id") or 0


def joined(examples: list[Masked]) -> np.ndarray:
    """Examples of one length, encoder's tokens and decoder's in one array, int32 (examples, both)."""
    return np.array([[*example.inputs, *example] for example in examples], np.int32)


def counted(tokens: np.ndarray, marks: list[int], start: int) -> np.ndarray:
    """Which tokens of `joined` a quantizer learns from, bool, as with QMoE: of the encoder's all but sentinels, of the
    decoder's all but the last and those before a sentinel, whose output is a sentinel.
    """
    is_mark = np.isin(tokens, marks)
    decoder = np.cumsum(tokens == start, axis=1) > 0
    before = np.concatenate([is_mark[:, 1:], np.ones((len(tokens), 1), bool)], axis=1)
    return ~np.where(decoder, before, is_mark)


def fill(text: str, written: str) -> str:
    """A text with its sentinels replaced by what a decoder wrote for them; those that it did not reach stay."""
    parts = SENTINEL.split(written)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return SENTINEL.sub(lambda mark: found.get(mark[1], mark[0]).strip() or mark[0], text)
