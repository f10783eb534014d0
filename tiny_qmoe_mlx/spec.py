"""What config.json says of a converted model: its `tiny_qmoe` object (docs/FORMAT.md, section 2), every value checked.

Sizes are bytes.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from tiny_qmoe_mlx.codecs import qmoe
from tiny_qmoe_mlx.codecs.affine import OTHERS, Packing, layout
from tiny_qmoe_mlx.codecs.trellis import LENGTHS, MAX_DIMENSION, UNIT, side_bytes
from tiny_qmoe_mlx.errors import FormatError

FORMAT_VERSION = 1
CODEC, AFFINE, QMOE, TINY, LOSSLESS = CODECS = ("trellis", "affine", "qmoe", "tiny-qmoe", "lossless")
CODED = (TINY, LOSSLESS)  # whose records are decoded before they are computed with (codecs/packed.py)
CONFIG = "config.json"
ALIGNMENTS = (16384, 4096, 1024, 128)
CHECKSUM_BYTES = 65536
MAX_EXPERTS, MAX_LAYERS = 65536, 2048  # the rotation's seeds leave a layer's index 11 bits
MAX_RECORD = 1 << 31
MAX_MATRICES = 4096  # of a whole decoder layer
MATRIX_NAMES = (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"))
AGAIN = "copy or convert the model again"


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer: module path, decoder layer index, file, experts, record size, (name, rows, columns) of matrices;
    packing: one for each matrix, but none with the trellis and qmoe; coding: of all matrices with qmoe, or None;
    slot_bytes: of a coded record, what it takes in memory, else 0. A layer whose matrices are not those of experts is a
    whole decoder layer: one record, always chosen.

    Raises:
        FormatError: a field has the wrong type, is out of bounds, or contradicts another.
    """

    path: str
    layer: int
    file: str
    experts: int
    record_bytes: int
    matrices: tuple[tuple[str, int, int], ...]
    bias: bool
    packing: tuple[Packing, ...] = ()
    coding: qmoe.Coding | None = None
    slot_bytes: int = 0

    def __post_init__(self) -> None:
        fine = type(self.path) is str and bool(re.fullmatch(r"[\w.]{1,256}", self.path, re.ASCII))
        _check(fine, "path should be a module's path", self.path)
        _check_int(self.layer, 0, MAX_LAYERS - 1, f"the layer index of {self.path}")
        _check(self.file == expert_file_name(self.layer), f"file should be {expert_file_name(self.layer)}", self.file)
        _check_int(self.experts, 1, MAX_EXPERTS, f"experts of {self.path}")
        _check_int(self.record_bytes, UNIT, MAX_RECORD, f"record_bytes of {self.path}")
        _check(type(self.bias) is bool, f"bias of {self.path} should be true or false", self.bias)
        _check_int(self.slot_bytes, 0, MAX_RECORD, f"slot_bytes of {self.path}")
        _check_matrices(self)

    @property
    def coded(self) -> bool:
        """Whether a record has to be decoded before it is computed with."""
        return self.slot_bytes > 0

    @property
    def slot(self) -> int:
        """Bytes that a record takes in memory."""
        return self.slot_bytes or self.record_bytes

    @property
    def whole(self) -> bool:
        """Whether the layer is a whole decoder layer of a dense model, not one of experts."""
        return tuple(name for name, _, _ in self.matrices) not in MATRIX_NAMES

    @property
    def expands(self) -> bool:
        """Whether a record is decoded when it is read, into a record of codec affine; those of whole decoder layers are
        when they are used.
        """
        return self.coded and not self.whole

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of each matrix, as codecs.trellis.parse takes them."""
        return [(rows, columns) for _, rows, columns in self.matrices]

    @property
    def weights(self) -> int:
        """Expert weights of the layer, without padding and biases."""
        return self.experts * sum(rows * columns for rows, columns in self.shapes)

    @property
    def checksums(self) -> int:
        """Checksums of one record."""
        return -(-self.record_bytes // CHECKSUM_BYTES)

    @property
    def data_bytes(self) -> int:
        """Bytes of records and checksums: the file without its header."""
        return self.experts * (self.record_bytes + 8 * self.checksums)

    def to_dict(self) -> dict[str, Any]:
        """The object that stands in config.json."""
        found = {**asdict(self), "matrices": [list(m) for m in self.matrices]}
        own = {key: found.pop(key) for key in ("packing", "coding", "slot_bytes")}
        return found | {key: list(value) if key == "packing" else value for key, value in own.items() if value}

    @staticmethod
    def from_dict(value: Any) -> "LayerSpec":
        """Read an object of config.json.

        Raises:
            FormatError: a key is missing, or a value is not what it should be.
        """
        found = _fields(LayerSpec, value, "a layer")
        matrices, packing, coding = found["matrices"], found.get("packing", []), found.get("coding")
        _check(type(matrices) is list and all(type(m) is list for m in matrices), "matrices should be lists", matrices)
        _check(type(packing) is list, "packing should be a list", packing)
        found["packing"] = tuple(Packing(**_fields(Packing, p, "packing")) for p in packing)
        found["coding"] = None if coding is None else qmoe.Coding(**_fields(qmoe.Coding, coding, "coding"))
        return LayerSpec(**{**found, "matrices": tuple(tuple(m) for m in matrices)})


def _check_codec(codec: str, layer: LayerSpec) -> None:
    """A layer has what its codec asks for, and nothing of another's."""
    packed = bool(layer.packing) == (codec not in (CODEC, QMOE))
    _check(packed, f"{layer.path} should have a packing unless codec is {CODEC} or {QMOE}", layer.packing)
    given = (layer.coding is not None) == (codec == QMOE)
    _check(given, f"{layer.path} should have a coding if and only if codec is {QMOE}", layer.coding)
    coded = layer.coded == (codec in CODED)
    _check(coded, f"{layer.path} should have slot_bytes if and only if codec is one of {CODED}", layer.slot_bytes)
    for own in layer.packing:
        fine = {AFFINE: own.mode not in OTHERS, TINY: own.mode == "levels"}.get(codec, own.mode != "levels")
        _check(fine, f"packing of {layer.path} should be one of codec {codec}", own.mode)


