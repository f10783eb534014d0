"""The page's map of experts and its figures, its looks, its keyboard, and narrow screens, against a stub."""

import re

import pytest
from page_server import Stub, experts, say

pytest.importorskip("playwright.sync_api")
pytest.register_assert_rewrite("page_browser")
from page_browser import Page, Visit, answers, ask, expect, until, variable, whole  # noqa: E402

pytest_plugins = ["page_browser"]


# ---- the map


def colour(page: Page, layer: float, expert: float) -> str:
    """Of the middle of a cell, for 4 layers of 6 experts, as a hexadecimal number."""
    return page.evaluate(
        """([x, y]) => {
            const canvas = document.getElementById("cells");
            const at = canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data;
            return "#" + [...at.slice(0, 3)].map((c) => c.toString(16).padStart(2, "0")).join("");
        }""",
        [(layer + 0.5) / 4, (expert + 0.5) / 6],
    )


def becomes(page: Page, layer: int, expert: int, name: str) -> None:
    """A cell gets the colour of that name."""
    wanted = variable(page, name)
    for _ in range(600):
        if colour(page, layer, expert) == wanted:
            return
        page.wait_for_timeout(50)
    pytest.fail(f"layer {layer}, expert {expert} should be {name} {wanted}, it is {colour(page, layer, expert)}")


