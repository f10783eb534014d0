"""The quantizers that bench_quality.py compares with, and the two dense models: against independent references."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
dense_llama, dense_gemma, rivals, rivals_llama_cpp, rivals_mlx_lm = (
    importlib.import_module(name)
    for name in ("dense_llama", "dense_gemma", "rivals", "rivals_llama_cpp", "rivals_mlx_lm")
)

D, WIDTH, VOCABULARY = 64, 128, 96
GEMMA_HEAD = 32


def tiny_llama(rng: np.random.Generator) -> Any:
    layers = [layer(rng, attn_q=(D, D), attn_k=(D // 2, D), attn_v=(D // 2, D), attn_output=(D, D)) for _ in range(2)]
    embedding = normal(rng, VOCABULARY, D)
    return dense_llama.Dense(layers, embedding, np.ones(D, np.float32), 4, 2, 1e-5, 1e4, None)


def tiny_gemma(rng: np.random.Generator) -> Any:
    """Six layers, so that one of them attends to all, and a window shorter than the text."""
    heads = (2 * GEMMA_HEAD, D)
    keys = (GEMMA_HEAD, D)
    layers = [layer(rng, attn_q=heads, attn_k=keys, attn_v=keys, attn_output=heads[::-1]) for _ in range(6)]
    for part in layers:
        for name, size in (("attn_q", GEMMA_HEAD), ("attn_k", GEMMA_HEAD), ("post_attention", D), ("post_ffw", D)):
            part[f"{name}_norm"] = 1 + normal(rng, size)
    embedding, norm = normal(rng, VOCABULARY, D), np.ones(D, np.float32)
    return dense_gemma.Gemma(layers, embedding, norm, 2, 1, 1e-6, 1e6, None, GEMMA_HEAD, 4)


def layer(rng: np.random.Generator, **shapes: tuple[int, int]) -> dict[str, np.ndarray]:
    shapes |= {"ffn_gate": (WIDTH, D), "ffn_up": (WIDTH, D), "ffn_down": (D, WIDTH)}
    norms = {name: 1 + normal(rng, D) for name in ("attn_norm", "ffn_norm")}
    return norms | {name: normal(rng, *shape) for name, shape in shapes.items()}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)


def correlated(rng: np.random.Generator, columns: int) -> np.ndarray:
    """Second moment of inputs of which few directions carry nearly all."""
    x = rng.standard_normal((512, 8)) @ rng.standard_normal((8, columns)) + 0.1 * rng.standard_normal((512, columns))
    return (x.T @ x / len(x)).astype(np.float32)


def output_error(w: np.ndarray, rounded: np.ndarray, h: np.ndarray) -> float:
    return float(np.trace((w - rounded) @ h @ (w - rounded).T))


@pytest.fixture
def tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, VOCABULARY, (2, 24))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_the_dense_models_compute_what_mlx_lm_computes(make: Any, rng: np.random.Generator, tokens: np.ndarray) -> None:
    model = make(rng)
    if make is tiny_gemma:  # the constant is that of d = 640; mlx-lm rounds sqrt(d) to bfloat16 too
        model.embed = lambda ids: model.embedding[ids] * np.float32(D**0.5)
    ours = dense_llama.forward(model, tokens) @ model.embedding.T
    theirs = np.array(rivals_mlx_lm.mlx_model(model)(mx.array(tokens)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_windows_of_gemma_start_with_bos(rng: np.random.Generator) -> None:
    model = tiny_gemma(rng)
    model.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=range(3, 1203)))
    windows = model.windows("")
    assert windows.shape == (2, dense_llama.CONTEXT)
    assert (windows[:, 0] == dense_gemma.BOS).all()
    assert windows[1, 1] == 3 + 511


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_to_nearest_where_inputs_are_correlated(bits: int, rng: np.random.Generator) -> None:
    w, h = normal(rng, 32, 128), correlated(rng, 128)
    nearest = np.array(mx.dequantize(*mx.quantize(mx.array(w), 64, bits), 64, bits))
    ours = rivals.gptq_affine(w, h, bits).values()
    assert output_error(w, ours, h) < 0.5 * output_error(w, nearest, h)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_what_mlx_stores(bits: int, rng: np.random.Generator) -> None:
    affine = rivals.gptq_affine(normal(rng, 8, 128), correlated(rng, 128), bits)
    bitstring = np.unpackbits(affine.codes[..., None], axis=-1, count=bits, bitorder="little").reshape(8, -1)
    packed = mx.array(np.packbits(bitstring, axis=-1, bitorder="little").view(np.uint32))
    scales, biases = (mx.array(part.astype(np.float32)) for part in (affine.scales, affine.biases))
    np.testing.assert_allclose(affine.values(), np.array(mx.dequantize(packed, scales, biases, 64, bits)), atol=1e-6)
    assert affine.bits(bits) == 8 * 128 * (bits + 0.5)


def test_gptq_on_uncorrelated_inputs_is_rounding_to_nearest(rng: np.random.Generator) -> None:
    w = normal(rng, 8, 128)
    affine = rivals.gptq_affine(w, np.eye(128, dtype=np.float32), 3)
    step = np.repeat(affine.scales.astype(np.float32), 64, 1)
    inside = (affine.codes > 0) & (affine.codes < 7)
    assert np.abs((w - affine.values()) / step)[inside].max() <= 0.5001


def test_ternary_rows_have_their_three_values(rng: np.random.Generator) -> None:
    w = normal(rng, 16, 256)
    w[3] = np.abs(w[3])
    w[5] = 0
    rounded = rivals.ternary(w, correlated(rng, 256))
    for row, values in zip(w, rounded, strict=True):
        allowed = [min(row.min(), 0), 0, max(row.max(), 0)]
        assert np.isclose(values[:, None], allowed, rtol=2**-8, atol=0).any(1).all()
    np.testing.assert_array_equal(rivals.bfloat16(rounded), rounded)


def test_the_ternary_code_takes_the_bits_of_qmoes(rng: np.random.Generator) -> None:
    symbols = rng.choice(3, (64, 6144), p=[0.885, 0.0575, 0.0575])
    assert 16 * rivals.codewords(symbols) / symbols.size == pytest.approx(0.7365, rel=0.01)


def test_rows_of_zeros_take_the_longest_codewords() -> None:
    assert rivals.codewords(np.zeros((3, 56), int)) == 3 * 2  # one stands for 28 weights at most
    assert rivals.codewords(np.zeros((3, 58), int)) == 3 * 3


def test_gptq_of_a_model_counts_every_bit(rng: np.random.Generator, tokens: np.ndarray) -> None:
    for model in (tiny_llama(rng), tiny_gemma(rng)):
        weights, bits = rivals.gptq(model, tokens, 4)
        assert bits == 4.5
        for i, row in enumerate(weights):
            assert [w.shape for w in row] == [w.shape for w in model.feed_forward(i)]
        changed = dense_llama.forward(model, tokens, weights) - dense_llama.forward(model, tokens)
        assert 0 < np.abs(changed).mean() < 0.3


@pytest.mark.parametrize("method", ["awq", "dwq"])
def test_mlx_lms_methods_run_on_the_feed_forward_alone(
    method: str, rng: np.random.Generator, tokens: np.ndarray
) -> None:
    model = tiny_llama(rng)
    reference = dense_llama.forward(model, tokens)
    weights, bits = getattr(rivals_mlx_lm, method)(model, tokens, 4)
    assert bits == 4.5
    assert np.abs(dense_llama.forward(model, tokens, weights) - reference).mean() < 0.3


def test_dwq_changes_scales_not_codes(rng: np.random.Generator, tokens: np.ndarray) -> None:
    model = tiny_llama(rng)
    still, _ = rivals_mlx_lm.dwq(model, tokens, 2, rate=0.0)
    moved, _ = rivals_mlx_lm.dwq(model, tokens, 2, rate=1e-3)
    group = still[0][0][0, :64], moved[0][0][0, :64]
    assert (group[0] != group[1]).any()
    np.testing.assert_array_equal(np.argsort(group[0], kind="stable"), np.argsort(group[1], kind="stable"))
    nearest = mx.quantize(mx.array(model.feed_forward(0)[0]).astype(mx.float16), 64, 2)
    expected = mx.dequantize(nearest[0], *(part.astype(mx.float32) for part in nearest[1:]), 64, 2)
    np.testing.assert_allclose(still[0][0], np.array(expected), atol=1e-6)


def test_llama_cpp_falls_back_to_larger_types_where_256_does_not_divide(
    rng: np.random.Generator, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library replaced by one that takes the name and its bits down."""
    asked = []

    def round_matrix(w: np.ndarray, name: str, importance: np.ndarray) -> tuple[np.ndarray, int]:
        assert importance.shape == (w.shape[1],) and (importance > 0).all()
        asked.append((name, w.shape))
        return w, w.size

    monkeypatch.setattr(rivals_llama_cpp, "round_matrix", round_matrix)
    model = tiny_llama(rng)
    rivals_llama_cpp.file_type(model, tokens, "IQ2_XXS")
    assert asked[:3] == [("IQ4_NL", (WIDTH, D)), ("IQ4_NL", (WIDTH, D)), ("IQ4_NL", (D, WIDTH))]
    asked.clear()
    weights, _ = rivals_llama_cpp.joined(model, tokens, "Q2_K")
    assert asked[:3] == [("Q2_K", (WIDTH // 4, 256)), ("Q2_K", (WIDTH // 4, 256)), ("Q2_K", (D // 2, 256))]
    np.testing.assert_array_equal(weights[1][2], model.feed_forward(1)[2])


def test_without_llama_cpp_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals_llama_cpp, "find_spec", lambda name: None)
    rivals_llama_cpp.library.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install llama-cpp-python, or --ggml PATH"):
        rivals_llama_cpp.library()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["gptq 9"], "received 'gptq 9'"), (["--ggml", "/nowhere"], "--ggml should be the path of a libggml-base")],
)
def test_bad_options_give_one_sentence(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rivals.py", *arguments])
    with pytest.raises(SystemExit):
        rivals.main()
    assert expected in capsys.readouterr().err


def test_methods_are_named_method_and_asked() -> None:
    assert {"gptq 2", "qmoe 1.5", "awq 3", "dwq 3", "llama.cpp IQ2_XXS", "llama.cpp-joined Q3_K"} <= set(rivals.METHODS)
    assert all(len(name.split()) == 2 for name in rivals.METHODS)


def test_text_of_tokens_comes_back():
    """A calibration text is written from windows of tokens: pieces as the vocabulary spells them are no text."""
    text = "An old tree, 12 years."
    units = ["An", "Ġold", "Ġtree", ",", "Ġ", "1", "2", "Ġyears", "."]
    letters = sorted({c for unit in units for c in unit})
    fields = {"tokenizer.ggml.merges": [], "tokenizer.ggml.tokens": letters}
    tokenizer = dense_llama._tokenizer(fields)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