@dataclass(frozen=True)
class ModelSpec:
    """The `tiny_qmoe` object of config.json; `source` and `calibration` are plain dictionaries as in FORMAT.md.

    Raises:
        FormatError: a field has the wrong type, is out of bounds, or contradicts another.
    """

    format_version: int
    codec: str
    bits: float
    alignment: int
    length: int
    seed: int
    layers: tuple[LayerSpec, ...]
    source: dict[str, Any]
    calibration: dict[str, Any]

    def __post_init__(self) -> None:
        check_version(self.format_version, CONFIG)
        _check(self.codec in CODECS, f"codec should be one of {CODECS}", self.codec)
        _check(type(self.bits) in (int, float) and 0 < self.bits <= 64, "bits should lie in 0 to 64", self.bits)
        _check(self.alignment in ALIGNMENTS, f"alignment should be one of {ALIGNMENTS}", self.alignment)
        if self.codec != CODEC:
            fine = self.length == 0 and self.seed == 0
            _check(fine, f"length and seed of codec {self.codec} should be 0", self.length)
        else:
            _check(self.length in LENGTHS, f"length (of the trellis) should be one of {LENGTHS}", self.length)
        _check_int(self.seed, 0, 2**32 - 1, "seed")
        _check(0 < len(self.layers) <= MAX_LAYERS, f"layers should be 1 to {MAX_LAYERS}", len(self.layers))
        for layer in self.layers:
            fits = layer.record_bytes % self.alignment == 0
            _check(fits, f"record_bytes of {layer.path} should be a multiple of {self.alignment}", layer.record_bytes)
            _check_codec(self.codec, layer)
        kinds = {layer.whole for layer in self.layers}
        _check(len(kinds) == 1, "layers should all be of experts, or all whole decoder layers", sorted(kinds))
        for key in ("path", "layer"):
            values = [getattr(layer, key) for layer in self.layers]
            _check(len(set(values)) == len(values), f"every layer's {key} should be its own", values)
        _check_texts(self.source, "source", "model", "revision")
        _check_texts(self.calibration, "calibration", "source", None)
        _check_int(self.calibration.get("tokens"), 0, 2**62, "tokens of calibration")

    def to_dict(self) -> dict[str, Any]:
        """The object that stands in config.json."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "layers": [layer.to_dict() for layer in self.layers]}

    @staticmethod
    def from_dict(value: Any) -> "ModelSpec":
        """Read the object of config.json.

        Raises:
            FormatError: a key is missing, or a value is not what it should be.
        """
        if type(value) is dict:
            check_version(value.get("format_version"), CONFIG)  # before keys that another version may not have
        found = _fields(ModelSpec, value, "tiny_qmoe")
        _check(type(found["layers"]) is list, "layers should be a list", found["layers"])
        return ModelSpec(**{**found, "layers": tuple(map(LayerSpec.from_dict, found["layers"]))})


def expert_file_name(layer: int) -> str:
    """Name of the experts file of a decoder layer."""
    return f"model-experts-{layer:05d}.safetensors"


def bits_per_weight(layers: Iterable[LayerSpec], alignment: int) -> float:
    """Bits of the experts files per expert weight, headers, side information, padding and checksums counted."""
    layers = list(layers)
    total = sum(len(file_header(layer, alignment)) + layer.data_bytes for layer in layers)
    return 8 * total / sum(layer.weights for layer in layers)


def file_tensors(layer: LayerSpec) -> dict[str, Any]:
    """The two tensors of an experts file, as a safetensors header describes them."""
    records = layer.experts * layer.record_bytes
    tensors = {
        "records": ("U8", [layer.experts, layer.record_bytes], [0, records]),
        "checksums": ("U64", [layer.experts, layer.checksums], [records, layer.data_bytes]),
    }
    keys = ("dtype", "shape", "data_offsets")
    return {f"{layer.path}.{name}": dict(zip(keys, values, strict=True)) for name, values in tensors.items()}


def file_header(layer: LayerSpec, alignment: int) -> bytes:
    """Length and header of an experts file, padded with spaces so that the data after it is aligned."""
    text = json.dumps(file_tensors(layer), separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def _check(fine: bool, rule: str, received: Any) -> None:
    if not fine:
        raise FormatError(f"[{CONFIG}] {rule}, received {_shown(received)}; {AGAIN}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_int(value: Any, low: int, high: int, name: str) -> None:
    _check(type(value) is int and low <= value <= high, f"{name} should be an integer in {low} to {high}", value)


def check_version(value: Any, where: str) -> None:
    if type(value) is int and value > FORMAT_VERSION:
        raise FormatError(
            f"[{where}] format version {FORMAT_VERSION} is read here, received version {_shown(value)}; "
            "install a newer tiny-qmoe-mlx, or convert the model again."
        )
    if type(value) is not int or value != FORMAT_VERSION:
        raise FormatError(f"[{where}] format_version should be {FORMAT_VERSION}, received {_shown(value)}; {AGAIN}.")


def _check_matrices(spec: LayerSpec) -> None:
    matrices = spec.matrices
    names = tuple(m[0] for m in matrices if len(m) == 3)
    fine = len(names) == len(matrices) and (names in MATRIX_NAMES or (spec.coded and _names_are_fine(names)))
    _check(fine, f"matrices should be one of {MATRIX_NAMES}", matrices)
    for name, rows, columns in matrices:
        _check_int(rows, 1, MAX_DIMENSION, f"rows of {spec.path}.{name}")
        _check_int(columns, 1, MAX_DIMENSION, f"columns of {spec.path}.{name}")
    if spec.coded:
        _check_coded(spec)
        return
    _check_fit(spec)
    least = UNIT + sum(side_bytes(rows, columns, False, spec.bias) for rows, columns in spec.shapes)
    if spec.packing:
        _check_packing(spec)
        least = layout(tuple(spec.shapes), spec.packing)[1]
    if spec.coding is not None:
        problem = spec.coding.problem()
        _check(not problem, f"coding of {spec.path}: {problem}", spec.coding)
        least = qmoe.least_bytes(spec.shapes, spec.coding, spec.bias)
    _check(spec.record_bytes >= least, f"record_bytes of {spec.path} should be at least {least}", spec.record_bytes)


def _names_are_fine(names: tuple[Any, ...]) -> bool:
    """Whether they can be the paths of a decoder layer's matrices."""
    texts = all(type(name) is str and re.fullmatch(r"[\w.]{1,256}", name, re.ASCII) for name in names)
    return texts and 0 < len(names) <= MAX_MATRICES and len(set(names)) == len(names)


