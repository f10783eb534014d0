"""What the server's tests share: a model, a server of it that streams experts, a client, and what `generate` writes.

A test module takes these in with `pytest_plugins = ["command_fixtures", "server_fixtures"]`.
"""

from pathlib import Path

import pytest
import server_model
from server_process import CONTEXT, TOKENS, least, serving

import tiny_qmoe_mlx


@pytest.fixture(scope="session")
def served(tmp_path_factory, text) -> Path:
    """A converted model that calls tools."""
    return server_model.make(tmp_path_factory.mktemp("served"), text)


@pytest.fixture(scope="session")
def live(served):
    """The server of most tests, with experts streamed under the smallest budget."""
    with serving(served, "--context", CONTEXT, "--memory", least(served, CONTEXT), "--log-level", "info") as running:
        yield running


@pytest.fixture(scope="session")
def client(live):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="session")
def alone(served):
    """A function that gives what our own `generate` writes, one prompt at a time; text, or messages."""
    model, tokenizer = tiny_qmoe_mlx.load(served)

    def write(prompt: str | list[dict], tokens: int = TOKENS, **options) -> str:
        ids = prompt
        if not isinstance(prompt, str):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        return tiny_qmoe_mlx.generate(model, tokenizer, ids, max_tokens=tokens)

    write.model, write.tokenizer = model, tokenizer
    with model:
        yield write
