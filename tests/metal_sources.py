"""Write the Metal text of every kernel, as MLX compiles it, to a folder: `python tests/metal_sources.py FOLDER`.

On a Mac, `xcrun metal -I INCLUDE -c FILE` compiles each, INCLUDE being what this program prints; MLX itself puts the
contents of that header in front.
"""

import sys
from pathlib import Path

import mlx.core as mx
from kernel_launches import every_call
from metal_cpu import capture

HEADER = '#include "mlx/backend/metal/kernels/utils.h"\n'


def write_sources(folder: Path) -> list[Path]:
    """One file for each different text; named by the kernel and a number."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for call in every_call():
        for launch in capture(call.function, *call.arrays):
            texts.setdefault(launch.source, launch.name)
    files = [folder / f"{i:03}_{name[:100]}.metal" for i, name in enumerate(texts.values())]
    for file, text in zip(files, texts, strict=True):
        file.write_text(HEADER + text, encoding="utf-8")
    return files


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_sources(Path(sys.argv[1]))
    print(Path(mx.__file__).parent / "include")
