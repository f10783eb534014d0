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
        options: fields of `settings.Settings` (bits, rest_bits, calibration, ...), and what else `conversion.convert`
            takes (overwrite, progress, revision, stream_shards, upload_repo).

    Returns:
        The directory written.
    """
    from tiny_qmoe_mlx.conversion import run as conversion
    from tiny_qmoe_mlx.conversion.settings import Settings

    own = {key: options.pop(key) for key in list(options) if key not in Settings.__dataclass_fields__}
    return conversion.convert(hf_path, mlx_path, Settings(**options), **own)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("convert", __doc__.split(": ", 1)[1], EXAMPLES)
    p.add_argument("--hf-path", required=True, metavar="DIR|HUB_ID", help="the original checkpoint")
    p.add_argument(
        "--mlx-path",
        required=True,
        metavar="DIR",
        help="the directory to write; it appears when it is whole, and a run that was stopped goes on where it was",
    )
    p.add_argument(
        "--bits",
        type=float,
        help="bits per expert weight in the file, everything counted: 0.5 to 4 (default 2.0; codec qmoe: 1.5 for "
        "ternary weights, the default, or 2 for four levels)",
    )
    p.add_argument(
        "--rest-bits",
        type=int,
        default=8,
        help="bits of attention, shared experts, embeddings: 4, 6, 8, 16 (default 8); routers keep 16",
    )
    p.add_argument(
        "--codec",
        choices=["trellis", "affine", "qmoe", "tiny-qmoe", "lossless"],
        default="trellis",
        help="how experts are coded (default trellis); affine keeps the codes of a quantized checkpoint bit for bit "
        "and quantizes others to --bits 2, 3, 4, 5, 6 or 8; qmoe is QMoE's code (2310.16795); tiny-qmoe rounds a dense "
        "model to 8 bits (2509.22951); lossless shrinks a dense model, or quantized experts, without changing a weight",
    )
    p.add_argument(
        "--codewords",
        choices=["dictionary", "tunstall-8", "tunstall-12", "tunstall-16"],
        default="dictionary",
        help="of codec qmoe: its dictionary (the default), or Tunstall's code with codewords of so many bits, which is "
        "made for each matrix's share of zeros and smaller",
    )
    p.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="columns of a row that share a scale with --codec tiny-qmoe: 128, or 0 for one of a whole matrix",
    )
    p.add_argument(
        "--coder",
        choices=["tuples", "rans"],
        default="tuples",
        help="of the codes of --codec tiny-qmoe: the paper's table of 4-tuples, which is hardly ever smaller than the "
        "codes themselves (they are then kept), or an entropy coder",
    )
    p.add_argument(
        "--calibration",
        default="auto",
        metavar="FILE|self|builtin|none",
        help="what errors are weighed by: a UTF-8 text, or chats (.jsonl), self: what the original writes when it is "
        "sampled, builtin: general English that comes with the package, none: all weights count alike (default: self "
        "where the original fits this machine's memory, else builtin)",
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
    p.add_argument("--no-drift", action="store_true", help="do not make up for what earlier layers lost")
    p.add_argument("--layer-rates", action="store_true", help="more bits for layers that a probe of KL found to matter")
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument(
        "--stream-shards",
        action="store_true",
        help="fetch a hub id's weights shard by shard and keep a shard only while it is needed",
    )
    p.add_argument("--upload-repo", metavar="ORG/NAME", help="send each finished file to this repository of the hub")
    p.add_argument(
        "--finetune-gains",
        action="store_true",
        help="train gains and norms against the original at the end: better below 3 bits, minutes to hours; also of a "
        "model that is converted already",
    )
    p.add_argument(
        "--report",
        choices=["quick", "full", "none"],
        default="quick",
        help="what is measured for the model's card: perplexity and KL divergence (default), generated JSON and tool "
        "calls too, or nothing; with --stream-shards nothing, as the original is gone",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a converted model that stands at --mlx-path")
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from tiny_qmoe_mlx.report import write as report

    with terminal.Bars(args.quiet or args.json) as bars:
        out = convert(
            args.hf_path,
            args.mlx_path,
            bits=args.bits if args.bits is not None else 1.5 if args.codec == "qmoe" else 2.0,
            rest_bits=args.rest_bits,
            length=args.trellis_length,
            calibration=args.calibration,
            sequences=args.calibration_sequences,
            sequence_tokens=args.calibration_tokens,
            codec=args.codec,
            codewords=args.codewords,
            group=args.group_size,
            coder=args.coder,
            drift=not args.no_drift,
            layer_rates=args.layer_rates,
            seed=args.seed,
            revision=args.revision,
            stream_shards=args.stream_shards,
            upload_repo=args.upload_repo,
            finetune=args.finetune_gains,
            extent=None if args.stream_shards else {"quick": report.QUICK, "full": report.Extent()}.get(args.report),
            overwrite=args.overwrite,
            progress=bars,
        )
    from tiny_qmoe_mlx.container import sizes

    found = sizes(out)
    if args.json:
        terminal.print_json(found)
    else:
        print(f"{out}: experts at {found['bits']:.3f} bits per weight, {found['file_bytes'] / 1e6:.1f} MB in all")
        for method, part in report.read_quality(out).get("coding", {}).items():  # which of them grew, and were kept
            print(f"  {part['planes']} planes of bytes by {method}, {part['bytes'] / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
