"""Numbers at the ends of their range, routers with ties, experts that are nothing: a short run of abuse/numbers.py."""

from pathlib import Path

import families
import family_checks
import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
import qmoe_records
import test_coded_model as coded
import test_qmoe_model as qmoe
import tiny_models
from abuse import numbers as abuse
from safetensors.numpy import save_file

import tiny_qmoe_mlx
from tiny_qmoe_mlx import metal, models, native, qmoe_product, verify
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.expert_kind import ExpertKind

needs_compiler = pytest.mark.skipif(not native.available(), reason="needs the C++ library")
PATHS = list(abuse.paths())
SMALL = {"sequences": 4, "sequence_tokens": 48}


@pytest.fixture(autouse=True)
def isa():
    """The instruction set that a path chose is forgotten."""
    yield
    if native.available():
        native.use_isa(native.supported_isas()[0])


def fits(name: str, trial: abuse.Trial) -> bool:
    return trial.case.layer.fused is not None or not name.startswith("C++")


# ---- products


@pytest.mark.parametrize("name", PATHS)
def test_gains_and_rows_of_every_size(name):
    with abuse.emulated():
        for seed in range(4):
            trial = abuse.draw_trial(seed)
            if fits(name, trial):
                abuse.check(trial, abuse.paths()[name])


def ordinary(
    rng: np.random.Generator, dtype: mx.Dtype, rows: str = "ordinary", d: int = 136, name: str = "silu"
) -> abuse.Trial:
    case = abuse.make_case(rng, d, 104, abuse.EXPERTS, name, length=12)
    x = mx.array(abuse.draw_rows(rng, d, rows, case.layer.sign_in)).astype(dtype)
    ids = np.stack([rng.permutation(abuse.EXPERTS)[: abuse.TOP_K] for _ in range(abuse.TOKENS)]).astype(np.uint32)
    return abuse.Trial(abuse.repacked(case), x, ids, rows)


@metal_cpu.required
@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_the_rotation_gathers_stays_finite_in_half(seed):
    """It was infinite in prefill: 1e4 * sqrt(256) is beyond float16, each product of mlx-lm's is not."""
    trial = ordinary(np.random.default_rng(seed), mx.float16, "aligned", 256, "swiglu_oai")
    assert np.isfinite(abuse.of_all(trial, mx.float16)).mean() > 0.5
    with abuse.emulated():
        abuse.check(trial, abuse.by_metal_prefill)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(rng, name, value):
    trial = ordinary(rng, mx.float32)
    x = np.array(trial.x)
    x[1, 5] = value
    spoiled = abuse.Trial(trial.case, mx.array(x), trial.ids, "")
    compute = abuse.paths()[name]
    with abuse.emulated():
        before, after = np.array(compute(trial)), np.array(compute(spoiled))
    others = [0, 2, 3]
    np.testing.assert_array_equal(after[others], before[others])
    theirs = abuse.of_all(spoiled, mx.float32)[1]
    assert not np.isfinite(theirs).any() and not np.isfinite(after[1]).any(), "as in mlx-lm"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=metal_cpu.required)])
def test_a_row_of_qmoe_that_is_not_finite_gives_nan_and_spoils_no_other(qmoe_kind, rng, gpu, value):
    """Its products skip zeros, and most of what NaN times zero is was finite."""
    kind, pool = qmoe_kind
    x = rng.normal(size=(3, 70)).astype(np.float32)
    x[0] *= 1e4
    spoiled = x.copy()
    spoiled[1, 5] = value

    def compute(rows: np.ndarray) -> np.ndarray:
        if not gpu:
            return qmoe_product.expert(pool, rows, kind, 1 << 20)
        with abuse.emulated():
            records = metal.Records(mx.array(pool), mx.array(np.zeros(1, np.uint32)))
            return np.array(qmoe_product.gather(mx.array(rows), mx.zeros((3, 1), mx.uint32), records, kind))[:, 0]

    before, after = compute(x), compute(spoiled)
    assert np.isfinite(before).all() and np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.fixture(params=[qmoe_records.CODINGS[i] for i in (0, 1, 4)], ids=qmoe_records.name_of)
