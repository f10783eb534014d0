"""What an expert layer may start while its records load: the block's shared expert, and a guess at the next layer.

Both lie outside the swapped module. The shared expert's result is handed to the block's own later call on the same
array. The guess is the next block's own router on this block's input (59 to 84 % of the choice, as others measured):
the block is called with its expert layer in probe mode, and only the indices are evaluated.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MODES = ("auto", "on", "off")
WINDOW = 512  # calls of layers between two judgements
USEFUL = 0.5  # share of read records that must be demanded
IDLE = 0.1  # share of the time that the disk must have nothing else to do
WAIT = 0.05  # share of the time that products must wait for the disk: else there is nothing to gain

_here = threading.local()  # a probe belongs to one thread: others may generate meanwhile


@dataclass
class Around:
    """An expert layer's surroundings: where the next one lies, and its block's shared expert; None where they do not
    fit.
    """

    next_block: nn.Module | None = None
    shared: nn.Module | None = None


def probing() -> bool:
    """Whether this thread is in a probe: nothing but indices will be evaluated."""
    return getattr(_here, "probe", None) is not None


def record(x: mx.array, indices: mx.array) -> mx.array:
    """The expert layer's part in a probe: keep the indices (..., k), return zeros (..., k, d)."""
    _here.probe.append(indices)
    _here.input = x
    return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


def guess(block: nn.Module, x: mx.array) -> mx.array | None:
    """Experts (..., k) that the block's router would choose for x (..., d), lazily; None where it has no such call."""
    _here.probe, _here.follows = [], False
    try:
        block(x)
        found = _here.probe
    except Exception:  # a block that needs more than x: there is no guess then
        found = []
    finally:
        _here.probe = _here.input = None
    return found[0] if len(found) == 1 else None


def surroundings(model: nn.Module, layers: Sequence[nn.Module], hidden: int) -> list[Around]:
    """Of each expert layer, by calls on zeros with nothing evaluated: its block may be probed, and calls its shared
    expert on the same array after it.
    """
    blocks = [_parent(model, layer) for layer in layers]
    shared = [_shared(block) for block in blocks]
    fits, follows = [], []
    for block in blocks:
        fits.append(block is not None and guess(block, mx.zeros((1, 1, hidden))) is not None)
        follows.append(fits[-1] and _here.follows)
    after = [*(block if fit else None for block, fit in zip(blocks, fits, strict=True)), None][1:]
    return [Around(block, s if f else None) for block, s, f in zip(after, shared, follows, strict=True)]


def _parent(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if any(child is layer for child in m.children().values())), None)


def _shared(block: nn.Module | None) -> nn.Module | None:
    """The block's shared expert, made ready to hand out a result that was computed early."""
    if block is None:
        return None
    named = [m for name, m in block.children().items() if "shared" in name and "gate" not in name]
    shared = [m for m in named if isinstance(m, nn.Module) and callable(m)]
    if len(shared) != 1:
        return None
    own = type(shared[0])
    if not issubclass(own, Early):
        shared[0].__class__ = type(own.__name__, (Early, own), {})
    return shared[0]


class Early:
    """Mixed into a shared expert: a call on the array that `start` saw returns what `start` computed."""

    def __call__(self, x: mx.array, *more: Any) -> mx.array:
        if probing():
            _here.follows = getattr(_here, "input", None) is x
            return super().__call__(x, *more)  # type: ignore[misc]
        kept, _here.early = getattr(_here, "early", None), None
        if kept is not None and kept[0] is self and kept[1] is x and not more:
            return kept[2]
        return super().__call__(x, *more)  # type: ignore[misc]


def start(shared: nn.Module, x: mx.array) -> None:
    """Compute the shared expert of x now, for the block's call that follows in this thread."""
    y = shared(x)
    mx.async_eval(y)
    _here.early = (shared, x, y)


@dataclass
class Judge:
    """Decides whether lookahead reads are worth their bytes: products wait for a disk that has time for more, and most
    of what is read is demanded. It begins without, and looks anew after every window of calls.
    """

    mode: str = "auto"
    on: bool = False
    _asked: int = 0
    _before: tuple[float, ...] = field(default=(0.0, 0.0, 0.0, 0.0, 0.0))

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"[lookahead] should be one of {', '.join(MODES)}, received {self.mode!r}.")

    def wants(self, read: int, used: int, busy_s: float, wait_s: float, now: float) -> bool:
        """Whether to look ahead now.

        Args:
            read, used: records that lookahead read, and those of them that were demanded, since loading.
            busy_s, wait_s: seconds that the disk was busy, and that products waited for it, since loading.
            now: a clock, in seconds.
        """
        if self.mode != "auto":
            return self.mode == "on"
        if not self._asked:
            self._before = (read, used, busy_s, wait_s, now)
        self._asked += 1
        if self._asked > WINDOW:
            reads, uses, busy, wait, time = (
                b - a for a, b in zip(self._before, (read, used, busy_s, wait_s, now), strict=True)
            )
            idle = busy < (1 - IDLE) * time
            self.on = idle and (uses >= USEFUL * reads if self.on else wait > WAIT * time)
            self._asked = 0
        return self.on
