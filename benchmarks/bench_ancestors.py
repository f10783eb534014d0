"""The codes of the two papers that this project grew out of, beside what they claim.

    python benchmarks/bench_ancestors.py [qmoe ...] [--quick] [--json]

`PARTS` maps a paper's name to a function (quick) -> plain values; it prints its tables.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import ancestors_qmoe

PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {"qmoe": ancestors_qmoe.show}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rows of random weights")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"parts should be of {', '.join(PARTS)}; received {unknown[0]!r}")
    found = {name: PARTS[name](args.quick) for name in args.parts or PARTS}
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