def test_pixels_follow_the_experts(visit: Visit, server: Stub) -> None:
    page = visit(reduced_motion="reduce")  # a poll's picture then stays until the next
    becomes(page, 1, 2, "absent")
    now = experts()
    now["state"] = ["......", "..rl..", "......", "....r."]
    server.experts = now
    becomes(page, 1, 2, "resident")
    becomes(page, 1, 3, "loading")
    becomes(page, 3, 4, "resident")
    becomes(page, 0, 0, "absent")
    used = experts()
    used["state"] = now["state"]
    used["state"] = ["......", "..rr..", "r.....", "....r."]
    used["use"] = [[0] * 6, [0, 0, 3, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    server.experts = used
    becomes(page, 1, 2, "hit")
    becomes(page, 2, 0, "loading")  # it was not in memory before
    becomes(page, 3, 4, "resident")
    becomes(page, 1, 2, "resident")  # without further use
    becomes(page, 2, 0, "resident")
    expect(page.locator("#residence")).to_have_text("4 of 24 in memory")


def test_a_hit_fades(page: Page, server: Stub) -> None:
    server.experts = experts(state="r")
    becomes(page, 0, 0, "resident")
    seen = experts(state="r")
    seen["use"][0][0] = 5
    page.evaluate(
        """() => {
            window.shades = new Set();
            const look = () => {
                const at = document.getElementById("cells").getContext("2d").getImageData(2, 2, 1, 1).data;
                window.shades.add(at.slice(0, 3).join());
                requestAnimationFrame(look);
            };
            look();
        }"""
    )
    server.experts = seen
    until(page, "window.shades.size > 3")
    becomes(page, 0, 0, "resident")


@pytest.mark.slow
def test_figures_and_memory(page: Page, server: Stub) -> None:
    expect(page.locator("#rate")).to_have_text("12.3")
    expect(page.locator("#hits")).to_have_text("91.4%")
    expect(page.locator("#read")).to_have_text("1.23")
    expect(page.locator("#read-unit")).to_have_text("MB per token")
    expect(page.locator("#memory-text")).to_have_text("323 MB of 431 MB")
    meter = page.get_by_role("meter")
    assert meter.get_attribute("aria-valuenow") == "75"
    widths = [page.locator(f"#memory-{part}").bounding_box()["width"] for part in ("rest", "pool")]
    full = meter.bounding_box()["width"]
    assert [round(w / full, 2) for w in widths] == [0.5, 0.25]
    server.experts = {**experts(), "stats": dict.fromkeys(experts()["stats"])}  # nothing is known
    expect(page.locator("#rate")).to_have_text("–")
    expect(page.locator("#hits")).to_have_text("–")
    server.experts["stats"] = {**experts()["stats"], "bytes_per_token": 1.5e9, "held_bytes": 862e6}
    expect(page.locator("#read")).to_have_text("1.50")
    expect(page.locator("#read-unit")).to_have_text("GB per token")
    expect(page.locator("#memory")).to_have_class("over")


@pytest.mark.parametrize("scale", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_large_model_fits_and_every_expert_can_be_pointed_at(visit: Visit, server: Stub, scale: int) -> None:
    server.experts = experts(layers=60, count=512, first=3)
    server.experts["state"] = ["r" * 512] * 30 + ["." * 512] * 30
    page = visit(device_scale_factor=scale, viewport={"width": 1280, "height": 800})
    expect(page.locator("#residence")).to_have_text("15,360 of 30,720 in memory")
    box = page.locator("#cells").bounding_box()
    assert box["width"] <= page.locator("#field").bounding_box()["width"] and box["height"] < 800
    count = """(hex) => {
        const canvas = document.getElementById("cells");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
        let found = 0;
        for (let i = 0; i < data.length; i += 4) found += data[i] === r && data[i + 1] === g && data[i + 2] === b;
        return found;
    }"""
    pixels = [page.evaluate(count, variable(page, name)) for name in ("resident", "absent")]
    assert pixels[0] == pixels[1] and pixels[0] >= 15360 and pixels[0] % 15360 == 0
    tip = page.locator("#tip strong")
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    expect(tip).to_have_text("Layer 3, expert 0")
    for back in range(1, 12):  # the last row may be short
        page.mouse.move(box["x"] + box["width"] - back, box["y"] + box["height"] - 1)
        if tip.is_visible():
            break
    expect(tip).to_have_text("Layer 62, expert 511")
    page.mouse.move(5, 5)
    expect(page.locator("#tip")).to_be_hidden()


@pytest.mark.slow
def test_layers_of_unequal_size_and_another_model(page: Page, server: Stub) -> None:
    mixed = experts(layers=3)
    mixed["layers"][1]["experts"], mixed["state"][1], mixed["use"][1] = 2, "rr", [4, 1]
    server.experts = mixed
    expect(page.locator("#residence")).to_have_text("2 of 14 in memory")
    page.locator("#cells").focus()
    for key in ("Home", "End", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#tip")).to_contain_text("Layer 1, expert 1in memory, 27.5 KBused 1 time, 20.0% of its layer's")
    server.experts = {**experts(layers=0), "model": "dense"}
    expect(page.locator("#residence")).to_have_text("This model has no routed experts.")
    expect(page.locator("#map")).to_be_hidden()


@pytest.mark.slow
def test_a_map_that_cannot_be_read_leaves_the_chat(page: Page, server: Stub) -> None:
    server.experts = {"model": "odd"}
    expect(page.locator("#connection-text")).to_contain_text("The map cannot be read")
    ask(page)
    whole(page, "Hello.")


# ---- looks, keyboard, narrow screens


def luminance(hex: str) -> float:
    parts = [int(hex[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(visit: Visit, server: Stub, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
    pairs = [("text", "ground"), ("muted", "ground"), ("muted", "panel"), ("text", "bubble"), ("on-strong", "strong")]
    found = {
        pair: contrast(variable(page, pair[0]), variable(page, pair[1])) for pair in [*pairs, ("bad", "bad-ground")]
    }
    assert min(found.values()) >= 4.5, found
    states = {s: contrast(variable(page, s), variable(page, "absent")) for s in ("resident", "loading", "hit")}
    assert min(states.values()) >= 1.9, states


def test_the_switch_wins_over_the_system_and_is_kept(visit: Visit, server: Stub) -> None:
    page = visit(color_scheme="light")
    light = variable(page, "absent")
    becomes(page, 0, 0, "absent")
    page.locator("#theme").click()
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert variable(page, "absent") != light
    becomes(page, 0, 0, "absent")  # the map is drawn anew
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.locator("#theme").click()
    page.emulate_media(color_scheme="dark")  # back with the system, it follows it
    until(page, "document.documentElement.dataset.theme === 'dark'")


def test_the_keyboard_alone_is_enough(page: Page, server: Stub) -> None:
    focused = "document.activeElement.id"
    assert page.evaluate(focused) == "prompt"
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    whole(page, "Hello.")
    assert server.chats[0]["messages"][0]["content"] == "Line one\nline two"
    assert page.evaluate(focused) == "prompt"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(focused))
    assert {"new-chat", "open-settings", "theme", "log", "prompt", "send", "cells"} <= reached
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    assert page.evaluate(focused) == "open-settings"
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "prompt"
    page.keyboard.press("ArrowUp")
    assert page.locator("#prompt").input_value() == "Line one\nline two"


def test_the_map_is_read_out_by_keys(page: Page, server: Stub) -> None:
    seen = experts(state="r")
    seen["use"][1] = [0, 0, 6, 0, 2, 0]
    server.experts = seen
    expect(page.locator("#residence")).to_have_text("all 24 in memory")
    assert page.locator("#cells").get_attribute("aria-label") == "4 layers of experts, all 24 in memory"
    page.locator("#cells").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#spoken")).to_have_text(
        "Layer 1, expert 2: in memory, 27.5 KB: used 6 times, 75.0% of its layer's uses"
    )
    expect(page.locator("#tip strong")).to_have_text("Layer 1, expert 2")
    for key in ("ArrowLeft", "ArrowLeft", "End", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#tip strong")).to_have_text("Layer 0, expert 5")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


@pytest.mark.slow
def test_every_control_has_a_name(page: Page, server: Stub) -> None:
    ask(page)
    whole(page, "Hello.")
    tree = page.locator("body").aria_snapshot()
    assert not re.search(r"^\s*- (button|textbox|spinbutton|slider|log|meter)\s*:?$", tree, re.MULTILINE), tree
    for part in ('log "Conversation"', 'textbox "Message"', 'meter "Memory held', 'button "Dark appearance"'):
        assert part in tree
    expect(page.locator("#announce")).to_have_text("Hello.")


SIZES = [(320, 568), (740, 360), (1600, 1000)]


@pytest.mark.parametrize("size", [(360, 640), *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)])
def test_nothing_is_cut_off(visit: Visit, server: Stub, size: tuple[int, int]) -> None:
    server.experts = experts(layers=60, count=512)
    server.reply = say("a" * 300 + "\n```\n" + "b" * 300 + "\n```")
    page = visit(viewport={"width": size[0], "height": size[1]})
    ask(page, "c" * 200)
    expect(page.locator("#send")).to_be_visible()
    expect(answers(page).locator("code")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for part in ("#prompt", "#new-chat", "#open-settings", "#theme", "#cells"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], part
    page.locator("#prompt").scroll_into_view_if_needed()
    box = page.locator("#prompt").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= size[1]


@pytest.mark.slow
def test_the_map_folds_on_a_phone(visit: Visit, server: Stub) -> None:
    page = visit(viewport={"width": 360, "height": 640})
    expect(page.locator("#cells")).to_be_visible()
    page.locator("#fold").click()
    expect(page.locator("#cells")).to_be_hidden()
    assert page.locator("#fold").get_attribute("aria-expanded") == "false"
    expect(page.locator("#rate")).to_be_visible()
    page.locator("#fold").click()
    expect(page.locator("#cells")).to_be_visible()


@pytest.mark.slow
def test_nothing_is_asked_while_nobody_looks(page: Page, server: Stub) -> None:
    expect(page.locator("#connection-text")).to_have_text("Connected")
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { value: true, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    page.wait_for_timeout(1000)  # what was under way has come
    before = server.polls
    page.wait_for_timeout(2500)  # more than two polls' time
    assert server.polls == before
    with page.expect_response("**/experts"):
        page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
