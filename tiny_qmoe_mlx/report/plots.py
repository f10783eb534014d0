"""The two pictures of a model's report: where its bits went, and what each layer's compression does.

matplotlib is an optional dependency (`pip install tiny-qmoe-mlx[plots]`).
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.disk_reads import read_array
from tiny_qmoe_mlx.staging import atomic_file

EXPERTS_READ = 32  # of a layer, evenly chosen: enough for a mean, and a large model has tens of thousands
COLORS = ("#0072b2", "#d55e00", "#009e73")  # told apart by colour-blind readers too
MISSING = "pictures were left out: they need matplotlib (pip install tiny-qmoe-mlx[plots])"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def layer_rates(container: Container) -> list[dict[str, Any]]:
    """Bits per weight that each layer's matrices got, read from the records' rates.

    Returns:
        Per MoE layer {"layer": decoder layer, "bits": {matrix: mean over experts}}; payload alone, without gains and
        padding.

    Raises:
        FormatError: a damaged record.
    """
    out = []
    for index, layer in enumerate(container.spec.layers):
        picked = np.unique(np.linspace(0, layer.experts - 1, EXPERTS_READ).astype(int))
        means = [_record_bits(container.expert_file(index), layer, int(e)) for e in picked]
        names = [name for name, _, _ in layer.matrices]
        bits = [round(float(b), 4) for b in np.mean(means, 0)]
        out.append({"layer": layer.layer, "bits": dict(zip(names, bits, strict=True))})
    return out


def _record_bits(file: Path, layer: Any, expert: int) -> list[float]:
    where = f"{layer.file}, expert {expert}"
    if layer.packing:
        return [float(p.bits) for p in layer.packing]
    begin = file.stat().st_size - layer.data_bytes + expert * layer.record_bytes
    data = read_array(file, "u1", layer.record_bytes, begin)
    record = trellis.parse(data, layer.shapes, layer.bias, where)
    return [float(trellis.BITS[m.rates].mean()) for m in record.matrices]


def draw_rates(rates: list[dict[str, Any]], bits: float, path: Path) -> None:
    """Bits per weight by layer, a line per matrix, as a PNG.

    Args:
        rates: of `layer_rates`.
        bits: per expert weight of all files, everything counted.
        path: where.
    """
    figure, axes = _figure(1)
    layers = [r["layer"] for r in rates]
    for color, name in zip(COLORS, rates[0]["bits"], strict=False):
        values = [r["bits"][name] for r in rates]
        axes[0].plot(layers, values, color=color, marker="o", markersize=3.5, linewidth=1.5, label=name)
    axes[0].axhline(bits, color="0.5", linewidth=1, linestyle="--", label=f"whole files: {bits:.2f}")
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("bits per weight")
    axes[0].set_title("Where the bits went", loc="left")
    _finish(figure, axes, path)


def draw_layers(layers: list[dict[str, Any]], path: Path) -> bool:
    """What each layer's compression does, as a PNG: KL and relative error, whichever were measured; False for none."""
    wanted = {
        "kl": "KL to the original, nats\nonly this layer's experts compressed",
        "relative_error": "median relative squared error of its\noutput, all layers up to it compressed",
    }
    found = {key: label for key, label in wanted.items() if any(row.get(key) is not None for row in layers)}
    if not found:
        return False
    figure, axes = _figure(len(found))
    for axis, color, (key, label) in zip(axes, COLORS, found.items(), strict=False):
        rows = [row for row in layers if row.get(key) is not None]
        axis.bar([row["layer"] for row in rows], [row[key] for row in rows], color=color, width=0.7)
        axis.set_ylabel(label, fontsize=9)
    axes[0].set_title("What each layer's compression does", loc="left")
    _finish(figure, axes, path)
    return True


def _figure(panels: int) -> tuple[Any, list[Any]]:
    logger = logging.getLogger("matplotlib")  # which warns of a home directory that it cannot write to
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    finally:
        logger.setLevel(before)
    figure = Figure(figsize=(8, 1 + 2.6 * panels), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def _finish(figure: Any, axes: list[Any], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, ncols=4, fontsize=9, loc="lower left")
    axes[-1].set_xlabel("decoder layer")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
