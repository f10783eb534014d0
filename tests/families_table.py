"""Writes docs/models.md: what became of every model type of the installed mlx-lm that has routed experts.

    python tests/families_table.py

Takes one or two minutes: every type is converted and compared as test_families.py does it. One that fails stops it.
"""

import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import families
import family_checks
import family_layouts
import public_sizes

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = """# Model types

Every model type of mlx-lm {mlx_lm} with routed experts. Written by `python tests/families_table.py`, which makes a tiny
checkpoint of each type with random weights, converts it to 3 bits, and compares logits (prefill, and decode through the
cache) and greedy tokens with plain mlx-lm on the same dequantized weights, with all experts in memory and with the
fewest slots, on MLX's CPU backend.

- `equal`: logits within {tolerance:g} of 5, the same tokens.
- `needs Metal`: converted and loaded; mlx-lm itself computes the rest of this type with Metal kernels, so it could not
  be run where this table was made.
- `refused`: with the sentence.

"none only": its layers hand later ones more than their output, so that no calibration text can pass them one by one;
`--calibration none` converts it, and says so when another is asked for.

{counts}

The layout is that of its makers' checkpoints; the same experts were read from it and from what mlx-lm saves. Of vision
models the language part is converted.

The smallest Mac is what `plan` would say of public models whose sizes are known, at 2.0 bits (8 bits for the rest) and
a context of 2048 tokens: the least memory of which the automatic budget (65 %) suffices, and the least with which every
expert stays in memory. It is arithmetic; none of them was run on a Mac.

`switch_transformers` (Switch Transformers, encoder-decoders) is no type of mlx-lm's: its model is our own, and gives
transformers' logits ([ANCESTORS](ANCESTORS.md)). At a context of 1024 tokens: {switch}.

| model type | file | layout of experts in checkpoints | status | calibration | smallest Mac |
| --- | --- | --- | --- | --- | --- |
"""


def rows() -> list[tuple[str, ...]]:
    """(model type, file, layouts, status, calibration, smallest Mac) of every type, checked now."""
    out = []
    for model_type, file in families.installed().items():
        with tempfile.TemporaryDirectory() as folder:
            found = family_checks.check(Path(folder), model_type)
        layouts = "; ".join(what for what, _ in family_layouts.of_type(model_type))
        sentence = f": {found.sentence}" if found.sentence else ""
        can = {"equal": "yes" if found.calibrated else "none only"}.get(found.status, "")
        macs = public_sizes.words(model_type)
        out.append((f"`{model_type}`", f"`{file}`", layouts, f"{found.status}{sentence}", can, macs))
        print(*out[-1], sep="  ")
    return out


def main() -> None:
    made = rows()
    counts = Counter(status.split(":")[0] for *_, status, _, _ in made)
    words = ", ".join(f"{counts[s]} {s}" for s in ("equal", "needs Metal", "refused"))
    numbers = f"**{len(made)} types: {words}.**"
    own = {"mlx_lm": version("mlx-lm"), "switch": public_sizes.words("switch_transformers")}
    head = HEAD.format(**own, tolerance=family_checks.LOGIT_TOLERANCE, counts=numbers)
    TABLE.write_text(head + "".join(f"| {' | '.join(row)} |\n" for row in made))


if __name__ == "__main__":
    main()
