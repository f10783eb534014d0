"""Tokens per second of a model in a budget before it is loaded: the probes of `speed`, and the hits expected."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import coded_probe, footprint, ops, speed
from tiny_qmoe_mlx.budget import Budget
from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.streaming import expected, profile, trace

MEMORY_BOUND = 0.7  # of the bandwidth that memory has: a product that reads its weights as fast waits for them


def hit_rate(
    container: Container, slots: Mapping[int, int], profile_file: str | Path | None, trace_file: str | Path | None
) -> tuple[float, str]:
    """Share of the chosen experts that decode will find in memory, and what says so.

    Raises:
        FormatError: the profile or the trace is damaged, or another model's.
        OSError: it cannot be read.
    """
    if trace_file is not None:
        found = trace.read_trace(trace_file)
        found.check(profile.identity(container))
        return expected.from_trace(found, slots), f"a replay of {trace_file}"
    if profile_file is not None:
        use = profile.load_profile(profile_file, container)
        return expected.from_profile(use, container, slots), f"the profile {profile_file}"
    layers, chosen = footprint.decoding_layers(container), footprint.top_k(container.config)
    total = sum(layer.experts for layer in layers)
    share, token = sum(slots.values()) / total, sum(min(chosen, layer.experts) for layer in layers) / total
    return expected.from_curve(min(1.0, share), token), "the curve of another model's routing"


def bytes_of_token(container: Container) -> int:
    """Bytes of the records that one token asks for."""
    chosen = footprint.top_k(container.config)
    return sum(min(chosen, layer.experts) * layer.record_bytes for layer in footprint.decoding_layers(container))


def forecast(container: Container, part: Budget, hits: float, disk_rate: float) -> dict[str, Any]:
    """Time of a token: the dense part, and the longer of its experts' products and the reads of those not in memory.
    Coded experts are decoded as they are read, by the same cores.

    Args:
        container: the open model, or headers of one.
        part: how the budget is spent.
        hits: share of the chosen experts that are in memory.
        disk_rate: bytes per second.

    Returns:
        tokens_per_s, its parts in seconds a token, bytes read per token, and limit: what the time goes to most,
        "disk", "memory" (its bandwidth), or the processor, "GPU" or "CPU".
    """
    read = 0.0 if part.mode == "resident" else (1 - hits) * bytes_of_token(container)
    parts = {
        "disk_s": read / disk_rate,
        "experts_s": speed.experts(container, footprint.top_k(container.config)) + _decoding(container, part, hits),
        "dense_s": speed.dense(container),
    }
    seconds = parts["dense_s"] + max(parts["disk_s"], parts["experts_s"])
    return {"tokens_per_s": 1 / seconds, **parts, "bytes_per_token": read, "limit": _limit(container, part, parts)}


def _decoding(container: Container, part: Budget, hits: float) -> float:
    """Seconds of decoding those coded experts of a token that are not in memory."""
    layers, chosen = container.spec.layers, footprint.top_k(container.config)
    if part.mode == "resident" or not layers[0].expands:
        return 0.0
    weights = sum(min(chosen, x.experts) * x.weights / x.experts for x in layers)
    return (1 - hits) * weights * coded_probe.record_seconds(container)


def _limit(container: Container, part: Budget, parts: dict[str, float]) -> str:
    if parts["disk_s"] > max(parts["experts_s"], parts["dense_s"]):
        return "disk"
    touched, computed = bytes_of_token(container) + part.weight_bytes, parts["dense_s"] + parts["experts_s"]
    busy = touched / speed.memory_bandwidth() / computed
    return "memory" if busy > MEMORY_BOUND else "GPU" if ops.on_gpu() else "CPU"
