"""Switch Transformers of 1.6 trillion parameters (switch-c-2048, 2101.03961) as a plan: disk, memory, time.

    python benchmarks/plan_switch.py [--quick] [--json]

Nothing of it is downloaded, and it was never run: sizes are those of its config, by the arithmetic that `plan` does,
beside what QMoE (2310.16795) reports. Times: a token's are forecast for this machine from probes with noise of the
model's shapes; a conversion's are the CPU's for whole experts of its shape, each routed as many tokens as 64 x 568 give
one of 2048 on average.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from ancestors_qmoe import C2048, coded, ternary
from common import machine, print_json, print_table
from mlx_lm.models.switch_layers import SwitchMLP

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # where models are built from their configs

import public_sizes  # noqa: E402

from tiny_qmoe_mlx import blas, budget, forecast, speed  # noqa: E402
from tiny_qmoe_mlx.codecs import qmoe  # noqa: E402
from tiny_qmoe_mlx.container import Container  # noqa: E402
from tiny_qmoe_mlx.conversion.calibrate import LayerTokens  # noqa: E402
from tiny_qmoe_mlx.conversion.expert_pass import compressed_records  # noqa: E402
from tiny_qmoe_mlx.conversion.qmoe import qmoe_records, settled  # noqa: E402
from tiny_qmoe_mlx.conversion.settings import Settings  # noqa: E402
from tiny_qmoe_mlx.expert_kind import expert_kind  # noqa: E402
from tiny_qmoe_mlx.original import checkpoint  # noqa: E402

ZEROS = 0.886  # of its weights, ternary: the paper's table 3
PAPER_RATE, PAPER_DISK, PAPER_HOURS = 16 / 20.07, 158.6e9, 16.0  # its table 6, and 7: hours on one A6000
CASES = {
    "qmoe, dictionary": Settings(bits=1.5, codec="qmoe", rest_bits=16, calibration="none"),
    "qmoe, tunstall-12": Settings(bits=1.5, codec="qmoe", codewords="tunstall-12", rest_bits=16, calibration="none"),
    "trellis .8": Settings(bits=0.8, calibration="none"),
    "trellis 1.0": Settings(bits=1.0, calibration="none"),
    "trellis 1.5": Settings(bits=1.5, calibration="none"),
    "trellis 2.0": Settings(bits=2.0, calibration="none"),
}
TOKENS, LAYER_TOKENS = 64 * 568 // 2048, 1024  # of an expert, and of its layer, of which 512 are looked at
TIMED = ("qmoe, dictionary", "trellis 1.0", "trellis 2.0")


def model() -> public_sizes.Public:
    """switch-c-2048, from its config."""
    return next(m for m in public_sizes.MODELS if m.name == "Switch-c-2048")


def ternary_record(coding: qmoe.Coding) -> int:
    """Bytes of an expert's record with independent ternary weights of the paper's share of zeros."""
    rng = np.random.default_rng(0)
    matrices = [coded(rng, ternary(rng, rows, columns, ZEROS), coding)[1] for rows, columns in C2048]
    return len(qmoe.pack(matrices, coding))


def planned(settings: Settings, directory: Path) -> Container:
    """The converted model's headers; records of codec qmoe have the size of `ternary_record`."""
    container = public_sizes.headers(model(), settings, directory)
    spec = container.spec
    if settings.codec == "qmoe":
        size = -(-ternary_record(spec.layers[0].coding) // spec.alignment) * spec.alignment
        container = replace(container, spec=settled(spec, {layer.layer: size for layer in spec.layers}))
    return container


def case(settings: Settings, disk_rate: float, probe: bool) -> dict[str, Any]:
    """Sizes in bytes, and with `probe` seconds of a written token at the smallest budget and at 16 GB, if that does."""
    with tempfile.TemporaryDirectory() as folder:
        container = planned(settings, Path(folder))
        layers = container.spec.layers
        rest = sum(path.stat().st_size for path in Path(folder).glob("model-rest*"))
        context, cpu = public_sizes.context(model()), mx.default_device() == mx.cpu
        most = budget.split(container, sys.maxsize, context, cpu)
        found: dict[str, Any] = {
            "bits": container.spec.bits,
            "disk_bytes": rest + sum(layer.data_bytes for layer in layers),
            "min_budget_bytes": most.min_budget_bytes,
            "resident_budget_bytes": most.resident_budget_bytes,
            "bytes_per_token": forecast.bytes_of_token(container),
        }
        if probe:
            least = budget.split(container, most.min_budget_bytes, context, cpu)
            found |= {k: v for k, v in forecast.forecast(container, least, 0.0, disk_rate).items() if k != "limit"}
    return found


def conversion_seconds(settings: Settings, experts: int = 2) -> float:
    """Seconds of a core to quantize and code one expert of the model's shape, weights and inputs being noise."""
    rng = np.random.default_rng(0)
    (width, hidden), _ = C2048
    module = SwitchMLP(hidden, width, experts, nn.ReLU())
    for matrix in (module.fc1, module.fc2):
        matrix.weight = mx.array(rng.standard_normal(matrix.weight.shape, np.float32) * np.float32(0.02))
    found = checkpoint.ExpertLayer("encoder.layers.0.mlp.experts", 0, module)
    with tempfile.TemporaryDirectory() as folder:
        spec = planned(settings, Path(folder)).spec
    layer = replace(checkpoint.layer_spec(found, spec.layers[0].record_bytes), coding=spec.layers[0].coding)
    x = rng.standard_normal((LAYER_TOKENS, hidden), np.float32)
    chosen = np.arange(len(x), dtype=np.int32)[:, None] % (LAYER_TOKENS // TOKENS)
    tokens = LayerTokens(x, chosen, np.full(chosen.shape, 0.5, np.float32), corrected=settings.codec != "qmoe")
    kind = expert_kind(layer, spec, module.activation)
    start = time.process_time()
    if settings.codec == "qmoe":
        count = sum(1 for _ in qmoe_records(found, kind, tokens))
    else:
        count = sum(1 for _ in compressed_records(found, layer, kind, tokens))
    return (time.process_time() - start) / count


def show(cases: dict[str, dict[str, Any]], parameters: int) -> None:
    """Print the plan beside the paper's figures."""
    header = [
        "",
        "bits",
        "GB on disk",
        "least memory",
        "all in memory",
        "MB a token",
        "tokens/s",
        "core-days to convert",
    ]
    rows = [["bfloat16", 16.0, 2 * parameters / 1e9, "", "", "", "", ""]]
    paper = f"{PAPER_HOURS / 24:.2f} of an A6000"
    rows.append(["paper: ternary, dictionary", PAPER_RATE, PAPER_DISK / 1e9, "", "", "", "", paper])
    for name, found in cases.items():
        sizes = [found[key] / 1e9 for key in ("disk_bytes", "min_budget_bytes", "resident_budget_bytes")]
        times = [found.get("tokens_per_s", ""), found.get("conversion_core_days", "")]
        rows.append([name, found["bits"], *sizes, found["bytes_per_token"] / 1e6, *times])
    print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes alone")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    blas.install()
    parameters = public_sizes.parameters(public_sizes.build(model()))
    experts = 30 * 2048
    rate = 0.0 if args.quick else speed.disk_of(Path("."), 1 << 21)
    cases = {}
    for name, settings in CASES.items():
        cases[name] = case(settings, rate, not args.quick)
        if not args.quick and name in TIMED:
            cases[name]["conversion_core_days"] = conversion_seconds(settings) * experts / 86400
    show(cases, parameters)
    if rate:
        print(f"tokens/s: every expert read anew, at {rate / 1e9:.2f} GB/s; {machine()}")
    if args.json:
        print_json({"parameters": parameters, "disk_bytes_per_s": rate, "cases": cases})


if __name__ == "__main__":
    main()
