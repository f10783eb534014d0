"""What a conversion may be asked for."""

from dataclasses import dataclass

from tiny_qmoe_mlx.codecs import trellis
from tiny_qmoe_mlx.spec import AFFINE, CODEC, CODECS, QMOE

MIN_BITS, MAX_BITS = 0.5, 4.0
REST_BITS = (4, 6, 8, 16)
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
QMOE_BITS = (1.5, 2)  # QMoE's words for the ternary grid and for the one of four levels
DICTIONARY = "dictionary"
CODEWORDS = (DICTIONARY, "tunstall-8", "tunstall-12", "tunstall-16")


@dataclass(frozen=True)
class Settings:
    """How to convert; two runs with the same settings and source write the same bytes.

    bits: per expert weight, everything counted. rest_bits: 4, 6, 8 or 16 for what is not an expert. codec: how experts
    are coded. codewords: of codec qmoe. length: L of the trellis. calibration: path of a text or of chats (.jsonl),
    "builtin", "self", "none", or "auto": self where the original fits the memory, else builtin;
    sequences x sequence_tokens tokens of it are used. drift: correct the accumulated error of earlier layers.
    layer_rates: spend more bits on the layers that matter more. seed: of the rotation's signs.
    """

    bits: float = 2.0
    rest_bits: int = 8
    codec: str = "trellis"
    codewords: str = DICTIONARY
    length: int = 12
    calibration: str = "auto"
    sequences: int = 64
    sequence_tokens: int = 256
    drift: bool = True
    layer_rates: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: names the setting.
        """
        if self.codec not in CODECS:
            raise ValueError(f"[convert] the codec should be one of {CODECS}, received {self.codec}.")
        if self.codec == AFFINE and self.bits not in AFFINE_BITS:
            raise ValueError(f"[convert] bits of codec affine should be one of {AFFINE_BITS}, received {self.bits}.")
        if self.codec == QMOE:
            self._check_qmoe()
        if self.codec == CODEC and not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"[convert] bits should lie in {MIN_BITS} to {MAX_BITS}, received {self.bits}.")
        if self.rest_bits not in REST_BITS:
            raise ValueError(f"[convert] rest bits should be 4, 6, 8 or 16, received {self.rest_bits}.")
        if self.length not in trellis.LENGTHS:
            raise ValueError(
                f"[convert] the trellis length should be one of {trellis.LENGTHS}, received {self.length}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"[convert] the seed should lie in 0 to {2**32 - 1}, received {self.seed}.")
        if min(self.sequences, self.sequence_tokens) < 1:
            raise ValueError("[convert] calibration should have at least one sequence of one token.")

    def _check_qmoe(self) -> None:
        if self.bits not in QMOE_BITS:
            raise ValueError(
                f"[convert] bits of codec qmoe should be 1.5 (ternary) or 2 (four levels), received {self.bits}."
            )
        if self.codewords not in CODEWORDS:
            raise ValueError(f"[convert] codewords should be one of {CODEWORDS}, received {self.codewords}.")
        if self.codewords == DICTIONARY and self.bits != 1.5:
            raise ValueError(
                f"[convert] the dictionary is of ternary weights, 1.5 bits; with {self.bits} bits ask for codewords "
                f"{', '.join(CODEWORDS[1:])}."
            )
        if self.layer_rates:
            raise ValueError("[convert] codec qmoe has one rate; leave out layer_rates (--layer-rates).")
