"""The generated tasks of a report: what they ask, and how replies are scored."""

import json
import types

import pytest
import tiny_models

from tiny_qmoe_mlx import evaluate
from tiny_qmoe_mlx.report import tasks


class Plain:
    """A tokenizer without chat template and tools: a token is a character."""

    has_chat_template = False
    eos_token_ids = {0}

    def encode(self, text, **options):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Chatty(Plain):
    """One whose template takes tools and whose parser reads calls as Qwen's does."""

    has_chat_template = has_tool_calling = True
    tool_call_start, tool_call_end = "<tool_call>", "</tool_call>"

    def apply_chat_template(self, messages, tools=None, **options):
        assert options["tokenize"] is False and options["add_generation_prompt"] is True
        return f"TOOLS {json.dumps(tools)} USER {messages[0]['content']} ASSISTANT "

    def tool_parser(self, text, tools):
        return json.loads(text)


def test_the_set_is_fixed():
    """Figures of different reports compare only if the tasks never change: raise SEED with these texts."""
    assert tasks.json_tasks() == tasks.json_tasks() and tasks.tool_tasks() == tasks.tool_tasks()
    assert tasks.json_tasks(9) == tasks.json_tasks()[:9]
    asked = tasks.json_tasks()
    assert len(asked) == len({t.prompt for t in asked}) == 40
    assert len({t.prompt for t in tasks.tool_tasks()}) == 40
    assert asked[4].prompt == (
        "Order 5579: Omar Haddad bought 4 pieces of the article 'keyboard'.\n\nReturn only a JSON object with "
        "exactly these keys: order (integer), customer (string), item (object with the keys article (string), "
        "pieces (integer))."
    )
    assert tasks.tool_tasks()[1].prompt == "Convert 74 USD to GBP."


def test_every_task_can_be_solved():
    for task in tasks.json_tasks():
        reply = f"Sure!\n```json\n{json.dumps(task.expected, indent=2)}\n```\nAnything else?"
        assert tasks.is_right(tasks.first_object(reply), task.expected)
        assert all(f"{key} (" in task.prompt for key in task.expected)
    for task in tasks.tool_tasks():
        call = json.dumps({"name": task.tools[0], "arguments": task.expected})
        assert tasks.is_right_call(tasks.called_tool(call, task, Plain()), task)
        assert tasks.is_right_call(tasks.called_tool(f"<tool_call>\n{call}\n</tool_call>", task, Chatty()), task)
        offered = {t["function"]["name"]: t["function"]["parameters"] for t in task.offered}
        assert set(offered) == set(task.tools) and len(task.tools) == 3
        assert set(offered[task.tools[0]]["required"]) == set(task.expected)


EXPECTED = {"name": "Ann", "age": 3, "price": 1.5, "on": True, "list": ["a"], "inner": {"n": 1}}
RIGHT = '{"name": "Ann", "age": 3, "price": 1.5, "on": true, "list": ["a"], "inner": {"n": 1}}'


@pytest.mark.parametrize(
    ("reply", "valid", "right"),
    [
        (RIGHT, True, True),
        (f"<think>{{}} or []?</think>\n{RIGHT}", True, True),
        (RIGHT.replace("Ann", "Bob"), True, False),
        (RIGHT.replace("1.5", "2"), True, False),
        (RIGHT.replace('["a"]', "[]"), True, False),
        (RIGHT.replace('"age": 3', '"age": "3"'), False, False),
        (RIGHT.replace('"age": 3', '"age": 3.0'), False, False),
        (RIGHT.replace('"age": 3', '"age": true'), False, False),
        (RIGHT.replace("true", "1"), False, False),
        (RIGHT.replace('["a"]', '["a", 1]'), False, False),
        (RIGHT.replace('{"n": 1}', "{}"), False, False),
        (RIGHT.replace('"age": 3, ', ""), False, False),
        (RIGHT.replace('"age": 3', '"age": 3, "more": 1'), False, False),
        (RIGHT[:-1], False, False),
        (RIGHT.replace('"', "'"), False, False),
        (f"[{RIGHT}]", True, True),
        ("", False, False),
        ("{" * 100000, False, False),
        ("I cannot do that.", False, False),
    ],
)
def test_scores_of_json(reply, valid, right):
    found = tasks.first_object(reply)
    assert (tasks.is_valid(found, EXPECTED), tasks.is_right(found, EXPECTED)) == (valid, right)


