"""`python -m tiny_qmoe_mlx.doctor`: is this machine computing right, and how fast: kernels, disk, memory, versions."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_qmoe_mlx import terminal
from tiny_qmoe_mlx.generate_options import require_writable
from tiny_qmoe_mlx.staging import check_space, write_named

EXAMPLES = """
  python -m tiny_qmoe_mlx.doctor
  python -m tiny_qmoe_mlx.doctor --quick --record m3-max.json
"""
RECORD_BYTES = 1 << 20
PROBE_BYTES = 1 << 30


def examine(folder: Path, quick: bool = False, bars: Any = lambda what, done, total: None) -> dict[str, Any]:
    """Everything that `doctor` reports.

    Args:
        folder: a directory on the disk that models lie on; a probe file of 1 GB (quick: 64 MB) is written and removed.
        quick: fewer shapes and reads.
        bars: progress, called with (what, done, total).

    Returns:
        machine, checks (name, error, tolerance, passed), preadv_reaches_gpu, round_trip_s, speed (per model), disk,
        passed.
    """
    from tiny_qmoe_mlx import blas, probes

    checks = list(_checks(bars))
    names = list(probes.MODELS)[:2] if quick else list(probes.MODELS)
    speed = {}
    for i, name in enumerate(names):
        speed[name] = probes.speed(name, runs=7 if quick else 15)
        bars("timing products", i + 1, len(names))
    size = PROBE_BYTES // 16 if quick else PROBE_BYTES
    check_space(folder, size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tiny-qmoe-doctor-") as scratch:
        reaches = probes.preadv_reaches_the_gpu(Path(scratch))
        disk = probes.disk(Path(scratch), RECORD_BYTES, size, 64 if quick else 256)
    return {
        "machine": {**probes.machine(), "dense_products": blas.install()},
        "checks": checks,
        "preadv_reaches_device": reaches,
        "round_trip_s": probes.round_trip(),
        "speed": speed,
        "disk": disk,
        "passed": reaches and all(check["passed"] for check in checks),
    }


def _checks(bars: Any) -> Iterator[dict[str, Any]]:
    """Every rate, trellis length and type of activations, few tokens and many, codec qmoe, and rANS, against the numpy
    specifications.
    """
    import mlx.core as mx

    from tiny_qmoe_mlx import ops, probes, qmoe_probe, rans_probe

    types = (mx.float16, mx.bfloat16, mx.float32) if ops.on_gpu() else (mx.float32,)
    cases = [(rate, length, 1, types[0], False) for rate in (*range(1, 8), None) for length in (12, 14, 16)]
    cases += [(None, 12, tokens, dtype, bias) for tokens in (1, 3, 8, 20) for dtype in types for bias in (False, True)]
    for i, (rate, length, tokens, dtype, bias) in enumerate(cases):
        error = probes.kernel_error(rate, length, tokens, dtype, bias)
        bars("checking kernels", i + 1, len(cases))
        kind = "all rates" if rate is None else f"rate {rate}"
        name = f"{kind}, L {length}, {tokens} tokens, {str(dtype).split('.')[-1]}{', biases' if bias else ''}"
        limit = probes.TOLERANCE[dtype]
        yield {"name": name, "error": error, "tolerance": limit, "passed": error <= limit}
    for coding in qmoe_probe.CODINGS:
        for dtype in types:
            error, limit = qmoe_probe.error(coding, dtype), probes.TOLERANCE[dtype]
            name = f"qmoe, {coding.grid}, {coding.code} of {coding.bits} bits, {str(dtype).split('.')[-1]}"
            yield {"name": name, "error": error, "tolerance": limit, "passed": error <= limit}
    wrong = rans_probe.error()
    yield {"name": "rANS, share of wrong bytes", "error": wrong, "tolerance": 0.0, "passed": wrong == 0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("doctor", __doc__.split(": ", 1)[1], EXAMPLES)
    p.add_argument("--record", metavar="FILE", help="write everything as JSON, to keep or to send")
    p.add_argument("--quick", action="store_true", help="fewer shapes and reads: well under a minute")
    p.add_argument(
        "--folder", metavar="DIR", default=".", help="where the disk is probed (default: here); needs 1 GB for a moment"
    )
    terminal.add_quiet(p)
    terminal.add_json(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command; exit status 1 where a kernel is wrong."""
    args = parser().parse_args(argv)
    if not Path(args.folder).is_dir():
        raise ValueError(f"[doctor] --folder should be a directory, received {args.folder}.")
    require_writable("--record", args.record)
    with terminal.Bars(args.quiet or args.json) as bars:
        found = examine(Path(args.folder), args.quick, bars)
    if args.record:
        write_named(Path(args.record), found)
    if args.json:
        terminal.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0 if found["passed"] else 1


def _lines(found: dict[str, Any]) -> Iterator[str]:
    m = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in m["packages"].items() if number)
    yield f"{m['chip']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.1f} GB; {m['system']}, Python {m['python']}"
    yield f"{packages}; {m['device']}"
    yield f"CPU kernels: {m['cpu_kernels'] or 'numpy'}; dense products by {m['dense_products']}"
    wrong = [check for check in found["checks"] if not check["passed"]]
    worst = max(check["error"] for check in found["checks"])
    yield f"kernels     {len(found['checks']) - len(wrong)} of {len(found['checks'])} right, largest error {worst:.1e}"
    for check in wrong:
        yield f"  WRONG     {check['name']}: error {check['error']:.2e}, allowed {check['tolerance']:.0e}"
    yield f"preadv      {'reaches' if found['preadv_reaches_device'] else 'DOES NOT REACH'} the device"
    yield f"round trip  {1e6 * found['round_trip_s']:.0f} us for one mx.eval"
    yield "one token through one layer of experts, ours at 2 bits:"
    for name, times in found["speed"].items():
        ours, *others = times.items()
        rest = ", ".join(f"{other.replace('_', ' ')} {1e6 * t:.0f} us ({t / ours[1]:.2f}x)" for other, t in others)
        yield f"  {name:14} {1e6 * ours[1]:8.0f} us, {rest}"
    reads = ", ".join(f"{r['outstanding']}: {r['bytes_per_s'] / 1e9:.2f}" for r in found["disk"])
    yield f"disk        GB/s of random 1 MiB reads by how many at once: {reads}"
    if not found["disk"][0]["uncached"]:
        yield "            (through the page cache: this file system has no direct reads)"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
