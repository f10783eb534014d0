"""A model's tokenizer whose errors are one sentence: its files are a stranger's, and what is wrong with them may show
with one text and not with another.
"""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.library_errors import panics, refused

ENCODES = "the model's tokenizer should take any text, it does not take this one"
OTHER = "give another text, or the tokenizer's files of the original"
DECODES = "the model's tokenizer should have a text for every token, it has none for what was written"

PIECE = 1 << 14  # characters that become tokens at once while nobody knows whether all of them fit


def longest_token(tokenizer: TokenizerWrapper) -> int:
    """Characters of a tokenizer's longest token."""
    return max(map(len, tokenizer.get_vocab()))


def too_many(tokenizer: TokenizerWrapper, longest: int, text: str, limit: int) -> str:
    """What a text has, where that is more tokens than a limit; else nothing. In memory that the text cannot make large:
    a tokenizer takes hundreds of bytes for each character, and all are made to tokens by whoever asks next.

    Args:
        tokenizer: the model's.
        longest: as `longest_token` gives it.
        text: of any length.
        limit: tokens.
    """
    if len(text) > limit * longest:
        return f"{len(text)} characters, at least {len(text) // longest} tokens"
    tokens, cut = 0, 0  # a cut may make as many tokens of one as it has characters
    for start in range(0, len(text), PIECE) if len(text) > PIECE else ():
        tokens += len(tokenizer.encode(text[start : start + PIECE], add_special_tokens=False))
        if tokens - cut > limit:
            return f"{len(text)} characters, more than {limit} tokens"
        cut += longest
    return ""


class Tokenizer(TokenizerWrapper):
    """mlx-lm's wrapper; its calls raise FormatError where a library trips over the tokenizer's files.

    Made of a TokenizerWrapper by setting its class.
    """

    def encode(self, *args: Any, **how: Any) -> list[int]:
        """As transformers' `encode`."""
        with refused("tokenizer", ENCODES, OTHER):
            return self._tokenizer.encode(*args, **how)

    def decode(self, *args: Any, **how: Any) -> str:
        """As transformers' `decode`."""
        with refused("tokenizer", DECODES):
            return self._tokenizer.decode(*args, **how)

    def apply_chat_template(self, *args: Any, **how: Any) -> Any:
        """As mlx-lm's; what the template itself raises is for `chat_template.render`."""
        with panics("tokenizer", ENCODES, OTHER):
            return super().apply_chat_template(*args, **how)

    @property
    def detokenizer(self) -> Any:
        """mlx-lm's streaming detokenizer, with the same errors."""
        return Detokenizer(super().detokenizer)


class Detokenizer:
    """One of mlx-lm's, which builds its table of a vocabulary that may have holes."""

    def __init__(self, own: Any):
        self._own = own

    def add_token(self, token: int) -> None:
        with refused("tokenizer", DECODES):
            self._own.add_token(token)

    def finalize(self) -> None:
        with refused("tokenizer", DECODES):
            self._own.finalize()

    @property
    def last_segment(self) -> str:
        with refused("tokenizer", DECODES):
            return self._own.last_segment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
