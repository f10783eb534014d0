"""A tiny model for the server's tests: its chat template knows tools, and where it is offered some, it calls one.

The call is written by a chain of tokens of which each makes the next by far the likeliest: their embeddings point along
axes of their own, which the output layer reads. Anything else it writes is noise, and it never ends by itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny_models
from commands import SMALL, environment
from safetensors.numpy import save_file

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CHAIN = ("<|call|>", "<tool_call>", json.dumps(CALL), "</tool_call>")  # and then the end of the text
EOS = tiny_models.BASE["eos_token_id"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if tools %}<|call|>{# <tool_call> tool_call.name #}{% elif add_generation_prompt %}assistant: {% endif %}"
)


def make(directory: Path, text: Path) -> Path:
    """Write the checkpoint and convert it by the command; the converted directory."""
    first = tiny_models.BASE["vocab_size"]
    checkpoint = tiny_models.make_checkpoint(directory / "hf", "qwen3_moe", vocab_size=first + len(CHAIN))
    weights = {name: np.array(w) for name, w in mx.load(str(checkpoint / "model.safetensors")).items()}
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    output[EOS] = 0
    for i in range(len(CHAIN)):
        axis = np.zeros(embedding.shape[1], embedding.dtype)
        axis[i] = 1
        embedding[first + i] = 60 * axis
        output[first + i] = 0
    for i in range(len(CHAIN)):
        output[first + i + 1 if i + 1 < len(CHAIN) else EOS, i] = 1.2
    save_file(weights, checkpoint / "model.safetensors", {"format": "mlx"})
    add_tokens(checkpoint)
    out = directory / "model"
    command = [sys.executable, "-m", "tiny_qmoe_mlx.convert", "--hf-path", checkpoint, "--mlx-path", out]
    subprocess.run([*command, "--calibration", text, *SMALL], env=environment(), check=True, capture_output=True)
    return out


def add_tokens(checkpoint: Path) -> None:
    """Give the tokenizer the chain's tokens, and a chat template by which mlx-lm knows how calls are written."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CHAIN])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
