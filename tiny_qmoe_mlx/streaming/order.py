"""Which expert leaves a pool next: the one unused for the most steps of its own layer.

A step of a layer is one demand of decode, for a token or a batch. Of equally old experts that one leaves whose layer's
turn is farthest. (By time, those used longest ago are those of the layers whose turn is next, so that a pool smaller
than what one step of all layers uses would never hit: benchmarks/LOG.md.)
"""

from collections import OrderedDict
from collections.abc import Container

Key = tuple[int, int]  # layer, expert


class Order:
    """The experts in a pool, in the order in which they leave.

    Attributes:
        first: these leave before all others, the front one first: read for a prefill, or expected and not demanded.
        used: for each layer its other experts, the one unused for longest in front, with the layer's step that used it.
        steps: how many steps each layer has had.
        turn: the layer whose demand came last.
    """

    def __init__(self) -> None:
        self.first: OrderedDict[Key, None] = OrderedDict()
        self.used: dict[int, OrderedDict[int, int]] = {}
        self.steps: dict[int, int] = {}
        self.turn = 0

    def begin(self, layer: int, counts: bool) -> None:
        """A demand of this layer comes. counts: it is a step; a prefill is none: it leaves what decoding uses alone."""
        self.turn = layer
        self.steps[layer] = self.steps.get(layer, 0) + counts

    def use(self, key: Key) -> None:
        """The expert is used now; it may be a new one."""
        layer, expert = key
        self.first.pop(key, None)
        held = self.used.setdefault(layer, OrderedDict())
        held[expert] = self.steps.get(layer, 0)
        held.move_to_end(expert)

    def dismiss(self, key: Key) -> None:
        """The expert is the first to leave from now on."""
        self.used.get(key[0], OrderedDict()).pop(key[1], None)
        self.first[key] = None
        self.first.move_to_end(key, last=False)

    def leave(self, pinned: Container[Key]) -> Key | None:
        """Take out the expert that is next to leave and not pinned; None where all are."""
        key = next((key for key in self.first if key not in pinned), None)
        if key is not None:
            del self.first[key]
            return key
        key = self._oldest(pinned)
        if key is not None:
            del self.used[key[0]][key[1]]
        return key

    def _oldest(self, pinned: Container[Key]) -> Key | None:
        found, most = None, (-1, False, False, 0)
        for layer, held in self.used.items():
            for expert, step in held.items():
                if (layer, expert) in pinned:
                    continue
                # A layer up to the turn's is farther than one after it; the turn's own has just been used.
                age = self.steps.get(layer, 0) - step, layer != self.turn, layer <= self.turn, layer
                if age > most:
                    found, most = (layer, expert), age
                break
        return found
