"""Check every byte of a converted model: `python -m tiny_qmoe_mlx.verify --model DIR`.

The manifest's hashes cover all but the records, the checksums in the experts files cover those, and each record is then
taken apart with the config's shapes. Goes on after a problem, so that one run names all of them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tiny_qmoe_mlx import locate, model_file, native_rans, safetensors_header, terminal
from tiny_qmoe_mlx.codecs import affine, packed, qmoe, trellis, tuples
from tiny_qmoe_mlx.container import (
    CHECKSUM_BYTES,
    CONFIG,
    LOOSE,
    LayerSpec,
    ModelSpec,
    bits_per_weight,
    check_experts_header,
    check_hash,
    check_names,
    check_size,
    claim_experts,
    read_config,
    read_manifest,
    record_checksums,
)
from tiny_qmoe_mlx.disk_errors import named
from tiny_qmoe_mlx.disk_reads import read_array, read_into
from tiny_qmoe_mlx.errors import FormatError

BITS_TOLERANCE = 1e-3  # of the bits that config.json states: it may be rounded


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which file, and in a record also in which decoder layer and expert."""

    file: str
    problem: str
    layer: int | None = None
    expert: int | None = None


def find_problems(directory: str | Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[Problem]:
    """Check a converted model as its files are read; nothing is yielded when all of it is right.

    Args:
        directory: of the model.
        advance: called with the number of bytes that were checked since its last call.

    Raises:
        FormatError: no converted model is there, or its manifest cannot be trusted.
    """
    directory = Path(directory)
    files = read_manifest(directory)
    spec, layers, together = None, {}, safetensors_header.Together()
    try:
        config, spec = read_config(directory)
        layers = {layer.file: layer for layer in spec.layers}
        model_file.check_named(config, files)
        check_names(directory, files, layers)
        claim_experts(together, spec)
        yield from _check_bits(spec)
    except FormatError as error:
        yield Problem(CONFIG, str(error))
    for name, entry in files.items():
        if name in layers and spec is not None:
            yield from _check_experts(directory, layers[name], spec, entry, advance)
        elif name.endswith(LOOSE) and not (directory / name).exists():
            advance(entry["bytes"])
        elif "header_bytes" not in entry:  # an experts file that no readable config describes cannot be checked
            checks = check_size, check_hash, model_file.check_text, partial(_check_weights, together)
            yield from _caught(name, *checks, args=(directory, name, entry))
            advance(entry["bytes"])


def _check_weights(together: safetensors_header.Together, directory: Path, name: str, entry: object) -> None:
    """The header of a file of other weights, beside those before it."""
    if name.endswith(".safetensors"):
        together.add(directory / name)


def _caught(name: str, *checks: Callable[..., None], args: tuple[Any, ...]) -> Iterator[Problem]:
    """The first problem that the checks meet, if any."""
    try:
        for check in checks:
            check(*args)
    except FormatError as error:
        yield Problem(name, str(error))


def _check_bits(spec: ModelSpec) -> Iterator[Problem]:
    counted = bits_per_weight(spec.layers, spec.alignment)
    if abs(counted - spec.bits) > BITS_TOLERANCE * counted:
        yield Problem(CONFIG, f"[{CONFIG}] says {spec.bits} bits per expert weight, the files come to {counted:.4f}.")


def _check_experts(
    directory: Path, layer: LayerSpec, spec: ModelSpec, entry: dict[str, Any], advance: Callable[[int], object]
) -> Iterator[Problem]:
    """Size, header, hash and checksums of an experts file, then its records one by one."""
    found = list(_caught(layer.file, check_size, args=(directory, layer.file, entry)))
    found = found or list(_caught(layer.file, check_experts_header, args=(directory, layer, spec.alignment, entry)))
    if found:
        yield from found
        advance(entry["bytes"])
        return
    yield from _caught(layer.file, check_hash, args=(directory, layer.file, entry, layer))
    advance(entry["bytes"] - layer.experts * layer.record_bytes)
    path, start = directory / layer.file, entry["header_bytes"]
    offset = start + layer.experts * layer.record_bytes
    sums = read_array(path, "<u8", layer.experts * layer.checksums, offset).reshape(layer.experts, -1)
    record = np.empty(layer.record_bytes, np.uint8)
    try:
        table = tuples.read_table(directory) if layer.coded and (directory / tuples.FILE).is_file() else None
    except FormatError as error:
        yield Problem(tuples.FILE, str(error))
        return
    with named(path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        for expert in range(layer.experts):
            problem = f"[{layer.file}, layer {layer.layer}, expert {expert}] the file ends within the record."
            if read_into(file, record) == len(record):
                problem = _record_problem(record, layer, expert, sums[expert], spec.length, table)
            if problem:
                yield Problem(layer.file, problem, layer.layer, expert)
            advance(len(record))


def _record_problem(
    record: np.ndarray, layer: LayerSpec, expert: int, sums: np.ndarray, length: int, table: np.ndarray | None
) -> str:
    """What is wrong with one record, or nothing."""
    where = f"{layer.file}, layer {layer.layer}, expert {expert}"
    wrong = np.flatnonzero(record_checksums(record) != sums)
    if len(wrong):
        first = int(wrong[0]) * CHECKSUM_BYTES
        last = min(first + CHECKSUM_BYTES, len(record))
        return (
            f"[{where}] bytes {first} to {last - 1} of the record do not have their checksum "
            f"({len(wrong)} of {len(sums)} checksums differ); copy or convert the file again."
        )
    try:
        if layer.coded:
            _decode(record, layer, where, table)
        elif layer.packing:
            affine.parse(record, layer.shapes, layer.packing, where)
        elif layer.coding is not None:
            qmoe.parse(record, layer.shapes, layer.bias, layer.coding, where)
        else:
            trellis.parse(record, layer.shapes, layer.bias, where, length)
    except FormatError as error:
        return str(error)
    used = int(record[8:12].view("<u4")[0])
    return f"[{where}] the bytes after the used {used} should be zero and are not." if record[used:].any() else ""


def _decode(record: np.ndarray, layer: LayerSpec, where: str, table: np.ndarray | None) -> None:
    for matrix in packed.each(record, layer.shapes, layer.packing, where, table, native_rans.decode):
        packed.check_values(matrix, where)


def main(argv: list[str]) -> int:
    """The command."""
    parser = terminal.parser(
        "verify",
        "Check every byte of a converted model: sizes and hashes of all files, the checksum of every\n"
        "record, and that each record holds what config.json says. Exit status 1 if anything is wrong.",
        """
  python -m tiny_qmoe_mlx.verify --model Qwen3-30B-A3B-tiny-qmoe
  python -m tiny_qmoe_mlx.verify --model demo --json
""",
    )
    terminal.add_model(parser)
    terminal.add_json(parser)
    terminal.add_quiet(parser)
    args = parser.parse_args(argv)
    directory = locate.model_directory(args.model, quiet=args.json or args.quiet)
    files = read_manifest(directory)
    size = sum(entry["bytes"] for entry in files.values())
    bar = terminal.progress(total=size, description="verify", quiet=args.json or args.quiet, unit="B", unit_scale=True)
    with bar:
        problems = list(find_problems(directory, bar.update))
    if args.json:
        found = [asdict(p) for p in problems]
        terminal.print_json(
            {"path": str(directory), "files": len(files), "bytes": size, "ok": not problems, "problems": found}
        )
    else:
        _report(directory, len(files), size, problems)
    return terminal.FAILED if problems else 0


def _report(directory: Path, files: int, size: int, problems: list[Problem]) -> None:
    for problem in problems:
        print(problem.problem)
    if problems:
        print(f"error: {directory} has {len(problems)} problem{'s' * (len(problems) > 1)}", file=sys.stderr)
    else:
        print(f"{directory}: {files} files, {size} bytes, all as they should be")


if __name__ == "__main__":
    sys.exit(terminal.run(main))
