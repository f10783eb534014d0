"""The model card: a converted directory's README.md, made from its files' headers and its quality.json.

Owns the text between two marks; what stands before and after them is the owner's and is kept.
"""

import sys
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import budget, footprint
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.hub.client import original_name
from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.spec import LOSSLESS, bits_per_weight

BEGIN, END = "<!-- tiny-qmoe-mlx: begin -->", "<!-- tiny-qmoe-mlx: end -->"
CARD = "README.md"
MAC_GIB = (8, 16, 24, 32, 48, 64, 96, 128)
MOST_CARD = 1 << 24  # bytes of an original's card that are read
KEPT = ("license", "license_name", "license_link", "language")  # of the original's front matter


def card_text(
    name: str, container: Container, quality: dict[str, Any], made: dict[str, Any], pictures: list[str]
) -> str:
    """The generated part of the card, with its marks.

    Args:
        name: of the model.
        container: its files.
        quality: quality.json, or {} where nothing was measured.
        made: settings of the conversion beyond those in config.json, name -> value.
        pictures: names of the PNG files in the directory.
    """
    parts = [
        BEGIN,
        f"# {name}",
        _about(container),
        _run_text(name, PROMPTS[is_encoder_decoder(container.config)]),
        _machines(container),
        _quality(quality, is_encoder_decoder(container.config)),
        "\n\n".join(f"![{Path(p).stem}]({p})" for p in pictures),
        _made(container, made),
        _limits(container),
        END,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merge(card: str | None, front: str, generated: str) -> str | None:
    """The whole card: a new one, or the old one with its generated part replaced; None where the old one has none."""
    if card is None:
        return f"{front}\n{generated}"
    begin, end = card.find(BEGIN), card.find(END)
    if not 0 <= begin < end:
        return None
    return card[:begin] + generated.rstrip("\n") + card[end + len(END) :]


def front_matter(source: Path | None, name: str, encoder_decoder: bool = False) -> dict[str, Any]:
    """What the hub reads: library, tags, and licence and language where the original's card has them.

    Args:
        source: directory of the original, or None.
        name: what the conversion was given as the original.
        encoder_decoder: whether it is one.
    """
    found = _metadata(source / CARD) if source else {}
    kind = "text2text-generation" if encoder_decoder else "text-generation"
    out: dict[str, Any] = {"library_name": "mlx", "pipeline_tag": kind}
    out |= {key: found[key] for key in KEPT if found.get(key)}
    if "/" in original_name(name):
        out["base_model"] = original_name(name)
    elif found.get("base_model"):
        out["base_model"] = found["base_model"]
    if "base_model" in out:
        out["base_model_relation"] = "quantized"
    return {**out, "tags": ["mlx", "tiny-qmoe-mlx", "moe", "mixture-of-experts"]}


def _metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) if card.is_file() and card.stat().st_size <= MOST_CARD else None
    except Exception:  # a card is anybody's text; one that is no YAML has nothing to say
        return {}
    return found if isinstance(found, dict) else {}


def front_text(metadata: dict[str, Any]) -> str:
    """The front matter as YAML between its rules."""
    from huggingface_hub.utils import yaml_dump

    return f"---\n{yaml_dump(metadata, sort_keys=False)}---\n"


# ---- the card's parts


def _about(container: Container) -> str:
    spec, files = container.spec, container.files
    experts = sum(layer.experts for layer in spec.layers)
    total = sum(entry["bytes"] for entry in files.values())
    expert_bytes = sum(files[layer.file]["bytes"] for layer in spec.layers)
    original = original_name(spec.source["model"])
    link = f"[{original}](https://huggingface.co/{original})" if "/" in original else f"`{original}`"
    bits = bits_per_weight(spec.layers, spec.alignment)
    what, whole = f"its {experts:,} routed experts in {len(spec.layers)} layers", spec.layers[0].whole
    if experts == len(spec.layers):
        what = f"its {experts} feed-forward layers"
    if whole:
        what = f"the matrices of its {len(spec.layers)} decoder layers"
    rest = "the rest as it was" if spec.codec == LOSSLESS else f"the rest at {_rest_bits(container)} bits"
    return (
        f"{link}, {what} compressed to **{bits:.3f} bits per weight** (every byte of their files counted), {rest}. "
        f"{budget.show(total)} in all, {budget.show(expert_bytes)} of it {'in these' if whole else 'experts'}."
    )


def _rest_bits(container: Container) -> int:
    quantization = container.config.get("quantization")
    return quantization.get("bits", 16) if isinstance(quantization, dict) else 16


PROMPTS = ("Why is the sky blue?", "The <extra_id_0> walks in the <extra_id_1>.")  # for a decoder, an encoder-decoder


def _run_text(name: str, prompt: str) -> str:
    return (
        "## Run it\n\n"
        "With tiny-qmoe-mlx installed (`pip install tiny-qmoe-mlx`), in this directory's parent or with its path:\n\n"
        f'    python -m tiny_qmoe_mlx.generate --model {name} --prompt "{prompt}"\n'
        f"    python -m tiny_qmoe_mlx.plan     --model {name} --memory 6GB\n"
        f"    python -m tiny_qmoe_mlx.verify   --model {name}"
    )


