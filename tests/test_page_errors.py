"""What the page tells a person when there is no answer, and what it offers; the token that a server may ask for."""

import pytest
from page_server import Handler, Stub, begin, event, piece, refuse, say

pytest.importorskip("playwright.sync_api")
pytest.register_assert_rewrite("page_browser")
from page_browser import Page, Visit, answers, ask, expect, whole  # noqa: E402

pytest_plugins = ["page_browser"]


def test_a_busy_server_is_asked_again_when_it_said(page: Page, server: Stub, allowed: list[str]) -> None:
    allowed.append("503")
    served = say("At last.")
    busy = refuse(503, "64 requests wait already.", Retry_After="1")
    server.reply = lambda handler, body: (busy if len(server.chats) == 1 else served)(handler, body)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("64 requests wait already.")
    expect(page.get_by_role("alert")).to_contain_text("Trying again in 1 s.")
    whole(page, "At last.")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert len(server.chats) == 2


@pytest.mark.slow
def test_waiting_for_a_busy_server_can_be_stopped(page: Page, server: Stub, allowed: list[str]) -> None:
    allowed.append("503")
    server.reply = refuse(503, "Busy.", Retry_After="60")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("in 60 s")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".problem")).to_have_count(0)
    assert len(server.chats) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, "The model is being loaded."),
        pytest.param(400, "max_tokens should be at least 1.", marks=pytest.mark.slow),
        pytest.param(500, "It failed.", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_told_and_can_be_tried_again(
    page: Page, server: Stub, allowed: list[str], status: int, message: str
) -> None:
    allowed.append(str(status))
    server.reply = refuse(status, message)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text(message)
    server.reply = say("Now.")
    page.get_by_role("button", name="Try again").click()
    whole(page, "Now.")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert server.chats[1]["messages"] == server.chats[0]["messages"]


@pytest.mark.slow
def test_an_error_without_a_sentence_names_the_status(page: Page, server: Stub, allowed: list[str]) -> None:
    allowed.append("502")
    server.reply = lambda handler, body: handler.answer(502, b"<html>Bad Gateway</html>", "text/html")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The server answered 502")


@pytest.mark.slow
def test_a_full_context_offers_a_new_chat(page: Page, server: Stub, allowed: list[str]) -> None:
    allowed.append("400")
    ask(page, "First?")
    whole(page, "Hello.")
    server.reply = refuse(400, "the prompt has 5000 tokens, the context 4096.", code="context_length_exceeded")
    ask(page, "Second?")
    expect(page.get_by_role("alert")).to_contain_text("the prompt has 5000 tokens, the context 4096.")
    expect(page.get_by_role("alert")).to_contain_text("Begin a new chat, or ask for fewer tokens")
    page.get_by_role("alert").get_by_role("button", name="New chat").click()
    expect(page.locator("article, .problem")).to_have_count(0)


def test_a_cut_answer_keeps_its_text_and_can_be_asked_again(page: Page, server: Stub) -> None:
    def cut(handler: Handler, body: dict) -> None:
        begin(handler)
        event(handler, piece("Half an ans"))

    server.reply = cut
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The connection ended before the answer did.")
    expect(answers(page)).to_have_text("Half an ans")
    server.reply = say("All of it.")
    page.get_by_role("button", name="Try again").click()
    whole(page, "All of it.")
    expect(answers(page)).to_have_count(1)
    assert [m["role"] for m in server.chats[-1]["messages"]] == ["user"]


@pytest.mark.slow
def test_a_chunk_that_is_no_json_is_told(page: Page, server: Stub) -> None:
    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        event(handler, "{not json")

    server.reply = reply
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The server's answer cannot be read")


def test_a_server_that_is_gone_and_comes_back(visit: Visit, server: Stub, allowed: list[str]) -> None:
    allowed.append("ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET")
    page = visit()
    expect(page.locator("#connection-text")).to_have_text("Connected")
    page.route("**/experts", lambda route: route.abort("connectionrefused"))
    page.route("**/completions", lambda route: route.abort("connectionrefused"))
    ask(page, "Still there?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(page.locator("#connection-text")).to_have_text("Server not reachable")
    page.unroute("**/experts")
    page.unroute("**/completions")
    page.get_by_role("button", name="Try again").click()
    whole(page, "Hello.")
    expect(page.locator("#connection-text")).to_have_text("Connected")


@pytest.mark.slow
def test_questions_without_an_answer_are_joined(page: Page, server: Stub, allowed: list[str]) -> None:
    allowed.append("500")
    server.reply = refuse(500, "It failed.")
    ask(page, "One?")
    expect(page.get_by_role("alert")).to_contain_text("It failed.")
    server.reply = say("Both.")
    ask(page, "Two?")
    whole(page, "Both.")
    assert server.chats[-1]["messages"] == [{"role": "user", "content": "One?\n\nTwo?"}]


# ---- the token


def test_a_token_is_asked_for_and_kept_in_the_tab_alone(visit: Visit, server: Stub, allowed: list[str]) -> None:
    allowed.append("401")
    server.token = "open sesame"
    page = visit()
    expect(page.locator("#lock")).to_be_visible()
    expect(page.locator("#lock-refused")).to_be_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#lock-refused")).to_be_visible()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#connection-text")).to_have_text("Connected")
    ask(page)
    whole(page, "Hello.")
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"
    assert "open sesame" in page.evaluate("JSON.stringify(sessionStorage)")
    assert page.context.cookies() == []


@pytest.mark.slow
def test_a_browser_without_storage_keeps_what_it_needs(visit: Visit, server: Stub, allowed: list[str]) -> None:
    allowed.append("401")
    server.token = "open sesame"
    forbid = "for (const name of ['localStorage', 'sessionStorage']) " + (
        "Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page = visit(script=forbid, color_scheme="light")
    expect(page.locator("#lock")).to_be_visible()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#connection-text")).to_have_text("Connected")
    for theme in ("dark", "light"):
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == theme
    ask(page)
    whole(page, "Hello.")


@pytest.mark.slow
def test_a_token_refused_by_the_person_can_be_given_later(visit: Visit, server: Stub, allowed: list[str]) -> None:
    allowed.append("401")
    server.token = "open sesame"
    page = visit()
    expect(page.locator("#lock")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#connection-text")).to_have_text("Token needed")
    page.wait_for_timeout(3500)  # more than a poll's time
    expect(page.locator("#lock")).to_be_hidden()
    page.locator("#unlock").click()
    expect(page.locator("#lock")).to_be_visible()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#connection-text")).to_have_text("Connected")
