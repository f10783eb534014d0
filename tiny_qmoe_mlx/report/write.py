"""A report with every model: quality.json, the model card, and two pictures, in the converted directory itself.

A model stays whole at every moment: the manifest first forgets the files of an old report, they are written, and then
it takes them in. Nothing else of the manifest is touched, so damage elsewhere is not blessed by a report.
"""

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from tiny_qmoe_mlx import __version__, masked_spans
from tiny_qmoe_mlx.container import FORMAT_VERSION, MANIFEST, SELF, Container, file_hash, read_config, read_manifest
from tiny_qmoe_mlx.disk_reads import read_bytes
from tiny_qmoe_mlx.errors import BudgetError, FormatError, shown
from tiny_qmoe_mlx.masked_spans import is_encoder_decoder
from tiny_qmoe_mlx.original import checkpoint
from tiny_qmoe_mlx.report import card, plots
from tiny_qmoe_mlx.spec import CODEC
from tiny_qmoe_mlx.staging import UNFINISHED, atomic_file, finite, write_json

QUALITY, RATES, LAYERS = "quality.json", "rates.png", "kl.png"
OWN_SEED = 1_000_003  # of text that the original writes to be measured on: not the calibration's
OWN_LENGTH = 256
LAYER_TOKENS = 256  # that the KL of single layers is measured on: one pass of the original for each layer
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    tokens: predicted; window: with one context; tasks: of a kind, 0 for none; layer_tokens: for the KL of each layer by
    itself, 0 for none.
    """

    tokens: int = 4096
    window: int = 512
    tasks: int = 40
    layer_tokens: int = LAYER_TOKENS


QUICK = Extent(tokens=2048, tasks=0, layer_tokens=0)  # at the end of a conversion


# ---- files


def write_report(
    directory: str | Path,
    source: Path | None = None,
    quality: dict[str, Any] | None = None,
    made: dict[str, Any] | None = None,
    name: str | None = None,
) -> list[str]:
    """Write quality.json (where given), the pictures and the card into a converted directory, finished or not.

    Args:
        directory: with config.json and all experts files; its manifest may still be missing.
        source: directory of the original, for its licence and language.
        quality: what `measure` gave, or {"layers": [...]} alone from a conversion; kept as it was where None.
        made: settings of the conversion for the card, name -> value; kept as they were where None.
        name: of the model; the directory's where None.

    Returns:
        What a person should know, sentences: pictures that were skipped, a card that was left alone.

    Raises:
        FormatError: it is not a converted model.
        OSError: it cannot be written.
    """
    directory = Path(directory)
    finished = (directory / MANIFEST).is_file()
    names = [QUALITY, RATES, LAYERS, card.CARD]
    kept = read_quality(directory)
    if finished:
        cover(directory, forget=names)
    merged = {**kept, **(quality or {}), **({"made": made} if made is not None else {})}
    merged["layers"] = _join(kept.get("layers"), (quality or {}).get("layers"))
    merged = {key: value for key, value in merged.items() if value}
    if merged:
        merged = finite(merged)
        write_json(directory / QUALITY, merged)
    notes = _draw(directory, merged)
    notes += _write_card(directory, source, merged, name or directory.resolve().name)
    if finished:
        cover(directory, add=[n for n in names if (directory / n).is_file()])
    return notes


def _join(old: Any, new: Any) -> list[dict[str, Any]]:
    """Rows of layers, the figures of the second beside those of the first."""
    rows: dict[int, dict[str, Any]] = {}
    for row in [*(old or []), *(new or [])]:
        rows.setdefault(row["layer"], {}).update(row)
    return [rows[layer] for layer in sorted(rows)]


def read_quality(directory: Path) -> dict[str, Any]:
    """quality.json of a directory; {} where there is none that can be read."""
    try:
        found = json.loads(read_bytes(directory / QUALITY))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def cover(directory: Path, forget: Iterable[str] = (), add: Iterable[str] = ()) -> None:
    """Rewrite a manifest without some files, or with some as they are now; its other entries stay as they are.

    Raises:
        FormatError: there is no manifest that can be trusted.
    """
    files = {name: entry for name, entry in read_manifest(directory).items() if name not in set(forget)}
    for name in add:
        path = directory / name
        files[name] = {"bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
    empty = "0" * 32
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items())), SELF: empty}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    head, _, tail = text.rpartition(empty)
    with atomic_file(directory / MANIFEST) as file:
        file.write(f"{head}{xxhash.xxh3_128_hexdigest(text.encode())}{tail}".encode())


def _unfinished(directory: Path) -> Container:
    """A directory as it stands, whether or not it has a manifest; without the card, which tells of the rest."""
    others = {MANIFEST, card.CARD, *UNFINISHED}
    files = {p.name: {"bytes": p.stat().st_size} for p in directory.iterdir() if p.is_file() and p.name not in others}
    return Container(directory, *read_config(directory), files)


def _draw(directory: Path, quality: dict[str, Any]) -> list[str]:
    if not plots.available():
        return [plots.MISSING]
    container = _unfinished(directory)
    if container.spec.codec == CODEC:  # others have one rate for all of a matrix
        plots.draw_rates(plots.layer_rates(container), container.spec.bits, directory / RATES)
    plots.draw_layers(quality.get("layers") or [], directory / LAYERS)
    return []


def _write_card(directory: Path, source: Path | None, quality: dict[str, Any], name: str) -> list[str]:
    container, path = _unfinished(directory), directory / card.CARD
    metadata = card.front_matter(
        source or directory, container.spec.source["model"], is_encoder_decoder(container.config)
    )
    pictures = [picture for picture in (RATES, LAYERS) if (directory / picture).is_file()]
    measured = quality if "kl" in quality else {}
    generated = card.card_text(name, container, measured, quality.get("made") or {}, pictures)
    old = read_bytes(path).decode(errors="replace") if path.is_file() else None
    whole = card.merge(old, card.front_text(metadata), generated)
    if whole is None:
        return [f"{path} was left as it is: it has no part that tiny-qmoe-mlx wrote"]
    with atomic_file(path) as file:
        file.write(whole.encode())
    return []


# ---- measurement


def measure(
    directory: str | Path,
    source: Path,
    text: Path | None = None,
    extent: Extent = Extent(),  # noqa: B008 (frozen)
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """A converted model against its original.

    Args:
        directory: of the converted model, finished.
        source: directory of the original. It is held in memory beside the converted model where both fit, else read
            anew, layer by layer, for every window; it then writes no text, does no tasks and no single layers.
        text: held-out text; None lets the original write it.
        extent: how much.
        progress: called with (what, done, total).

    Returns:
        What quality.json holds: text, original and converted {perplexity, and shares of tasks}, kl, top1, tasks,
        layers [{"layer", "kl"}], versions.

    Raises:
        FormatError: one of the models, or the text, is not what it should be.
        BudgetError: the memory does not suffice.
        ValueError: the vocabularies differ.
    """
    from tiny_qmoe_mlx import blas
    from tiny_qmoe_mlx.report import compare, tasks

    config = checkpoint.read_config(Path(directory))
    _require_original(config, source)
    if is_encoder_decoder(config):
        if text is None:
            raise BudgetError(
                "[report] an encoder-decoder writes no text to be measured on; python -m tiny_qmoe_mlx.evaluate "
                "--report with --text FILE measures it."
            )
        extent = replace(extent, tasks=0)  # of chats
    extra = masked_spans.extra(extent.window) if is_encoder_decoder(config) else 0
    context = max(extent.window + extra, tasks.CONTEXT if extent.tasks else 0)
    with blas.shared_machine():
        pair = compare.open_pair(Path(directory), source, context)
        try:
            windows, words = _windows(pair, text, extent, config, progress)
            found = compare.evaluate(pair.converted, windows, pair.original, progress)
            out = _summary(found, {**words, "tokens": found["tokens"], "window": extent.window})
            if extent.tasks:
                _run_tasks(out, pair, extent.tasks, progress)
            if extent.layer_tokens and pair.whole:
                first = windows[0] if extra else windows[0][: extent.layer_tokens + 1]
                out["layers"] = compare.layer_kl(pair, first, progress)
        finally:
            pair.converted.close()
    return out


def _require_original(config: dict[str, Any], source: Path) -> None:
    """Refuse another model than the one that was converted, whose layers the compressed experts would not fit.

    Raises:
        FormatError: with the first number of both configs that differs.
    """
    own, other = (_numbers(found) for found in (config, checkpoint.read_config(source)))
    for key in own.keys() & other.keys():
        if own[key] != other[key]:
            raise FormatError(
                f"[report] {source} should be the original that was converted, its {shown(key)} is "
                f"{shown(other[key])}, that of the converted model {shown(own[key])}; name the original with --against."
            )


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The type, sizes and counts in a config, which no conversion changes."""
    parts = {**config, **(config.get("text_config") or {})}
    return {k: v for k, v in parts.items() if k == "model_type" or (type(v) is int and not k.endswith("_id"))}


