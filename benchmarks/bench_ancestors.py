"""The codes of the two papers that this project grew out of, beside what they claim, and beside the trellis.

    python benchmarks/bench_ancestors.py [qmoe tiny-qmoe table dense] [--quick] [--folder DIR] [--calibration N]
                                         [--held-out N] [--json]

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
from dense_directories import LOADERS, Extent

PARTS: dict[str, Callable[[Extent], dict[str, Any]]] = {
    "qmoe": lambda extent: ancestors_qmoe.show(extent.quick),
    "tiny-qmoe": lambda extent: bench_tiny_qmoe.show(extent.quick),
    "table": ancestors_table.show,
    "dense": ancestors_dense.show,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rows of random weights, fewer models and tokens")
    parser.add_argument("--folder", type=Path, help="where converted models are kept (default: a temporary directory)")
    parser.add_argument("--calibration", type=int, help="stretches of 512 tokens of each of two texts (24; quick: 4)")
    parser.add_argument("--held-out", type=int, help="stretches of each that are predicted (8; quick: 1)")
    parser.add_argument("--rates", type=float, nargs="*", help="of dense: bits (1.5 2 3 4; quick: 2)")
    parser.add_argument("--models", nargs="*", choices=LOADERS, default=[*LOADERS], help="of dense (both)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"parts should be of {', '.join(PARTS)}; received {unknown[0]!r}")
    stretches = args.calibration or (4 if args.quick else 24), args.held_out or (1 if args.quick else 8)
    rates = tuple(args.rates or ((2.0,) if args.quick else Extent.rates))
    extent = Extent(args.folder, *stretches, rates, tuple(args.models), args.quick)
    found = {name: PARTS[name](extent) for name in args.parts or PARTS}
    if args.json:
        print(json.dumps({**found, "machine": machine()}))


if __name__ == "__main__":
    main()