def qmoe_kind(request, rng):
    """One expert of noise: its kind, and its record."""
    coding = request.param
    record = qmoe_records.random_record(rng, coding, bias=True)
    shapes = qmoe_records.SHAPES
    matrices = tuple((name, *shape) for name, shape in zip(("gate_proj", "up_proj", "down_proj"), shapes, strict=True))
    kind = ExpertKind(matrices, True, 12, 0, 0, abuse_activation, coding=coding)
    return kind, record


def abuse_activation(up: mx.array, gate: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


# ---- whole models


def change(source: Path, spoil) -> Path:
    """Rewrite a checkpoint's tensors."""
    arrays = {name: spoil(name, np.array(w)) for name, w in mx.load(str(source / "model.safetensors")).items()}
    save_file(arrays, source / "model.safetensors", {"format": "mlx"})
    return source


def is_router(name: str, w: np.ndarray) -> bool:
    return name.endswith(("gate.weight", "router.weight", "router.layer.weight", "gate.wg.weight")) and w.shape[0] == 8


def ties(name: str, w: np.ndarray) -> np.ndarray:
    """Every expert has the same score, for every token."""
    return np.zeros_like(w) if is_router(name, w) else w


def strange(name: str, w: np.ndarray) -> np.ndarray:
    """Experts that are nothing, of rank one, constant, with one outlier, or too small for float16."""
    if w.ndim != 3 or w.shape[0] != 8:
        return w
    w = w.copy()
    w[0] = 0
    w[1] = np.outer(w[1][:, 0], w[1][0]) * 10
    w[2] = 0.05
    w[3][0, 0] = 1e4
    w[4] = 1e-30 * w[4]
    return w


QUICK = ["qwen3_moe", "deepseek_v2"]
ALL = [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in sorted(families.TYPES)]


@needs_compiler
@pytest.mark.parametrize("family", ALL)
def test_a_router_with_equal_scores_chooses_as_mlx_lm_does(tmp_path, family):
    """And is calibrated: all tokens go to the same experts, the others get none."""
    source = change(family_checks.write(tmp_path, family), ties)
    try:
        directory = convert(source, tmp_path / "out", Settings(bits=3.0, calibration="none"))
    except FormatError:
        pytest.skip("a type that is refused (test_families.py)")
    try:
        family_checks.compare(directory)
    except RuntimeError as error:
        assert str(error) == family_checks.NO_METAL


def finite_text(directory: Path) -> None:
    """It verifies, and writes."""
    assert not list(verify.find_problems(directory))
    model, tokenizer = tiny_qmoe_mlx.load(directory, context=128)
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
    tiny_qmoe_mlx.generate(model, tokenizer, [1, 2, 3], max_tokens=3)
    model.close()


@needs_compiler
def test_strange_experts_through_the_trellis(tmp_path):
    """One expert takes all tokens."""
    source = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe", num_experts_per_tok=1)
    change(change(source, strange), ties)
    directory = convert(source, tmp_path / "out", Settings(bits=3.0, **SMALL))
    family_checks.compare(directory)
    finite_text(directory)


@needs_compiler
@pytest.mark.parametrize("how", [pytest.param(n, marks=[] if n == "2-bit" else pytest.mark.slow) for n in qmoe.ASKED])
def test_strange_experts_through_qmoe(tmp_path, how):
    source = change(tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe"), strange)
    settings = Settings(codec="qmoe", rest_bits=8, **SMALL, **qmoe.ASKED[how])
    directory = convert(source, tmp_path / "out", settings)
    plain, tokens = qmoe.plain_model(directory), mx.array([[1, 2, 3, 4, 5, 6, 7]])
    model, _ = models.load(directory, context=128)
    want = np.array(plain(tokens))
    assert np.abs(np.array(model(tokens)) - want).max() <= 1e-4 * np.abs(want).max()
    model.close()
    finite_text(directory)


def strange_layers(name: str, w: np.ndarray) -> np.ndarray:
    """The same in the matrices of a dense model."""
    if w.ndim != 2 or ".layers." not in name:
        return w
    w = w.copy()
    if "q_proj" in name:
        w[:] = 0
    if "up_proj" in name:
        w[:] = np.outer(w[:, 0], w[0])
    if "v_proj" in name:
        w[:] = 0.05
    if "gate_proj" in name:
        w[0, 0] = 1e4
    return w


@needs_compiler
@pytest.mark.parametrize("how", ["lossless", *coded.LEVELS])
def test_strange_layers_of_a_dense_model(tmp_path, how):
    source = change(tiny_models.make_checkpoint(tmp_path / "hf", "llama"), strange_layers)
    settings, plain = Settings(codec="lossless"), coded.plain(source)
    if how != "lossless":
        group, coder = coded.LEVELS[how]
        settings = Settings(codec="tiny-qmoe", group=group, coder=coder, rest_bits=16)
        plain = coded.rounded(plain, group)
    directory = convert(source, tmp_path / "out", settings)
    model, _ = models.load(directory, context=128)
    want = coded.logits(plain)
    assert np.isfinite(want).all()
    assert np.abs(coded.logits(model) - want).max() <= 1e-4 * np.abs(want).max()
    model.close()
    finite_text(directory)


@needs_compiler
@pytest.mark.parametrize("codec", ["trellis", "qmoe", "lossless", "tiny-qmoe"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, codec, value):
    dense = codec in ("lossless", "tiny-qmoe")
    source = tiny_models.make_checkpoint(tmp_path / "hf", "llama" if dense else "qwen3_moe")
    name = "model.layers.1.mlp.up_proj.weight" if dense else "model.layers.1.mlp.switch_mlp.up_proj.weight"

    def spoil(found: str, w: np.ndarray) -> np.ndarray:
        if found == name:
            w = w.copy()
            w.reshape(-1)[7] = value
        return w

    change(source, spoil)
    settings = Settings(codec=codec, calibration="none", **({"bits": 1.5} if codec == "qmoe" else {}))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp.*up_proj.*finite"):
        convert(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


# ---- prompts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    if not native.available():
        pytest.skip("needs the C++ library")
    directory = convert(
        tiny_models.make_checkpoint(root / "hf", "qwen3_moe"), root / "out", Settings(bits=2.0, calibration="none")
    )
    model, tokenizer = tiny_qmoe_mlx.load(directory, context=64)
    yield model, tokenizer
    model.close()


@pytest.mark.parametrize("prompt", [[], "", [258], [-1], [10**9]])
def test_a_prompt_that_the_model_cannot_read_is_refused(small, prompt):
    """Tokens beyond the vocabulary were looked up beyond the embeddings' memory: the process could die of it."""
    rule = "at least one token" if not prompt else rf"should lie in 0 to 257, received {prompt[0]};"
    with pytest.raises(ValueError, match=rule):
        tiny_qmoe_mlx.stream_generate(*small, prompt)
    with pytest.raises(ValueError, match=rule):
        tiny_qmoe_mlx.batch_generate(*small, [[1, 2], prompt])


def test_prompts_of_one_token_to_more_than_the_context(small):
    """Each alone and all in one batch; the context that a budget provides for is no limit of the model's."""
    prompts = [[5], list(range(200)), [7, 8, 9], [11] * 120]
    alone = [tiny_qmoe_mlx.generate(*small, prompt, max_tokens=4) for prompt in prompts]
    assert tiny_qmoe_mlx.batch_generate(*small, prompts, max_tokens=4).texts == alone
