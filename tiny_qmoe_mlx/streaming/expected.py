"""How often an expert will be found in the pool: the hit rate of decode, before a run, for slots per record size.

From the best source there is: a recorded trace of the model (replayed through the engine's order), its usage profile
(Che's approximation of an LRU cache: Che, Tung and Wang, 2002), or, without either, a curve of another model's shape.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tiny_qmoe_mlx.container import Container
from tiny_qmoe_mlx.streaming.order import Key, Order
from tiny_qmoe_mlx.streaming.trace import Trace

# Hits by the pool's share of all experts: real text through random routers, 48 layers of 128 experts, 8 a token:
# `benchmarks/routing.py text FILE --prompt 1000`, then `benchmarks/replay.py FILE`. A trained router's own may differ.
CURVE = {0.0625: 0.286, 0.1: 0.345, 0.15: 0.409, 0.2: 0.462, 0.3: 0.555, 0.4: 0.641, 0.5: 0.719, 0.6: 0.791}
CURVE |= {0.7: 0.855, 0.8: 0.911, 0.9: 0.959, 0.95: 0.981, 1.0: 1.0}
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
    """Hit rate of the trace's decode through pools in the engine's order, which its prefill has warmed.

    Args:
        trace: of this model.
        slots: record size -> slots of its pool.
    """
    pools = {size: _Replay(count) for size, count in slots.items()}
    hits = asked = 0
    for call in trace.calls:
        experts = np.unique(call.chosen).tolist()
        found = pools[trace.record_bytes[call.layer]].demand(call.layer, experts, call.cold)
        if not call.cold:
            hits, asked = hits + found, asked + len(experts)
    return hits / asked if asked else 0.0


class _Replay:
    """A pool without memory."""

    def __init__(self, slots: int):
        self.slots, self.held, self.order = slots, set[Key](), Order()

    def demand(self, layer: int, experts: list[int], cold: bool) -> int:
        """How many of a layer's experts are there; all are used now, and others leave for them."""
        self.order.begin(layer, counts=not cold)
        keys = [(layer, expert) for expert in experts]
        found, missing = [key for key in keys if key in self.held], [key for key in keys if key not in self.held]
        for key in () if cold else found:
            self.order.use(key)
        for key in missing:
            if len(self.held) == self.slots and (leaves := self.order.leave(())) is not None:
                self.held.remove(leaves)
            self.held.add(key)
            if cold:
                self.order.dismiss(key)
            else:
                self.order.use(key)
        return len(found)


def from_profile(use: Sequence[np.ndarray], container: Container, slots: Mapping[int, int]) -> float:
    """Hit rate of LRU pools, were every expert asked for independently at its profile's rate.

    Neighbouring tokens share experts, so that a run does better than this.
    """
    hits = total = 0.0
    for size, count in slots.items():
        layers = [i for i, layer in enumerate(container.spec.layers) if layer.slot == size]
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