CALL = tasks.Task("x", {"city": "Paris", "guests": 4}, ("book_table", "a", "b"))


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"name": "book_table", "arguments": {"city": "Paris", "guests": 4}}', True),
        ('{"name": "book_table", "parameters": {"guests": 4, "city": " paris"}}', True),
        ('<tool_call>{"name": "book_table", "arguments": {"city": "Paris", "guests": 4}}</tool_call>', True),
        ('<tool_call>[{"name": "book_table", "arguments": {"city": "Paris", "guests": 4}}]</tool_call>', True),
        ('<tool_call>{"name": "book_table", "arguments": {"city": "Paris", "guests": 4}', False),
        ('{"name": "play_music", "arguments": {"city": "Paris", "guests": 4}}', False),
        ('{"name": "book_table", "arguments": {"city": "Paris", "guests": "4"}}', False),
        ('{"name": "book_table", "arguments": {"city": "Paris", "guests": true}}', False),
        ('{"name": "book_table", "arguments": {"city": "Paris"}}', False),
        ('{"name": "book_table", "arguments": "Paris"}', False),
        ('{"name": ["book_table"], "arguments": {}}', False),
        ("book_table(Paris, 4)", False),
        ("<tool_call>[]</tool_call>", False),
        ("", False),
    ],
)
def test_scores_of_tool_calls(reply, right):
    assert tasks.is_right_call(tasks.called_tool(reply, CALL, Chatty()), CALL) is right


def test_a_tool_parser_that_raises_anything_means_no_call():
    def broken(text, tools):
        raise RuntimeError("surprise")

    tokenizer = types.SimpleNamespace(tool_call_start="<t>", tool_call_end="", tool_parser=broken)
    assert tasks.called_tool("<t>x", CALL, tokenizer) is None


@pytest.mark.parametrize(
    ("reply", "other", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([9], [1, 2], 0),
        ([], [], 1),
        (list(range(40)), list(range(32)) + [0] * 8, 1),
        (list(range(40)), list(range(16)) + [0] * 24, 0.5),
    ],
)
def test_agreement(reply, other, share):
    assert tasks.agreement(reply, other) == share == tasks.agreement(other, reply)


def test_prompts_use_what_the_tokenizer_has():
    asked, call = tasks.json_tasks(1)[0], tasks.tool_tasks(1)[0]
    plain, chatty = Plain(), Chatty()
    assert plain.decode(tasks.prompt_tokens(asked, plain, '{"')).endswith('\n\nJSON: {"')
    text = plain.decode(tasks.prompt_tokens(call, plain))
    assert all(json.dumps(t["function"]) in text for t in call.offered) and call.prompt in text
    assert chatty.decode(tasks.prompt_tokens(asked, chatty, "{")).endswith("ASSISTANT {")
    assert chatty.decode(tasks.prompt_tokens(asked, chatty)).startswith("TOOLS null")
    text = chatty.decode(tasks.prompt_tokens(call, chatty))
    assert text == f"TOOLS {json.dumps(call.offered)} USER {call.prompt} ASSISTANT "


def test_a_tiny_model_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "REPLY_TOKENS", 12)
    directory = tiny_models.make_checkpoint(tmp_path / "hf", "qwen3_moe", max_position_embeddings=4096)
    model, tokenizer = evaluate.open_any(str(directory), quiet=True)
    steps = []
    scores, replies = tasks.run(model, tokenizer, 2, lambda what, done, total: steps.append((what, done, total)))
    assert scores == {"json_validity": 0, "json_correct": 0, "json_validity_begun": 0, "tool_call_pass": 0}
    assert len(replies) == 6 and all(0 < len(r) <= tasks.REPLY_TOKENS for r in replies) and steps[-1][1:] == (6, 6)
    assert tasks.run(model, tokenizer, 2) == (scores, replies)


class Solver:
    """A model that knows the right replies: what follows a prompt is looked up, a token a step."""

    def __init__(self, replies, size=128):
        self.replies, self.size, self.layers = replies, size, []
        self.rows = None

    def make_cache(self):
        self.rows = None
        return []

    def __call__(self, inputs, cache):
        import mlx.core as mx
        import numpy as np

        new = np.array(inputs).tolist()
        self.rows = [a + b for a, b in zip(self.rows or [[] for _ in new], new, strict=True)]
        logits = np.zeros((len(new), 1, self.size), np.float32)
        for row, out in zip(self.rows, logits, strict=True):
            whole = next((w for w in self.replies if w[: len(row)] == row), [0])
            out[0, whole[len(row)] if len(row) < len(whole) else 0] = 9
        return mx.array(logits)


def test_right_replies_score_one(monkeypatch):
    tokenizer = Plain()
    asked, calls = tasks.json_tasks(3), tasks.tool_tasks(3)
    whole = []
    for task in asked:
        reply = json.dumps(task.expected)
        whole.append(tasks.prompt_tokens(task, tokenizer) + tokenizer.encode(reply) + [0])
        begun = tasks.begin(task)
        whole.append(tasks.prompt_tokens(task, tokenizer, begun) + tokenizer.encode(reply[len(begun) :]) + [0])
    for task in calls:
        reply = json.dumps({"name": task.tools[0], "arguments": task.expected})
        whole.append(tasks.prompt_tokens(task, tokenizer) + tokenizer.encode(reply) + [0])
    monkeypatch.setattr(tasks, "REPLY_TOKENS", max(len(w) for w in whole))
    scores, replies = tasks.run(Solver(whole), tokenizer, 3)
    assert scores == dict.fromkeys(scores, 1)
    assert tokenizer.decode(replies[0]) == json.dumps(asked[0].expected)
