"""Messages in the words of a model's own chat template."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.errors import shown

Message = dict[str, str]


def render(tokenizer: TokenizerWrapper, messages: Sequence[Message], advice: str = "", /, **how: Any) -> str:
    """Messages in the model's chat template.

    Raises:
        ValueError: the template refuses them; advice is added to the sentence.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **how)
    except Exception as error:  # templates are programs, and raise what they like
        reason = shown(" ".join(str(error).split()), 300) or type(error).__name__
        sentence = f"[prompt] the model's chat template refuses it: {reason}"
        raise ValueError(f"{sentence}; {advice}." if advice else f"{sentence}.") from error
