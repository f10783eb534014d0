"""The server as its clients meet it: the openai package as a real client, one and many at once; its figures."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
import server_model
from server_process import CHAT, CONTEXT, TEXT, TOKENS, chat, least, serving

import tiny_qmoe_mlx
from tiny_qmoe_mlx import container, footprint
from tiny_qmoe_mlx.serving import batch, openapi, paths, schema

pytest_plugins = ["command_fixtures", "server_fixtures"]
openai = pytest.importorskip("openai")
CLIENTS = 16
PROMPTS = [f"the river stone {'light walks ' * (i % 4)}number {i}" for i in range(CLIENTS)]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOSE = 1e-3  # logits closer than this may change places when requests share a batch

# ---- OpenAI's API


def test_it_lists_its_model(client, served):
    assert [m.id for m in client.models.list()] == [str(served)]
    for name in ("default_model", str(served)):  # whose slashes the client writes as %2F
        assert client.models.retrieve(name).id == str(served)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_is_what_generate_writes(client, alone):
    answer = client.chat.completions.create(model="default_model", messages=chat("old quick"), max_tokens=TOKENS)
    assert answer.choices[0].message.content == alone(chat("old quick"))
    assert answer.choices[0].finish_reason == "length"
    prompt = len(alone.tokenizer.apply_chat_template(chat("old quick"), add_generation_prompt=True))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, TOKENS)


def test_a_stream_is_the_same_in_pieces(client, alone):
    options = {"max_completion_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    pieces = list(client.chat.completions.create(model="default_model", messages=chat("bright over"), **options))
    texts = [p.choices[0].delta.content for p in pieces if p.choices and p.choices[0].delta.content]
    assert len(texts) > 3 and "".join(texts) == alone(chat("bright over"))
    assert pieces[-1].usage.completion_tokens == TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_takes_the_prompt_as_it_is(client, alone, stream):
    answer = client.completions.create(model="default_model", prompt=PROMPTS[1], max_tokens=TOKENS, stream=stream)
    text = "".join(p.choices[0].text for p in answer) if stream else answer.choices[0].text
    assert text == alone(PROMPTS[1])


def test_a_stop_word_ends_the_answer_before_it(client, alone):
    whole = alone(PROMPTS[2])
    word = whole[8:10]
    answer = client.completions.create(model="default_model", prompt=PROMPTS[2], max_tokens=TOKENS, stop=word)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(word)]


def test_nulls_mean_what_leaving_out_means(live, alone):
    body = {"prompt": PROMPTS[3], "max_tokens": TOKENS, "temperature": None, "stop": None, "seed": None, "n": None}
    assert live.get(TEXT, body)["choices"][0]["text"] == alone(PROMPTS[3])


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(client, stream):
    options = {"model": "default_model", "messages": chat("Is it cold?"), "tools": [WEATHER], "stream": stream}
    answer = client.chat.completions.create(**options)
    choices = [piece.choices[0] for piece in answer] if stream else answer.choices
    assert choices[-1].finish_reason == "tool_calls"
    said = [choice.delta if stream else choice.message for choice in choices]
    (call,) = [call for part in said for call in part.tool_calls or []]
    assert call.function.name == server_model.CALL["name"]
    assert json.loads(call.function.arguments) == server_model.CALL["arguments"]
    assert not any(part.content for part in said)


def test_tools_are_left_alone_where_a_client_says_so(client, alone):
    options = {"messages": chat("Is it cold?"), "tools": [WEATHER], "tool_choice": "none", "max_tokens": TOKENS}
    answer = client.chat.completions.create(model="default_model", **options)
    assert answer.choices[0].message.content == alone(chat("Is it cold?"))


def test_a_second_turn_begins_in_the_prompt_cache(client, alone):
    first = client.chat.completions.create(model="default_model", messages=chat("green house"), max_tokens=TOKENS)
    more = [*chat("green house"), {"role": "assistant", "content": first.choices[0].message.content}, *chat("and now")]
    second = client.chat.completions.create(model="default_model", messages=more, max_tokens=TOKENS)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.choices[0].message.content == alone(more)


def test_a_seed_makes_sampling_repeatable(client):
    options = {"model": "default_model", "prompt": "wind rain", "max_tokens": 12, "temperature": 1.0}
    texts = [client.completions.create(**options, seed=seed).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("alone_too", [{}, {"seed": 1}], ids=["in a batch", "alone"])
@pytest.mark.parametrize("more", ["", "b", " and on"])
def test_a_client_goes_on_from_an_answer_that_was_cut(live, alone, more, alone_too):
    """All of its prompt, or all but the end, is cached; mlx-lm counts a token too many of what was served alone."""
    first = f"slow small {more}{len(alone_too)}"
    body = {"prompt": first, "max_tokens": 5, "logit_bias": {str(alone.tokenizer.encode("a")[0]): 1000}, **alone_too}
    assert live.get(TEXT, body)["choices"][0]["text"] == "aaaaa"
    prompt = f"{first}aaaaa{more}"
    after = live.get(TEXT, {"prompt": prompt, "max_tokens": TOKENS, **alone_too})
    assert len(first) <= after["usage"]["prompt_tokens_details"]["cached_tokens"] < len(prompt)
    assert after["choices"][0]["text"] == alone(prompt)


SCHEMA = {
    "type": "object",
    "properties": {"cold": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["cold", "size"],
    "additionalProperties": False,
}


def schema_format(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_a_schema(client, stream):
    pytest.importorskip("llguidance")
    options = {"messages": chat("How is it?"), "response_format": schema_format(SCHEMA), "max_tokens": 200}
    answer = client.chat.completions.create(model="default_model", stream=stream, **options)
    choices = [piece.choices[0] for piece in answer] if stream else answer.choices
    text = "".join((c.delta if stream else c.message).content or "" for c in choices)
    found = json.loads(text)
    assert sorted(found) == ["cold", "size"] and found["cold"] in (True, False) and found["size"] in ("small", "large")
    assert choices[-1].finish_reason == "stop"


def test_several_schemas_and_free_texts_share_a_batch(client, alone):
    pytest.importorskip("llguidance")
    words = ["small", "large", "odd"]

    def ask(i: int) -> str:
        form = {"response_format": schema_format({"enum": [words[i // 2]]})} if i % 2 else {}
        answer = client.chat.completions.create(
            model="default_model", messages=chat(PROMPTS[i]), max_tokens=TOKENS, **form
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    assert found[1::2] == [f'"{word}"' for word in words]
    assert found[::2] == [alone(chat(PROMPTS[i])) for i in (0, 2, 4)]


def test_a_seed_and_a_schema(client):
    pytest.importorskip("llguidance")
    options = {"messages": chat("?"), "response_format": schema_format(SCHEMA), "max_tokens": 200, "temperature": 1.0}
    answer = client.chat.completions.create(model="default_model", seed=3, **options)
    assert sorted(json.loads(answer.choices[0].message.content)) == ["cold", "size"]


def test_thoughts_are_left_free_of_a_schema(alone):
    """The schema begins after the tokens that end the thoughts, of which one is seen at a time."""
    matcher = pytest.importorskip("llguidance").LLMatcher
    size = alone.model.args.vocab_size
    grammars, encode = schema.Grammars(alone.tokenizer, size), alone.tokenizer.encode
    end = tuple(encode(".>"))
    follow = schema.Follow(lambda: matcher(grammars._tokens, matcher.grammar_from_json_schema({"enum": [7]})), end)
    context, free = encode("think. of>"), []
    for token in [None, *encode("so.>7"), server_model.EOS]:
        context += [] if token is None else [token]
        masked = follow(mx.array(context), mx.zeros((1, size)))
        free.append([i for i, value in enumerate(masked[0].tolist()) if value == 0])
    assert [len(x) for x in free[:4]] == [size] * 4, "nothing, s, o and . do not end it"
    assert free[4:6] == [encode("7"), [server_model.EOS]]


NOWHERE = {
    "itself": {"$ref": "#"},
    "an object in an object": {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
    "too many ways": {"anyOf": [{"required": [f"k{i}"]} for i in range(2100)], "type": "object"},
}


@pytest.mark.parametrize("what", NOWHERE)
def test_a_schema_that_cannot_be_followed_to_its_end_is_told(live, what):
    """llguidance finds some only where it gets there, and would end the answer as if it were whole."""
    pytest.importorskip("llguidance")
    asked = {"messages": chat("?"), "response_format": schema_format(NOWHERE[what]), "max_tokens": 20}
    status, error = live.refused(CHAT, asked)
    assert status == 400 and "response_format cannot be followed" in error["message"]


def test_any_json_object(client):
    pytest.importorskip("llguidance")
    options = {"messages": chat("How is it?"), "response_format": {"type": "json_object"}, "max_tokens": 8}
    answer = client.chat.completions.create(model="default_model", **options)
    assert answer.choices[0].message.content.startswith("{")


def strict(answer) -> dict:
    """JSON as it is defined: without NaN and infinity, which Python's own writes and reads."""

    def refuse(text: str):
        raise AssertionError(text)

    return json.loads(answer.read(), parse_constant=refuse)