def machine_rows(container: Container) -> list[tuple[int, int, str, float]]:
    """(GiB of a Mac, budget in bytes, "resident" | "streamed" | "does not fit", share of expert bytes in memory)."""
    rows = []
    experts = sum(layer.experts * layer.slot for layer in container.spec.layers)
    context = min(budget.DEFAULT_CONTEXT, footprint.longest_context(container.config))
    for gib in MAC_GIB:
        size = budget.parse_memory("auto", gib << 30)
        try:
            part = budget.split(container, size, context, cpu=False)
            rows.append((gib, size, part.mode, part.pool_bytes / experts))
        except BudgetError:
            rows.append((gib, size, "does not fit", 0.0))
    return rows


def _machines(container: Container) -> str:
    context = min(budget.DEFAULT_CONTEXT, footprint.longest_context(container.config))
    least = budget.split(container, sys.maxsize, context, cpu=False)
    lines = [
        "## Where it runs\n",
        f"By the sizes in the files' headers, for a context of {context} tokens and the default budget of "
        f"{100 * budget.AUTO_SHARE:.0f} % of the memory. {budget.show(least.min_budget_bytes)} is the smallest budget "
        f"that works, {budget.show(least.resident_budget_bytes)} keeps every expert in memory. No speed is claimed: it "
        "was not measured here.\n",
        "| Mac with | budget | experts | of them in memory |",
        "| ---: | ---: | --- | ---: |",
    ]
    for gib, size, mode, share in machine_rows(container):
        lines.append(f"| {gib} GB | {budget.show(size)} | {mode} | {f'{100 * share:.0f} %' if share else ''} |")
    return "\n".join(lines)


QUALITY_ROWS = (  # label, key, format; a share is printed as a percentage
    ("perplexity", "perplexity", "{:.3f}"),
    ("JSON of the asked shape", "json_validity", "{:.0%}"),
    ("JSON of the asked shape, its start given", "json_validity_begun", "{:.0%}"),
    ("JSON with the right values", "json_correct", "{:.0%}"),
    ("right tool called with the right arguments", "tool_call_pass", "{:.0%}"),
)


def _quality(quality: dict[str, Any], encoder_decoder: bool) -> str:
    if not quality:
        return (
            "## Quality\n\nNot measured yet. This measures it, and writes it here:\n\n    python -m "
            "tiny_qmoe_mlx.evaluate --model THIS_DIRECTORY --against THE_ORIGINAL --report"
            f"{' --text A_TEXT' if encoder_decoder else ''}"
        )
    text, kl = quality["text"], quality["kl"]
    lines = [
        "## Quality\n",
        f"Against the original, on {text['tokens']} tokens {_origin(text)}, in windows of {text['window']}: KL "
        f"divergence mean **{_number(kl['mean'])}**, median {_number(kl['median'])}, 99th percentile "
        f"{_number(kl['p99'])} nats; the same best token at {_number(quality['top1'], '{:.1%}')} of positions.",
    ]
    tasks = quality.get("tasks")
    if tasks:
        same = tasks.get("agreement")
        lines[-1] += f" {tasks['of_a_kind']} generated tasks of each kind, greedy replies"
        lines[-1] += f"; they stay the original's for {same:.0%} of their first 32 tokens." if same is not None else "."
    lines += ["", "| | original | this model |", "| --- | ---: | ---: |"]
    for label, key, form in QUALITY_ROWS:
        cells = [quality[who].get(key) for who in ("original", "converted")]
        if any(cell is not None for cell in cells):
            lines.append(f"| {label} | " + " | ".join("" if c is None else form.format(c) for c in cells) + " |")
    versions = ", ".join(f"{key} {value}" for key, value in (quality.get("versions") or {}).items())
    if versions:
        lines += ["", f"Measured with {versions}."]
    return "\n".join(lines)


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "not finite" if value is None else form.format(value)


def _origin(text: dict[str, Any]) -> str:
    masked = "in masked spans " if text.get("masked") else ""
    return "that the original wrote itself" if text["source"] == "self" else f"{masked}of `{text['source']}`"


TOLD = ("bits", "codec", "codewords", "length", "calibration", "seed")  # settings that the container knows better


def _made(container: Container, made: dict[str, Any]) -> str:
    spec, words = container.spec, container.spec.calibration
    revision = spec.source.get("revision")
    rows = {
        "original": original_name(spec.source["model"]) + (f" at revision {revision}" if revision else ""),
        "codec": f"{spec.codec}, L {spec.length}" if spec.length else spec.codec,
        "calibration": f"{words['source']}, {words['tokens']} tokens",
        "rotation seed": spec.seed,
        **{key.replace("_", " "): value for key, value in made.items() if key not in TOLD},
    }
    listed = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return f"## How it was made\n\n`python -m tiny_qmoe_mlx.convert`, with\n\n| | |\n| --- | --- |\n{listed}"


def _limits(container: Container) -> str:
    bits = bits_per_weight(container.spec.layers, container.spec.alignment)
    what = "Layers" if container.spec.layers[0].whole else "Experts"
    lossy = (
        f"- {what} at {bits:.2f} bits are an approximation: expect more errors than the original makes, most of all in "
        "JSON, tool calls, code and rare languages.\n"
    )
    return (
        "## Limits\n\n"
        f"{'' if container.spec.codec == LOSSLESS else lossy}"
        "- What the original must not be used for, this must not be used for either; its licence holds.\n"
        "- Needs tiny-qmoe-mlx: mlx-lm alone cannot read the expert files."
    )
