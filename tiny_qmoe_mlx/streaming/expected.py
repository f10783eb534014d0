"""How often an expert will be found in the pool: the hit rate of decode, before a run, for slots per record size.

From the best source there is: a recorded trace of the model (replayed through an LRU pool), its usage profile (Che's
approximation of an LRU cache: Che, Tung and Wang, 2002), or, without either, a curve of another model's shape.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.streaming.trace import Trace

# Hits by the pool's share of all experts: real text through random routers, 48 layers of 128 experts, 8 a token:
# `benchmarks/routing.py text FILE --prompt 1000`, then `benchmarks/replay.py FILE`. A trained router's own may differ.
CURVE = {0.0625: 0.286, 0.1: 0.287, 0.15: 0.396, 0.2: 0.448, 0.3: 0.543, 0.4: 0.634, 0.5: 0.714, 0.6: 0.787}
CURVE |= {0.7: 0.853, 0.8: 0.91, 0.9: 0.959, 0.95: 0.981, 1.0: 1.0}
CURVE_TOKEN = 8 / 128  # the share that one token asks for: with less, nothing is left when its layer's turn comes again


def from_curve(share: float, token: float) -> float:
    """Hit rate of a pool that holds a share of all experts, 0 to 1, where a token asks for the share `token` of them.

    What lies between one token's experts and all of them is taken as the curve's own stretch between these.
    """
    if share < token or token >= 1:
        return float(share >= 1)
    alike = CURVE_TOKEN + (share - token) / (1 - token) * (1 - CURVE_TOKEN)
    return float(np.interp(alike, list(CURVE), list(CURVE.values())))


def from_trace(trace: Trace, slots: Mapping[int, int]) -> float:
    """Hit rate of the trace's decode through LRU pools, which its prefill has warmed.

    Args:
        trace: of this model.
        slots: record size -> slots of its pool.
    """
    pools: dict[int, OrderedDict] = {size: OrderedDict() for size in slots}
    hits = asked = 0
    for call in trace.calls:
        size = trace.record_bytes[call.layer]
        found = [_touch(pools[size], (call.layer, int(e)), slots[size]) for e in np.unique(call.chosen)]
        if not call.cold:
            hits, asked = hits + sum(found), asked + len(found)
    return hits / asked if asked else 0.0


def _touch(pool: OrderedDict, key: tuple[int, int], slots: int) -> bool:
    """Use an expert: whether it was there; it is now, the one used longest ago may not be."""
    hit = key in pool
    pool[key] = None
    pool.move_to_end(key)
    if len(pool) > slots:
        pool.popitem(last=False)
    return hit


def from_profile(use: Sequence[np.ndarray], container: Container, slots: Mapping[int, int]) -> float:
    """Hit rate of LRU pools, were every expert asked for independently at its profile's rate.

    Neighbouring tokens share experts, so that a run does better than this.
    """
    hits = total = 0.0
    for size, count in slots.items():
        layers = [i for i, layer in enumerate(container.spec.layers) if layer.record_bytes == size]
        rates = np.concatenate([np.asarray(use[i], float) for i in layers])
        hits, total = hits + _che(rates, count), total + rates.sum()
    return hits / total if total else 0.0


def _che(rates: np.ndarray, slots: int) -> float:
    """Requests that hit an LRU cache: an expert stays for as long as `slots` others take to be asked for."""
    rates = rates[rates > 0]
    if slots >= len(rates):
        return float(rates.sum())
    held = lambda time: (1 - np.exp(-rates * time)).sum()  # noqa: E731
    low, high = 0.0, 1.0 / rates.min()
    while held(high) < slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) < slots else (low, middle)
    return float((rates * (1 - np.exp(-rates * low))).sum())
