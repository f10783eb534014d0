"""The page's chat against a stub of the server: what a person writes, sees, and is told; text that is only text."""

import threading

import pytest
from page_server import Handler, Stub, begin, endless, event, experts, piece, say

pytest.importorskip("playwright.sync_api")
pytest.register_assert_rewrite("page_browser")
from page_browser import Page, Visit, answers, ask, expect, note, whole  # noqa: E402

pytest_plugins = ["page_browser"]
NASTY = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b> &amp; </code></pre>'


# ---- the chat


def test_text_is_shown_as_it_comes(page: Page, server: Stub) -> None:
    gate = threading.Semaphore(0)
    server.reply = say("Hel", "lo ", "there.", gate=gate)
    ask(page, "Who is it?")
    expect(page.locator(".waiting")).to_be_visible()
    gate.release()
    expect(answers(page)).to_have_text("Hel")
    expect(page.locator("#stop")).to_be_visible()
    gate.release(2)
    whole(page, "Hello there.")
    expect(page.locator("article.user .body")).to_have_text("Who is it?")
    expect(note(page)).to_contain_text("3 tokens")
    expect(page.locator(".waiting")).to_have_count(0)
    (body,) = server.chats
    assert body["messages"] == [{"role": "user", "content": "Who is it?"}]
    assert body["stream"] is True and body["model"] == "stub-model" and "max_tokens" not in body


def test_history_goes_along_and_survives_a_reload(page: Page, server: Stub) -> None:
    server.reply = say("One.")
    ask(page, "First?")
    whole(page, "One.")
    page.reload()
    expect(answers(page)).to_have_text("One.")
    server.reply = say("Two.")
    ask(page, "Second?")
    whole(page, "Two.")
    roles = [(m["role"], m["content"]) for m in server.chats[-1]["messages"]]
    assert roles == [("user", "First?"), ("assistant", "One."), ("user", "Second?")]
    page.locator("#new-chat").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, "Third?")
    whole(page, "Two.")
    assert len(server.chats[-1]["messages"]) == 1


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_stream(page: Page, server: Stub, how: str) -> None:
    server.reply = endless
    ask(page)
    expect(answers(page)).to_contain_text("word3")
    page.locator("#stop").click() if how == "button" else page.keyboard.press("Escape")
    expect(note(page)).to_have_text("Stopped")
    assert server.gone.wait(10), "the page still reads"
    expect(page.locator(".problem")).to_have_count(0)
    server.reply = say("More.")
    ask(page, "And?")
    whole(page, "More.")
    assert "word3" in server.chats[-1]["messages"][1]["content"]


@pytest.mark.slow
def test_a_new_chat_in_mid_answer_leaves_nothing_of_it(page: Page, server: Stub) -> None:
    server.reply = endless
    ask(page)
    expect(answers(page)).to_contain_text("word3")
    page.locator("#new-chat").click()
    assert server.gone.wait(10), "the page still reads"
    expect(page.locator("article, .problem, .waiting")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


@pytest.mark.slow
def test_settings_are_sent_and_kept(page: Page, server: Stub) -> None:
    page.locator("#open-settings").click()
    page.locator("#system").fill("Be brief.")
    page.locator("#max-tokens").fill("17")
    page.locator("#temperature").fill("0.3")
    page.locator("#settings .primary").click()
    page.reload()
    ask(page)
    whole(page, "Hello.")
    (body,) = server.chats
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["temperature"]) == (17, 0.3)


@pytest.mark.slow
def test_settings_that_are_left_with_escape_are_not_kept(page: Page, server: Stub) -> None:
    for tokens, key in (("33", "Enter"), ("44", "Escape")):
        page.locator("#open-settings").click()
        page.locator("#max-tokens").fill(tokens)
        page.keyboard.press(key)
        expect(page.locator("#settings")).to_be_hidden()
    ask(page)
    whole(page, "Hello.")
    assert server.chats[0]["max_tokens"] == 33
    page.locator("#open-settings").click()
    page.locator("#max-tokens").fill("")
    page.keyboard.press("Enter")
    ask(page)
    whole(page, "Hello.")
    expect(page.locator("article")).to_have_count(4)
    assert "max_tokens" not in server.chats[1]


