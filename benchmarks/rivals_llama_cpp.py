"""llama.cpp's block types through its own quantizer, called by ctypes out of libggml-base.

The library comes with the `llama-cpp-python` package, or from a build of llama.cpp's target `ggml-base` whose path
`use` is given. K and IQ types need rows of a multiple of 256. `file_type` does what `llama-quantize --imatrix` does,
down to the larger types that narrower rows and some layers get (llama-quant.cpp of llama-cpp-python 0.3.36). `joined`
rounds every matrix in the one type: rows are joined until 256 divides them. llama.cpp cannot run that; it shows what
the type itself is worth at its own size.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from dense_llama import Dense, Matrices

BLOCK = 256
# A file type: type of gate and up; of down in the first layers; in the others; the first layers' share of all is 1 / n
FILES = {
    "Q2_K": ("Q2_K", "Q3_K", "Q3_K", 8),
    "Q3_K_S": ("Q3_K", "Q3_K", "Q3_K", 8),
    "Q3_K_M": ("Q3_K", "Q5_K", "Q4_K", 16),
    "IQ2_XXS": ("IQ2_XXS", "Q2_K", "IQ2_XXS", 8),
    "IQ2_XS": ("IQ2_XS", "Q2_K", "IQ2_XS", 8),
    "IQ2_S": ("IQ2_XS", "IQ3_S", "IQ2_XS", 8),
    "IQ2_M": ("IQ2_S", "IQ3_S", "IQ2_S", 8),
    "IQ3_XXS": ("IQ3_XXS", "IQ3_XXS", "IQ3_XXS", 8),
    "IQ3_S": ("IQ3_S", "IQ3_S", "IQ3_S", 8),
}
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1"}  # IQ types: IQ4_NL
JOINED = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS")

Rounded = tuple[list[Matrices], float]
TypeOf = Callable[[int, int, int], str]  # (layer, 0 to 2 for gate, up, down, columns) -> a ggml type's name


@cache
def library(path: str | None = None) -> ctypes.CDLL:
    """libggml-base, from the path or out of the installed package; loaded once.

    Raises:
        ModuleNotFoundError: no path was given and llama-cpp-python is not installed.
        OSError: the file cannot be loaded.
    """
    if path is None:
        spec = find_spec("llama_cpp")  # found, not imported
        folders = [Path(p) / "lib" for p in (spec.submodule_search_locations or [])] if spec else []
        found = [p for folder in folders for p in sorted(folder.glob("*ggml-base*")) if p.suffix in (".so", ".dylib")]
        if not found:
            raise ModuleNotFoundError(
                "[rivals] llama.cpp's rows need its quantizer, llama-cpp-python is not installed: "
                "pip install llama-cpp-python, or --ggml PATH of a libggml-base."
            )
        path = str(found[0])
    loaded = ctypes.CDLL(path)
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return loaded


_chosen: list[str] = []


def use(path: str | None) -> None:
    """Take the library from this path instead of the installed package.

    Raises:
        OSError: the file cannot be loaded.
    """
    _chosen[:] = [path] if path else []
    if path:
        library(path)


def round_matrix(w: np.ndarray, name: str, importance: np.ndarray) -> tuple[np.ndarray, int]:
    """A matrix after a trip through a ggml type, float32, and the type's bits for it.

    Args:
        w: float32 (rows, columns).
        name: of the type, as "IQ2_XXS".
        importance: float (columns,), mean square of the inputs.

    Raises:
        ValueError: the type's block does not divide the columns.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    if w.shape[1] % block:
        raise ValueError(f"[rivals] columns should be a multiple of {block} for {name}, received {w.shape[1]}.")
    w, importance = (np.ascontiguousarray(a, np.float32) for a in (w, importance))
    data = np.zeros((len(w), w.shape[1] // block * size), np.uint8)
    quantize = library(_chosen[0] if _chosen else None).ggml_quantize_chunk
    quantize(kind.value, w.ctypes.data, data.ctypes.data, 0, *w.shape, importance.ctypes.data)
    return dequantize(data, kind).astype(np.float32), 8 * data.nbytes


def file_type(model: Dense, tokens: np.ndarray, name: str) -> Rounded:
    """Feed-forward weights as `llama-quantize --imatrix` writes them for a file type, and their bits."""
    general, first, others, share = FILES[name]

    def type_of(layer: int, part: int, columns: int) -> str:
        down = first if layer < len(model.layers) // share else others
        wanted = down if part == 2 else general
        return wanted if columns % BLOCK == 0 else FALLBACKS.get(wanted, "IQ4_NL")

    return _round(model, tokens, type_of)


def joined(model: Dense, tokens: np.ndarray, name: str) -> Rounded:
    """All feed-forward weights in one type, narrow rows joined to multiples of 256."""
    return _round(model, tokens, lambda layer, part, columns: name, join=True)


def _round(model: Dense, tokens: np.ndarray, type_of: TypeOf, join: bool = False) -> Rounded:
    out, spent, count = [], 0, 0
    for i, (outer, inner) in enumerate(importances(model, tokens)):
        out.append([])
        for part, w in enumerate(model.feed_forward(i)):
            rows = BLOCK // math.gcd(BLOCK, w.shape[1]) if join else 1
            importance = np.tile(inner if part == 2 else outer, rows)
            values, bits = round_matrix(w.reshape(-1, rows * w.shape[1]), type_of(i, part, w.shape[1]), importance)
            out[-1].append(values.reshape(w.shape))
            spent, count = spent + bits, count + w.size
    return out, spent / count


_importances: dict[tuple[int, bytes], list[tuple[np.ndarray, np.ndarray]]] = {}


def importances(model: Dense, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the mean squares of what gate and up read, (d,), and of what down reads, (w,), in the original model.

    That is llama.cpp's importance matrix. Kept for the next call: it takes a run over all tokens.
    """
    key = (id(model), tokens.tobytes())
    if key not in _importances:
        _importances.clear()
        _importances[key] = []
        x = model.embed(tokens)
        for i in range(len(model.layers)):
            x = model.attend(i, x)
            z = model.ffn_input(i, x)
            gate, up, down = model.feed_forward(i)
            mid = model.ffn_hidden(i, gate, up, z)
            _importances[key].append(((z * z).mean((0, 1)), (mid * mid).mean((0, 1))))
            x = model.join(i, x, mid @ down.T)
    return _importances[key]