def _run_tasks(out: dict[str, Any], pair: Any, count: int, progress: Progress) -> None:
    """Add both models' scores, and how long their replies agree."""
    from tiny_qmoe_mlx.report import tasks

    scores, replies = tasks.run(pair.converted, pair.tokenizer, count, progress)
    out["converted"] |= scores
    out["tasks"] = {"of_a_kind": count, "agreement": None}
    if pair.whole:
        scores, others = tasks.run(pair.original, pair.tokenizer, count, progress)
        out["original"] |= scores
        same = [tasks.agreement(a, b) for a, b in zip(replies, others, strict=True)]
        out["tasks"]["agreement"] = round(sum(same) / len(same), 4)


def _windows(
    pair: Any, text: Path | None, extent: Extent, config: dict[str, Any], progress: Progress
) -> tuple[list[list[int]], dict[str, Any]]:
    """Token windows to predict, and where they are from."""
    from tiny_qmoe_mlx.conversion.text import read_text, write_text
    from tiny_qmoe_mlx.report import compare

    if text is not None:
        given = read_text(text, "text")
        windows = compare.windows_of(given, extent.window, extent.tokens, pair.tokenizer, config)
        return windows, {"source": text.name, **({"masked": True} if is_encoder_decoder(config) else {})}
    if not pair.whole:
        raise BudgetError(
            "[report] the original writes the text that it is measured on, and does not fit this machine's memory "
            "beside the converted model; give --text FILE."
        )
    length = min(OWN_LENGTH, extent.window)
    count = max(1, extent.tokens // length)
    rows = write_text(pair.original, pair.tokenizer, count, length + 1, OWN_SEED, progress, "held-out")
    return rows.tolist(), {"source": "self", "seed": OWN_SEED}


def _summary(found: dict[str, float], text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": text,
        "original": {"perplexity": found["against_perplexity"]},
        "converted": {"perplexity": found["perplexity"]},
        "kl": {name: found[f"kl_{name}"] for name in ("mean", "median", "p99")},
        "top1": found["top1"],
        "versions": {
            "tiny_qmoe_mlx": __version__,
            **{name.replace("-", "_"): version(name) for name in ("mlx", "mlx-lm")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }
