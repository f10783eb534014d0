"""Checkpoints of several layouts and number formats: what is read from them, and how little of it at a time."""

import gc
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import source_layouts
import tiny_models
from mlx_lm.utils import load_model

from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.original import checkpoint, shipped


def plain(directory: Path) -> dict[str, np.ndarray]:
    """Every expert tensor as mlx-lm itself loads it, float32."""
    model, _ = load_model(directory)
    out = {}
    for found in checkpoint.expert_layers(model):
        for name in found.names:
            for key in ("weight", "bias"):
                if key in found.module[name]:
                    out[f"{found.path}.{name}.{key}"] = np.array(found.module[name][key].astype(mx.float32))
    return out


def read(directory: Path, groups: int) -> dict[str, np.ndarray]:
    """The same by `expert_weights`, so many experts at a time."""
    model, _ = checkpoint.load_lazy(directory)
    parts: dict[str, list[np.ndarray]] = {}
    for found in checkpoint.expert_layers(model):
        count = checkpoint.expert_count(found)
        for start in range(0, count, groups):
            weights, biases = checkpoint.expert_weights(found, range(start, min(start + groups, count)))
            for m, name in enumerate(found.names):
                parts.setdefault(f"{found.path}.{name}.weight", []).append(weights[m])
                if biases:
                    parts.setdefault(f"{found.path}.{name}.bias", []).append(biases[m])
    return {name: np.concatenate(p) for name, p in parts.items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(want)
    for name, values in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], values, err_msg=name)


# ---- a few experts at a time


@pytest.mark.parametrize("layout", source_layouts.LAYOUTS)
def test_experts_are_those_that_mlx_lm_loads(layout, tmp_path):
    directory = source_layouts.make(tmp_path / "hf", layout)
    want = plain(directory)
    for groups in (1, 3, 100):
        assert_same(read(directory, groups), want)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("layout", ["qwen3_moe each", "granitemoe fused"])
def test_every_float_type_is_read(layout, dtype, tmp_path):
    directory = source_layouts.make(tmp_path / "hf", layout)
    source_layouts.rewrite(directory, lambda w: {n: a.astype(dtype) for n, a in w.items()})
    assert_same(read(directory, 3), plain(directory))


def test_as_many_rows_or_columns_as_experts_confuse_nothing(tmp_path):
    """Matrices of 64 x 64, 64 experts, a hidden size of 64."""
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe each", num_experts=64)
    assert_same(read(directory, 5), plain(directory))


def test_a_family_that_needs_all_experts_at_once_is_read_whole(tmp_path, monkeypatch):
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe each")
    want = plain(directory)
    from mlx_lm.models import qwen3_moe

    original = qwen3_moe.Model.sanitize

    def needs_all(self, weights):
        found = original(self, weights)
        return {n: a.reshape(8, *a.shape[1:]) if "switch_mlp" in n else a for n, a in found.items()}

    def stacks_otherwise(self, weights):
        with monkeypatch.context() as patch:
            patch.setattr(mx, "stack", lambda arrays: mx.concatenate([a[None] for a in arrays]))
            return original(self, weights)

    for sanitize in (needs_all, stacks_otherwise):
        monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
        assert_same(read(directory, 3), want)


CUT = """
import os, sys
from pathlib import Path
import mlx.core as mx
from tiny_qmoe_mlx.original import source
change = {"as it is": lambda a: a, "cast": lambda a: a.astype(mx.float32), "stacked": lambda a: mx.stack([a, a])}
for number in range(20):
    file = Path(sys.argv[1]) / f"{number}.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((64, 64), mx.bfloat16)})
    lazy = mx.load(str(file))["a"].view(mx.uint16)
    os.truncate(file, 200)
    try:
        source.computed(change[sys.argv[2]](lazy))
    except RuntimeError as error:
        assert "read" in str(error), error
    else:
        raise AssertionError("an array came out")
"""


@pytest.mark.parametrize("change", ["as it is", "cast", "stacked"])
def test_a_lazy_array_whose_file_was_cut_is_no_array(tmp_path, change):
    """numpy would take what the memory holds, now and then: see source.computed.

    In a process of its own: MLX 0.32 counts some of the reads that fail as under way for ever, and once there are ten
    it waits for them.
    """
    line = [sys.executable, "-c", CUT, str(tmp_path), change]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def memory(key: str = "VmRSS") -> int:
    """Bytes of this process in memory."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("layout", ["qwen3_moe each", "qwen3_moe stacked", "granitemoe fused"])
def test_a_group_of_experts_takes_a_fraction_of_the_layer(layout, tmp_path):
    family = layout.split()[0]
    count = "num_experts" if family == "qwen3_moe" else "num_local_experts"
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    sizes = {"hidden_size": 256, width: 512, count: 64, "num_hidden_layers": 1, "mlp_only_layers": []}
    directory = source_layouts.make(tmp_path / "hf", layout, **sizes)
    layer_bytes = 64 * 3 * 256 * 512 * 4
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()  # what earlier tests still hold
    model, _ = checkpoint.load_lazy(directory)
    layers = checkpoint.expert_layers(model)
    assert mx.get_active_memory() - others < layer_bytes / 64
    mx.reset_peak_memory()
    before = memory()
    for found in 2 * layers:
        for start in range(0, 64, 4):
            held = checkpoint.expert_weights(found, range(start, start + 4))
            assert memory() - before < layer_bytes / 4
            del held
    assert mx.get_peak_memory() - others < layer_bytes / 8
    assert mx.get_active_memory() - others < layer_bytes / 64


@pytest.mark.parametrize("layout", ["qwen3_moe each", "qwen3_moe stacked"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(layout, value, tmp_path):
    def spoil(weights):
        key = next(
            n for n in weights if n.endswith(("2.mlp.experts.5.up_proj.weight", "2.mlp.switch_mlp.up_proj.weight"))
        )
        spoiled = np.array(weights[key])
        spoiled[..., 3, 2] = (
            np.where(np.arange(len(spoiled)) == 5, value, spoiled[..., 3, 2]) if spoiled.ndim > 2 else value
        )
        return {**weights, key: mx.array(spoiled)}

    directory = source_layouts.rewrite(source_layouts.make(tmp_path / "hf", layout), spoil)
    model, _ = checkpoint.load_lazy(directory)
    found = checkpoint.expert_layers(model)[-1]
    checkpoint.expert_weights(found, range(5))
    with pytest.raises(ValueError, match=r"\[model.layers.2.mlp.switch_mlp\] up_proj of expert 5 should be finite"):
        checkpoint.expert_weights(found, range(4, 8))


@pytest.mark.parametrize("experts", [range(0), range(3, 9), range(-1, 2), range(0, 4, 2)])
def test_experts_that_a_layer_does_not_have_are_refused(experts, tmp_path):
    model, _ = checkpoint.load_lazy(tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe"))
    with pytest.raises(ValueError, match="experts should be neighbours among 0 to 7"):
        checkpoint.expert_weights(checkpoint.expert_layers(model)[0], experts)


def test_other_tensors_are_checked_when_asked():
    checkpoint.require_finite("model.norm.weight", mx.ones(3))
    checkpoint.require_finite("ids", mx.arange(3))
    for value in (mx.nan, mx.inf, -mx.inf):
        with pytest.raises(ValueError, match="model.norm.weight should be finite, received NaN or Inf; download"):
            checkpoint.require_finite("model.norm.weight", mx.array([1.0, value]).astype(mx.bfloat16))


# ---- number formats


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Values of 8-bit floats: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7), mantissa / 8 * 2.0**-6)
    return np.where(sign, -size, size)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48], "fmt": "e4m3"}


def to_fp8(expected: dict[str, np.ndarray]):
    """Every matrix as 8-bit floats with a scale per block of 32 x 48; notes the values by their name."""

    def change(weights):
        rng, out = np.random.default_rng(0), {}
        for name, array in weights.items():
            if array.ndim != 2 or any(s in name for s in ("embed", "norm", "gate.weight", "lm_head")):
                out[name] = array
                continue
            rows, columns = array.shape
            codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
            codes[codes & 0x7F == 0x7F] = 0  # NaN
            scale = rng.uniform(0.001, 0.01, (-(-rows // 32), -(-columns // 48))).astype(np.float32)
            spread = np.repeat(np.repeat(scale, 32, 0), 48, 1)[:rows, :columns]
            expected[name] = bfloat16(e4m3(codes).astype(np.float32) * spread)
            out[name], out[f"{name}_scale_inv"] = mx.array(codes), mx.array(scale)
        return out

    return change


def as_stacked(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors per expert, put together as mlx-lm names them."""
    out: dict[str, list[np.ndarray]] = {}
    for name in (n for n in expected if ".experts." in n):
        head, _, tail = name.partition(".experts.")
        expert, matrix, kind = tail.split(".")
        out.setdefault(f"{head}.switch_mlp.{matrix}.{kind}", []).append((int(expert), expected[name]))
    return {name: np.stack([a for _, a in sorted(parts, key=lambda p: p[0])]) for name, parts in out.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_fp8_with_block_scales_is_dequantized_for_every_family(family, tmp_path):
    """mlx-lm does it for some families only, and for blocks of 128 x 128."""
    directory = source_layouts.make(tmp_path / "hf", f"{family} each")
    expected: dict[str, np.ndarray] = {}
    source_layouts.rewrite(directory, to_fp8(expected), quantization_config=FP8)
    for groups in (3, 100):
        assert_same(read(directory, groups), as_stacked(expected))
    model, config = checkpoint.load_lazy(directory)
    name = "model.layers.1.self_attn.o_proj"
    got = dict(checkpoint.named_modules(model))[name].weight
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), expected[f"{name}.weight"])
    assert "8-bit floats" in shipped.describe_source(config)


def test_fp8_scales_that_do_not_fit_are_refused(tmp_path):
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe each")
    source_layouts.rewrite(directory, to_fp8({}), quantization_config={**FP8, "weight_block_size": [128, 128]})
    with pytest.raises(FormatError, match=r"8-bit floats with scales of \[1, 1\], received .*; give a bfloat16"):
        checkpoint.load_lazy(directory)


MLX_MODES = [("affine", 4, 64), ("affine", 3, 32), ("affine", 6, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32)]
MLX_MODES += [("nvfp4", 4, 16)]


@pytest.mark.parametrize("mode, bits, group", MLX_MODES)
def test_mlx_quantized_checkpoints_are_dequantized(mode, bits, group, tmp_path):
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe stacked")
    source_layouts.quantize_with_mlx(directory, mode, bits, group, mixed=mode == "affine")
    stock, _ = load_model(directory)
    want = {}
    for found in checkpoint.expert_layers(stock):
        for name in found.names:
            m = found.module[name]
            scales, biases = m["scales"], m.get("biases")
            if mode == "affine":
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            whole = mx.dequantize(m["weight"], scales, biases, m.group_size, m.bits, m.mode, dtype=mx.float32)
            want[f"{found.path}.{name}.weight"] = np.array(whole)
    for groups in (3, 100):
        assert_same(read(directory, groups), want)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_the_rest_of_a_quantized_model_is_dequantized(family, tmp_path):
    directory = tiny_models.make_checkpoint(tmp_path / "plain", family)
    source_layouts.quantize_with_mlx(directory, "affine", 4, 64)
    stock, _ = load_model(directory)
    model, config = checkpoint.load_lazy(directory)
    assert shipped.dequantize_rest(model) > 10
    left = {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Quantized")}
    assert left == {"QuantizedSwitchLinear"}
    tokens = mx.array([[1, 2, 3, 250]])
    np.testing.assert_allclose(np.array(model(tokens)), np.array(stock(tokens)), rtol=0, atol=2e-4)
    assert "MLX affine weights of 4 bits in groups of 64" in shipped.describe_source(config)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_gpt_oss_mxfp4_is_dequantized_as_published(tmp_path):
    """Blocks of 32 values in 16 bytes, low nibble first, scale 2^(s - 127), rows of gate and up in turn."""
    directory = tmp_path / "hf"
    blocks = source_layouts.make_gpt_oss_mxfp4(directory)
    want = {}
    for layer, tensors in blocks.items():
        path = f"model.layers.{layer}.mlp.experts"
        dense = {}
        for name in ("gate_up_proj", "down_proj"):
            codes, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"].astype(int)
            values = np.stack([FP4[codes & 15], FP4[codes >> 4]], -1).reshape(*codes.shape[:-1], 32)
            dense[name] = (values * 2.0 ** (scales[..., None] - 127)).reshape(*codes.shape[:2], -1).astype(np.float32)
        both, bias = dense["gate_up_proj"], tensors["gate_up_proj_bias"]
        want |= {f"{path}.gate_proj.weight": both[:, ::2], f"{path}.up_proj.weight": both[:, 1::2]}
        want |= {f"{path}.gate_proj.bias": bias[:, ::2], f"{path}.up_proj.bias": bias[:, 1::2]}
        want |= {f"{path}.down_proj.weight": dense["down_proj"], f"{path}.down_proj.bias": tensors["down_proj_bias"]}
    for groups in (3, 100):
        assert_same(read(directory, groups), want)
    config = checkpoint.read_config(directory)
    assert "MXFP4" in shipped.describe_source(config) and "--codec affine keeps" in shipped.describe_source(config)


def test_int4_of_compressed_tensors_is_dequantized(tmp_path):
    """Kimi K2's way; of the families of DeepSeek-V3 mlx-lm reads it."""
    directory = source_layouts.make(tmp_path / "hf", "deepseek_v3 each")
    expected: dict[str, np.ndarray] = {}
    source_layouts.rewrite(directory, source_layouts.to_int4(expected), quantization_config=source_layouts.PACKED)
    want = as_stacked(expected)
    for groups in (3, 100):
        got = read(directory, groups)
        assert sorted(got) == sorted(want)
        for name, values in want.items():
            np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-6)


