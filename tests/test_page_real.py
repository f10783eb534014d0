"""The page on the real server, with a tiny converted model whose experts are streamed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import server_model
from server_process import CHAT, Server, serving

pytest.importorskip("playwright.sync_api")
pytest.register_assert_rewrite("page_browser")
from page_browser import Page, Visit, answers, ask, expect, note  # noqa: E402

pytest_plugins = ["command_fixtures", "page_browser"]
pytestmark = pytest.mark.slow
CONTEXT, TOKENS = 1024, 40
SETTINGS = {"system": "", "max_tokens": TOKENS, "temperature": 0}
KEEP = f"localStorage.setItem('settings', '{json.dumps(SETTINGS)}')"
QUESTION = "the river stone"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return server_model.make(tmp_path_factory.mktemp("page"), text)


@pytest.fixture(scope="module")
def real(model: Path) -> Iterator[Server]:
    with serving(model, "--context", CONTEXT) as running:
        yield running


def written(page: Page) -> list[dict]:
    """The conversation as the page keeps it."""
    return json.loads(page.evaluate("sessionStorage.getItem('messages')"))


def test_an_answer_is_the_one_that_the_api_gives(visit: Visit, real: Server) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, "temperature": 0}
    wanted = real.get(CHAT, body)["choices"][0]["message"]["content"]
    page = visit(f"{real.url}/", KEEP)
    ask(page, QUESTION)
    expect(note(page)).to_contain_text(f"{TOKENS} tokens · ", timeout=60000)
    expect(note(page)).to_contain_text("ended at the limit of tokens")
    assert written(page)[-1]["content"] == wanted


def test_the_map_shows_what_the_server_says(visit: Visit, real: Server) -> None:
    page = visit(f"{real.url}/", KEEP)
    ask(page, QUESTION)
    expect(note(page)).to_contain_text("tokens", timeout=60000)
    found = real.get("/experts")
    resident, count = "".join(found["state"]).count("r"), sum(layer["experts"] for layer in found["layers"])
    part = "all" if resident == count else f"{resident} of"
    expect(page.locator("#residence")).to_have_text(f"{part} {count} in memory")
    uses = found["use"][0]
    best = uses.index(max(uses))
    page.locator("#cells").focus()
    page.keyboard.press("Home")
    for _ in range(best):
        page.keyboard.press("ArrowDown")
    expect(page.locator("#tip")).to_contain_text(f"Layer {found['layers'][0]['layer']}, expert {best}")
    expect(page.locator("#tip")).to_contain_text(f"used {uses[best]:,} times")
    expect(page.locator("#queue")).to_contain_text(f"context of {CONTEXT:,}")


def test_stop_frees_the_slot(visit: Visit, real: Server) -> None:
    page = visit(f"{real.url}/", KEEP.replace(f'"max_tokens": {TOKENS}', '"max_tokens": 900'))
    ask(page, QUESTION)
    expect(answers(page)).not_to_be_empty(timeout=60000)
    page.keyboard.press("Escape")
    expect(note(page)).to_have_text("Stopped")
    real.wait(lambda figures: figures["tiny_qmoe_requests_active"] == 0)


def test_a_prompt_beyond_the_context_is_told(visit: Visit, real: Server, allowed: list[str]) -> None:
    allowed.append("400")
    page = visit(f"{real.url}/", KEEP)
    ask(page, "stone " * 2 * CONTEXT)
    expect(page.get_by_role("alert")).to_contain_text(f"context of {CONTEXT} tokens")
    expect(page.get_by_role("alert")).to_contain_text("ask for fewer tokens in Settings")


def test_a_key_opens_the_server(visit: Visit, model: Path, tmp_path: Path, allowed: list[str]) -> None:
    allowed.append("401")
    key = tmp_path / "key.txt"
    key.write_text("secret-7\n")
    with serving(model, "--context", CONTEXT, "--api-key-file", key) as running:
        page = visit(f"{running.url}/", KEEP)
        expect(page.locator("#lock")).to_be_visible()
        page.keyboard.type("secret-7")
        page.keyboard.press("Enter")
        expect(page.locator("#connection-text")).to_have_text("Connected")
        ask(page, QUESTION)
        expect(note(page)).to_contain_text("tokens", timeout=60000)
        page.context.close()


def test_a_server_that_stops_is_missed(visit: Visit, model: Path, allowed: list[str]) -> None:
    allowed.append("ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE")
    with serving(model, "--context", CONTEXT) as running:
        page = visit(f"{running.url}/", KEEP)
        expect(page.locator("#connection-text")).to_have_text("Connected")
    expect(page.locator("#connection-text")).to_have_text("Server not reachable")
    ask(page, QUESTION)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