@pytest.mark.parametrize("alone_too", [{}, {"seed": 1}], ids=["in a batch", "alone"])
def test_tokens_that_a_schema_rules_out_have_a_logarithm_too(live, alone_too):
    pytest.importorskip("llguidance")
    form = {"response_format": {"type": "json_object"}, "logprobs": True, "top_logprobs": 5, **alone_too}
    found = strict(live.open(CHAT, {"messages": chat("How is it?"), "max_tokens": 3, **form}))
    first = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert sorted((top["logprob"] for top in first), reverse=True) == [0, *[-9999] * 4], "an object begins in one way"


def test_no_penalty_is_a_penalty_of_0(live, alone):
    body = {"prompt": PROMPTS[3], "max_tokens": TOKENS, "logprobs": True}
    assert strict(live.open(TEXT, {**body, "repetition_penalty": 0}))["choices"][0]["text"] == alone(PROMPTS[3])
    strict(live.open(TEXT, {**body, "repetition_penalty": 0.01}))


@pytest.mark.slow
def test_a_draft_model_changes_nothing_but_speed(served, alone):
    """Requests are then served in turn."""
    options = ("--draft-model", served.parent / "hf", "--num-draft-tokens", 2, "--context", 512)
    with serving(served, *options) as drafted, ThreadPoolExecutor(3) as pool:
        bodies = [{"prompt": prompt, "max_tokens": TOKENS} for prompt in PROMPTS[:3]]
        for _ in range(2):  # the second time from the prompt cache
            found = list(pool.map(lambda body: drafted.get(TEXT, body)["choices"][0]["text"], bodies))
            assert found == [alone(prompt) for prompt in PROMPTS[:3]]
        status, error = drafted.refused(CHAT, {"messages": chat("x"), "response_format": {"type": "json_object"}})
        assert status == 501 and "--draft-model" in error["message"]


