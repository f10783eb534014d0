"""The codes of the two papers that this project grew out of, beside what they claim, and beside the trellis.

    python benchmarks/bench_ancestors.py [qmoe tiny-qmoe table dense] [--quick] [--folder DIR] [--json]

qmoe: QMoE's code on random ternary weights. tiny-qmoe: the published sizes, and rates on SmolLM2-135M's real weights.
table: every code as a converted model, bits, KL and tokens a second side by side. dense: a Llama and a Gemma in the
trellis, streamed. The last two convert models (minutes each; an hour for all), and keep them in --folder.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ancestors_dense
import ancestors_qmoe
import ancestors_table
import bench_tiny_qmoe
from common import machine

PARTS: dict[str, Callable[[bool, Path | None], dict[str, Any]]] = {
    "qmoe": lambda quick, folder: ancestors_qmoe.show(quick),
    "tiny-qmoe": lambda quick, folder: bench_tiny_qmoe.show(quick),
    "table": ancestors_table.show,
    "dense": ancestors_dense.show,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rows of random weights, fewer models and tokens")
    parser.add_argument("--folder", type=Path, help="where converted models are kept (default: a temporary directory)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"parts should be of {', '.join(PARTS)}; received {unknown[0]!r}")
    found = {name: PARTS[name](args.quick, args.folder) for name in args.parts or PARTS}
    if args.json:
        print(json.dumps({**found, "machine": machine()}))


if __name__ == "__main__":
    main()
