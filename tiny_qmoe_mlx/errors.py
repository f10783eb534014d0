"""The errors that reach a person as one sentence: `[where] what should be, what was received`, and what to do."""


class FormatError(ValueError):
    """A file of a model directory is missing, damaged, or not what it should be."""


class BudgetError(ValueError):
    """A memory budget that cannot be met, or cannot be read."""


def shown(value: object, most: int = 80) -> str:
    """A value for a sentence: on one line, cut where it is long."""
    text = str(value) if isinstance(value, str | Exception) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."
