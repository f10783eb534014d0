"""The errors that reach a person as one sentence: `[where] what should be, what was received`, and what to do."""


class FormatError(ValueError):
    """A file of a model directory is missing, damaged, or not what it should be."""


class BudgetError(ValueError):
    """A memory budget that cannot be met, or cannot be read."""