@pytest.mark.parametrize("wrong", ["0", *(pytest.param(wrong, marks=pytest.mark.slow) for wrong in ("-3", "1.5"))])
def test_a_wrong_number_of_tokens_is_not_taken(page: Page, server: Stub, wrong: str) -> None:
    page.locator("#open-settings").click()
    page.locator("#max-tokens").fill(wrong)
    page.locator("#settings .primary").click()
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    ask(page)
    whole(page, "Hello.")
    assert "max_tokens" not in server.chats[0]


@pytest.mark.slow
def test_an_answer_at_its_limit_says_so(page: Page, server: Stub) -> None:
    server.reply = say("And then", reason="length")
    ask(page)
    expect(note(page)).to_contain_text("limit of tokens")


@pytest.mark.slow
def test_reasoning_is_apart_from_the_answer(page: Page, server: Stub) -> None:
    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        event(handler, piece("Let me see.", key="reasoning"))
        event(handler, piece("Four.", "stop"))
        event(handler, "[DONE]")

    server.reply = reply
    ask(page, "Two and two?")
    whole(page, "Four.")
    expect(page.locator("article.assistant details p")).to_have_text("Let me see.")


def test_code_is_set_apart_and_copied(visit: Visit, server: Stub) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    server.reply = say("Try:\n``", "`pyth", "on\nif x < 1:\n    print('```')\n`", "``\nDone.\n```\nopen")
    ask(page)
    expect(answers(page).locator("p")).to_have_text(["Try:", "Done."])
    expect(page.locator("#send")).to_be_visible()
    codes = answers(page).locator("pre code")
    assert codes.all_text_contents() == ["if x < 1:\n    print('```')", "open"]
    expect(answers(page).locator(".code-head span")).to_have_text(["python", "code"])
    answers(page).locator(".code-head button").first.click()
    expect(answers(page).locator(".code-head button").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "if x < 1:\n    print('```')"
    page.locator("article.assistant footer button").click()
    expect(page.locator("article.assistant footer button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("Try:\n```python\n")


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["\n\n", "\r\n\r\n"])
def test_a_character_in_two_packets_stays_whole(page: Page, server: Stub, ends: str) -> None:
    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        data = f'data: {{"choices": [{{"delta": {{"content": "Zürich 雪"}}}}]}}{ends}'.encode()
        for at in range(len(data)):
            handler.wfile.write(data[at : at + 1])
            handler.wfile.flush()
        event(handler, "[DONE]", ends)

    server.reply = reply
    ask(page)
    whole(page, "Zürich 雪")


@pytest.mark.slow
def test_progress_through_a_long_prompt_is_shown(page: Page, server: Stub) -> None:
    gate = threading.Event()

    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        handler.wfile.write(b": keepalive 512/2048\n\n")
        handler.wfile.flush()
        gate.wait(10)
        event(handler, piece("Read.", "stop"))
        event(handler, "[DONE]")

    server.reply = reply
    ask(page)
    expect(page.locator(".waiting")).to_have_text("Reading the prompt, 512 of 2,048 tokens")
    gate.set()
    whole(page, "Read.")


# ---- text is text


def test_html_is_never_read_as_html(page: Page, server: Stub) -> None:
    server.experts = {**experts(), "model": NASTY}

    def reply(handler: Handler, body: dict) -> None:
        begin(handler)
        event(handler, piece(NASTY, key="reasoning"))
        event(handler, piece(f"{NASTY}\n```{NASTY.split()[0]}\n{NASTY}\n```"))
        event(handler, {"error": {"message": NASTY}})

    server.reply = reply
    ask(page, NASTY)
    expect(page.locator(".problem p").first).to_have_text(NASTY)
    expect(page.locator("article.user .body")).to_have_text(NASTY)
    expect(answers(page).locator("p")).to_have_text(NASTY)
    expect(answers(page).locator("code")).to_have_text(NASTY)
    expect(page.locator("article.assistant details p")).to_have_text(NASTY)
    expect(page.locator("#model")).to_have_text(NASTY)
    page.reload()
    expect(answers(page).locator("code")).to_have_text(NASTY)
    assert page.locator("main img, main script, main b").count() == 0
    assert page.evaluate("window.hacked") is None