def _check_coded(spec: LayerSpec) -> None:
    """A layer whose records are coded: of whole decoder layers, or of experts that are decoded when they are read."""
    _check_packing(spec)
    least = spec.record_bytes
    if spec.whole:
        _check(spec.experts == 1 and not spec.bias, f"{spec.path} should be one record without biases", spec.experts)
    else:
        _check_fit(spec)
        least = layout(tuple(spec.shapes), spec.packing)[1]
    fine = spec.slot_bytes >= least and spec.slot_bytes % UNIT == 0
    _check(fine, f"slot_bytes of {spec.path} should be a multiple of {UNIT} from {least} on", spec.slot_bytes)


def _check_fit(spec: LayerSpec) -> None:
    """Matrices of experts fit one another."""
    matrices = spec.matrices
    first, last = matrices[0], matrices[-1]
    fits = all(m[1:] == first[1:] for m in matrices[:-1]) and last[2] == first[1]
    _check(fits, f"the matrices of {spec.path} should fit one another", matrices)


def _check_packing(spec: LayerSpec) -> None:
    _check(len(spec.packing) == len(spec.matrices), f"packing of {spec.path} should have one per matrix", spec.packing)
    for (name, _, columns), own in zip(spec.matrices, spec.packing, strict=True):
        problem = own.problem(columns)
        _check(not problem, f"packing of {spec.path}.{name}: {problem}", own)
        _check(bool(own.bias) == spec.bias, f"packing of {spec.path}.{name} should have a bias type: {spec.bias}", own)


def _check_texts(value: Any, name: str, required: str, optional: str | None) -> None:
    fine = type(value) is dict and type(value.get(required)) is str
    _check(fine, f'{name} should be an object with a text "{required}"', value)
    if optional:
        _check(type(value.get(optional)) in (str, type(None)), f"{optional} of {name} should be a text or null", value)


def _fields(kind: Any, value: Any, name: str) -> dict[str, Any]:
    """Those keys of an object that a dataclass has; the ones without a default must be there."""
    keys = tuple(f.name for f in fields(kind) if f.default is MISSING)
    _check(type(value) is dict and all(k in value for k in keys), f"{name} should be an object with {keys}", value)
    return {f.name: value[f.name] for f in fields(kind) if f.name in value}