# ---- many clients


def first_difference(alone, prompt: str, texts: tuple[str, str]) -> float:
    """How far apart the two likeliest tokens are, for our own model, where two answers part."""
    ids = [alone.tokenizer.encode(text) for text in texts]
    same = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    logits = alone.model(mx.array([alone.tokenizer.encode(prompt) + ids[0][:same]]))[0, -1]
    top = sorted(logits.tolist())
    return top[-1] - top[-2]


def test_sixteen_clients_get_what_each_gets_alone(live, client, alone):
    before = live.metrics()
    for prompt in PROMPTS:
        client.completions.create(model="default_model", prompt=f"again {prompt}", max_tokens=TOKENS)
    single = live.metrics()

    def ask(prompt: str) -> str:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=120) as own:
            return own.completions.create(model="default_model", prompt=prompt, max_tokens=TOKENS).choices[0].text

    together, most = threading.Barrier(CLIENTS + 1), 0.0
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(lambda p: (together.wait(), ask(p))[1], prompt) for prompt in PROMPTS]
        together.wait()
        while not all(a.done() for a in asked):
            most = max(most, live.metrics()["tiny_qmoe_kv_tokens"])
    after = live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
    for prompt, answer in zip(PROMPTS, asked, strict=True):
        text, expected = answer.result(), alone(prompt)
        assert text == expected or first_difference(alone, prompt, (expected, text)) < CLOSE, (prompt, text, expected)
    tokens = "tiny_qmoe_generated_tokens_total"
    assert after[tokens] - single[tokens] == CLIENTS * TOKENS == single[tokens] - before[tokens]
    assert 0 < most <= CONTEXT + footprint.KV_STEP
    demands = [sum(m[f"tiny_qmoe_expert_{what}_total"] for what in ("hits", "misses")) for m in (before, single, after)]
    assert demands[2] - demands[1] < 0.6 * (demands[1] - demands[0]), "experts of a batch are demanded once"


def test_requests_that_do_not_fit_together_wait_for_each_other(live, alone):
    """Any two of three take more than the context: one after the other, and every answer is right."""
    prompts = [prompt + "~" * (980 - len(prompt)) for prompt in PROMPTS[:3]]
    most: list[float] = []
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(live.get, TEXT, {"prompt": p, "max_tokens": TOKENS}) for p in prompts]
        while not all(a.done() for a in asked):
            most.append(live.metrics()["tiny_qmoe_kv_tokens"])
            time.sleep(0.01)
    assert [a.result()["choices"][0]["text"] for a in asked] == [alone(prompt) for prompt in prompts]
    assert max(most) == 980 + TOKENS + footprint.KV_STEP


