"""On Linux, lets MLX's CPU backend multiply with the OpenBLAS that numpy's wheel ships.

MLX's CPU wheel links the reference BLAS: about 4 GFLOP/s where OpenBLAS reaches 200 and more on the same two cores. The
library kernels/cpu/blas_shim.cpp answers for MLX's `cblas_sgemm`, if it is loaded before MLX. macOS has Accelerate:
nothing is done there.
"""

import ctypes
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHIM = "libtiny_qmoe_blas.so"


def _numpy_sgemm() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    found = find_spec("numpy")  # not imported: a command's --help needs no numpy
    folder = Path(found.origin).parent.parent / "numpy.libs" if found and found.origin else Path()
    for library in sorted(folder.glob("libscipy_openblas64_*")):
        return getattr(ctypes.CDLL(str(library)), "scipy_cblas_sgemm64_", None)
    return None


@cache
def install() -> str:
    """Load the shim, once, and say in a few words which BLAS MLX uses for dense float32 products."""
    if sys.platform != "linux":
        return "MLX's own"
    package = Path(__file__).resolve().parent
    shim = next((p for p in (package / "lib" / SHIM, package.parent / "build" / SHIM) if p.is_file()), None)
    if shim is None:
        return "MLX's reference BLAS (tiny-qmoe-mlx was installed without a compiler)"
    if "mlx.core" in sys.modules:
        return "MLX's reference BLAS (mlx was imported before tiny_qmoe_mlx)"
    sgemm = _numpy_sgemm()
    if sgemm is None:
        return "MLX's reference BLAS (numpy was not installed from its wheel)"
    library = ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    library.tq_blas_set_target.argtypes = [ctypes.c_void_p]
    library.tq_blas_set_target(ctypes.cast(sgemm, ctypes.c_void_p))
    return "numpy's OpenBLAS"


def shared_machine() -> Any:
    """Context in which BLAS takes half of the cores: its threads spin at barriers, and where one has lost its core to
    another program all wait, ten times as long as one thread alone would take."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(max(1, (os.cpu_count() or 2) // 2), "blas")
