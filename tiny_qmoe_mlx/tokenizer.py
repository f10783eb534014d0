"""A model's tokenizer whose errors are one sentence: its files are a stranger's, and what is wrong with them may show
with one text and not with another.
"""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.library_errors import panics, refused

ENCODES = "the model's tokenizer should take any text, it does not take this one"
OTHER = "give another text, or the tokenizer's files of the original"
DECODES = "the model's tokenizer should have a text for every token, it has none for what was written"


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