def test_what_sequences_of_a_batch_take():
    step = footprint.KV_STEP
    assert [batch.padded(x) for x in ([], [7], [7, 100, 30])] == [0, 7 + step, 3 * (100 + step)]


# ---- its description, figures and the page


def test_the_description_names_every_path(live):
    found = live.get("/openapi.json")
    assert found == json.loads(json.dumps(openapi.DESCRIPTION)) and found["openapi"].startswith("3.1")
    named = {path.replace("{model}", "x"): [m.upper() for m in item] for path, item in found["paths"].items()}
    assert sorted(named) == sorted([*paths.COMPLETIONS, *paths.OWN, "/", "/v1/models/x"])
    for path, methods in named.items():
        assert [m for m in paths.methods(path) if m not in ("HEAD", "OPTIONS")] == methods


def test_metrics(live, served):
    live.get(TEXT, {"prompt": "tree wind", "max_tokens": 4})
    found = live.wait(lambda m: m["tiny_qmoe_requests_active"] == 0)
    held = [found[f"tiny_qmoe_{what}_bytes"] for what in ("resident_memory", "peak_memory", "budget")]
    assert 0 < held[0] <= held[1] <= held[2] == least(served, CONTEXT)
    hits, misses = (found[f"tiny_qmoe_expert_{what}_total"] for what in ("hits", "misses"))
    assert misses > 0 and found["tiny_qmoe_expert_hit_ratio"] == pytest.approx(hits / (hits + misses))
    read, tokens = found["tiny_qmoe_read_bytes_total"], found["tiny_qmoe_generated_tokens_total"]
    record = container.open_model(served).spec.layers[0].record_bytes
    assert read >= record * misses and found["tiny_qmoe_read_bytes_per_token"] == pytest.approx(read / tokens)
    assert found["tiny_qmoe_pool_bytes"] >= record
    assert found["tiny_qmoe_disk_busy_seconds_total"] > 0
    assert {"tiny_qmoe_stalls_total", "tiny_qmoe_lookahead_reads_total", "tiny_qmoe_lookahead_used_total"} <= set(found)
    assert found["tiny_qmoe_requests_waiting"] == found["tiny_qmoe_requests_active"] == 0


def test_metrics_count_answers_by_status(live):
    key = 'tiny_qmoe_http_responses_total{status="404"}'
    before = live.metrics().get(key, 0)
    assert live.refused("/nothing")[0] == 404
    assert live.metrics()[key] == before + 1


def test_experts(live, served):
    layers = container.open_model(served).spec.layers
    before = live.get("/experts")
    live.get(TEXT, {"prompt": "slow small", "max_tokens": 4})
    found = live.get("/experts")
    assert found["model"] == str(served)
    expected = [{"layer": x.layer, "experts": x.experts, "record_bytes": x.record_bytes} for x in layers]
    assert found["layers"] == expected
    assert [len(row) for row in found["state"]] == [x.experts for x in layers]
    assert set("".join(found["state"])) <= set(".rl") and "r" in "".join(found["state"])
    grown = [sum(b) - sum(a) for a, b in zip(before["use"], found["use"], strict=True)]
    assert all(n >= 4 * 4 for n in grown), "four steps, each of which demands at least the top 4"
    assert sorted(found["stats"]) == sorted(
        "tokens_per_second hit_rate bytes_per_token budget_bytes held_bytes pool_bytes tokens active waiting "
        "context".split()
    )
    assert found["stats"]["context"] == 1024, "the model's own is less than the server's"


def test_the_page_and_its_files(live):
    folder = Path(tiny_qmoe_mlx.__file__).parent / "serving" / "page"
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    for file in folder.iterdir():
        answer = live.open("/" if file.name == "index.html" else f"/page/{file.name}")
        assert answer.status == 200 and answer.getheader("Content-Type") == f"{kinds[file.suffix]}; charset=utf-8"
        assert answer.read() == file.read_bytes()


@pytest.mark.parametrize("path", ["/page/../options.py", "/page/index.html", "/page/", "/page/%2e%2e/options.py", "/x"])
def test_nothing_else_is_served(live, path):
    assert live.refused(path)[0] == 404


def test_health(live):
    assert live.get("/health") == {"status": "ok"}