def test_int4_of_another_family_is_refused(tmp_path):
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe each")
    source_layouts.rewrite(directory, source_layouts.to_int4({}), quantization_config=source_layouts.PACKED)
    with pytest.raises(FormatError, match=r"mlx-lm cannot load .*packed 4-bit integers.*; give a bfloat16 checkpoint"):
        checkpoint.load_lazy(directory)


REFUSED = {
    "compressed-tensors of 8-bit floats": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "unsupported compressed-tensors format 'float-quantized'",
    ),
    "modelopt of another kind": (
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        "Unsupported modelopt quant_algo: W4A8_AWQ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_formats_that_mlx_lm_does_not_read_are_refused(what, tmp_path):
    quantization, message = REFUSED[what]
    directory = source_layouts.make(tmp_path / "hf", "qwen3_moe each")
    source_layouts.rewrite(directory, dict, quantization_config=quantization)
    with pytest.raises(FormatError, match=f"{message}.*; give a bfloat16 checkpoint of the model, or one converted"):
        checkpoint.load_lazy(directory)


@pytest.mark.parametrize("config, found", [
    ({"torch_dtype": "bfloat16"}, "bfloat16 weights, not quantized"),
    ({"text_config": {"dtype": "float16"}}, "float16 weights, not quantized"),
    ({}, "plain weights, not quantized"),
    ({"quantization_config": 3}, "plain weights, not quantized"),
    ({"quantization": {"bits": 4, "group_size": 64, "x": {"bits": 8}}}, "groups of 64, some layers"),
    ({"quantization_config": {"quant_method": "fp8"}}, "8-bit floats with a scale per block"),
    ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}}, "MXFP8"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "packed 4-bit"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "x"}}, "the kind x, which mlx-lm does"),
    ({"quantization_config": {"quant_method": "hqq"}}, "weights quantized by hqq"),
    ({"quantization_config": {}}, "weights quantized by unnamed"),
])  # fmt: skip
def test_what_a_source_is_is_said(config, found):
    assert shipped.describe_source({"model_type": "x", **config}).startswith(found) or found in shipped.describe_source(
        config
    )
