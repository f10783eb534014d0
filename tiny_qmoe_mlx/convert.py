"""`python -m tiny_qmoe_mlx.convert`: compress a checkpoint's experts and write a directory that `generate` runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import terminal

EXAMPLES = """
  python -m tiny_qmoe_mlx.convert --hf-path Qwen/Qwen3-30B-A3B --mlx-path qwen3-2bit --bits 2.0
  python -m tiny_qmoe_mlx.convert --hf-path ./olmoe --mlx-path olmoe-1.5bit --bits 1.5 --calibration my.txt
"""


def convert(hf_path: str | Path, mlx_path: str | Path, **options: Any) -> Path:
    """Convert a checkpoint; see `conversion.convert` for the arguments and what it raises.

    Args:
        hf_path: directory or hub id of the original.
        mlx_path: directory to write.
        options: fields of `conversion.Settings` (bits, rest_bits, calibration, ...), and overwrite and progress.

    Returns:
        The directory written.
    """
    from tiny_qmoe_mlx import conversion

    own = {key: options.pop(key) for key in ("overwrite", "progress") if key in options}
    return conversion.convert(hf_path, mlx_path, conversion.Settings(**options), **own)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("convert", __doc__.split(": ", 1)[1], EXAMPLES)
    p.add_argument("--hf-path", required=True, metavar="DIR|HUB_ID", help="the original checkpoint")
    p.add_argument(
        "--mlx-path", required=True, metavar="DIR", help="the directory to write; it appears when it is whole"
    )
    p.add_argument(
        "--bits",
        type=float,
        default=2.0,
        help="bits per expert weight in the file, everything counted: 0.5 to 4 (default 2.0)",
    )
    p.add_argument(
        "--rest-bits",
        type=int,
        default=8,
        help="bits of attention, shared experts, embeddings: 4, 6, 8, 16 (default 8); routers keep 16",
    )
    p.add_argument("--codec", choices=["trellis"], default="trellis", help="how experts are coded (default trellis)")
    p.add_argument(
        "--calibration",
        default="builtin",
        metavar="FILE|builtin|none",
        help="UTF-8 text that errors are weighed by (default builtin: general English that comes with the package; "
        "none: all weights count alike)",
    )
    p.add_argument(
        "--calibration-sequences", type=int, default=64, help="how many stretches of the text are used (default 64)"
    )
    p.add_argument("--calibration-tokens", type=int, default=256, help="tokens of a stretch (default 256)")
    p.add_argument(
        "--trellis-length",
        type=int,
        default=12,
        help="12, 14, 16: up to 0.2 dB better, 4 or 16 times slower to convert (default 12)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the rotation's signs (default 0)")
    p.add_argument("--overwrite", action="store_true", help="replace a converted model that stands at --mlx-path")
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    with terminal.Bars(args.quiet or args.json) as bars:
        out = convert(
            args.hf_path,
            args.mlx_path,
            bits=args.bits,
            rest_bits=args.rest_bits,
            length=args.trellis_length,
            calibration=args.calibration,
            sequences=args.calibration_sequences,
            sequence_tokens=args.calibration_tokens,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=bars,
        )
    from tiny_qmoe_mlx.container import sizes

    found = sizes(out)
    if args.json:
        terminal.print_json(found)
    else:
        print(f"{out}: experts at {found['bits']:.3f} bits per weight, {found['file_bytes'] / 1e6:.1f} MB in all")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
