"""Messages in the words of a model's own chat template."""

from collections.abc import Sequence, Sized
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tiny_qmoe_mlx.errors import shown

Message = dict[str, str]
TRIAL: Message = {"role": "user", "content": "."}  # the shortest question: what refuses it would refuse any
MOST_BITS, MOST_ITEMS = 1 << 16, 1 << 20  # of a number, and of a text or list, that a template multiplies to


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


def bound_arithmetic() -> None:
    """From now on, in this process, no template computes numbers or texts beyond any use.

    Python does nothing else during one operation on numbers: a power of millions of digits stops all threads, and no
    signal is heard. Templates that transformers has compiled before stay as they were.
    """
    from jinja2.defaults import DEFAULT_FILTERS
    from jinja2.sandbox import SandboxedEnvironment

    SandboxedEnvironment.intercepted_binops = frozenset({"*", "**"})
    SandboxedEnvironment.default_binop_table = {**SandboxedEnvironment.default_binop_table, "*": times, "**": power}
    DEFAULT_FILTERS["round"] = rounded


def times(a: Any, b: Any) -> Any:
    """a * b in a template.

    Raises:
        OverflowError: the product would be too large.
    """
    for one, other in ((a, b), (b, a)):
        if isinstance(one, int) and isinstance(other, Sized) and one * len(other) > MOST_ITEMS:
            raise OverflowError(f"a template should make at most {MOST_ITEMS} characters or items at once")
    if isinstance(a, int) and isinstance(b, int):
        _check_bits(a.bit_length() + b.bit_length())
    return a * b


def power(a: Any, b: Any) -> Any:
    """a ** b in a template.

    Raises:
        OverflowError: the power would be too large.
    """
    if isinstance(a, int) and isinstance(b, int):
        _check_bits(a.bit_length() * b)
    return a**b


def rounded(value: Any, precision: int = 0, method: Any = "common") -> float:
    """jinja2's filter `round`, which takes a power of 10.

    Raises:
        OverflowError: it would be too large.
    """
    from jinja2.filters import do_round

    _check_bits(4 * precision)
    return do_round(value, precision, method)


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise OverflowError(f"a template should compute numbers of at most {MOST_BITS} bits")
