"""The server under load and against its description, for seconds, by the same functions as the long runs:
`PYTHONPATH=tests python -m abuse.server_load` and `abuse.server_schema`.
"""

import dataclasses
import sys
from collections import Counter

import pytest
from abuse import load_clients, server_load, server_schema
from abuse.load_clients import Question, Reply

pytest_plugins = ["command_fixtures", "server_fixtures"]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@linux
def test_a_load_of_seconds(served, tmp_path, monkeypatch):
    """Memory is judged by long runs alone: in seconds, buffers are still finding their size."""
    monkeypatch.setattr(server_load, "QUESTIONS", 8)
    monkeypatch.setattr(server_load, "QUEUE", 8)
    found = server_load.attack(tmp_path, served, clients=24, seconds=3, seed=3)
    assert [fault for fault in found.faults if "resident" not in fault] == []
    statuses = found.figures["answers by status"]
    assert all(f"{status}: " in statuses for status in (200, 400, 401, 413, 503)), statuses
    assert found.figures["whole answers, each equal to the single client's"] > 20


def test_the_server_answers_as_it_describes(live):
    pytest.importorskip("schemathesis")
    found = server_schema.attack(live, count=8, seed=5)
    assert found.failures == []
    assert set(found.statuses) >= {200, 400} and 500 not in found.statuses
    assert min(found.asked.values()) >= 3 * 8


@pytest.mark.parametrize("wrong", [{"type": "number", "minimum": 2, "maximum": 3}, {"type": "number", "maximum": 0}])
def test_a_description_that_is_not_the_servers_is_found(live, monkeypatch, wrong):
    """One that allows what the server refuses, and one that forbids what it takes."""
    pytest.importorskip("schemathesis")
    whole = live.get("/openapi.json")
    schema = whole["components"]["schemas"]["Completion"]
    whole["paths"] = {"/v1/completions": whole["paths"]["/v1/completions"]}
    schema["properties"] = {"prompt": {"const": "x"}, "max_tokens": {"const": 1}, "top_p": wrong}
    schema["required"] = list(schema["properties"])
    schema["additionalProperties"] = False
    monkeypatch.setattr(server_schema, "NARROWED", {})
    monkeypatch.setattr(server_schema, "narrowed", lambda description: description)
    monkeypatch.setattr(live, "get", lambda path: whole)
    assert server_schema.attack(live, count=40, seed=5).failures


# ---- what would be found


QUESTION = Question(load_clients.TEXT, {"prompt": "001 x", "max_tokens": 3}, "abc", 3)


@pytest.mark.parametrize(
    "client, status, text, right",
    [
        (load_clients.whole, 200, "abc", True),
        (load_clients.whole, 200, "abd", False),
        (load_clients.whole, 503, None, True),
        (load_clients.whole, 500, None, False),
        (load_clients.wrong_key, 200, "abc", False),
        (load_clients.malformed, 400, None, True),
        (load_clients.malformed, 500, None, False),
    ],
)
def test_replies_are_judged(client, status, text, right):
    assert (load_clients.fault_of(client, Reply("x", status, text), QUESTION) is None) == right


def test_what_was_miscounted_is_found():
    key, gone = f'{server_load.COUNTED}{{status="200"}}', "tiny_qmoe_clients_gone_total"
    replies = [Reply("whole", 200, "abc"), Reply("leaves unanswered", left=True)]
    for counted, left, wrong in ((2, 0, 0), (3, 1, 0), (1, 0, 1), (4, 0, 1), (2, 2, 1)):
        assert len(server_load.miscounted({gone: 0}, {key: counted, gone: left}, replies, looks=1)) == wrong


def test_what_a_load_leaves_behind_is_found():
    before = server_load.Held(100_000_000, 20, 6)
    well = {"tiny_qmoe_peak_memory_bytes": 1, "tiny_qmoe_budget_bytes": 2}
    flat = [100] * 3
    assert server_load.grown(before, before, flat, well) == []
    for change in ({"threads": 21}, {"files": 7}):
        assert len(server_load.grown(before, dataclasses.replace(before, **change), flat, well)) == 1
    assert len(server_load.grown(before, before, flat, {**well, "tiny_qmoe_budget_bytes": 0})) == 1
    assert server_load.grown(before, before, [100, 101, 99, 500, 100, 101, 102, 103, 101], well) == []
    assert len(server_load.grown(before, before, [100, 101, 99, 100, 100, 100, 103, 103, 103], well)) == 1


def test_a_client_that_is_starved_is_found():
    groups = [[Reply("whole", 200, "abc")] * count for count in (30, 20, 25, 9)]
    assert len(server_load.starved(groups)) == 1 and server_load.starved(groups[:3]) == []


def test_ends_of_a_stop_are_told_apart():
    refused = Reply("stream", fault="ConnectionRefusedError: no")
    cut = Reply("stream", 200, fault="a stream that ends without [DONE]")
    ends = [Reply("whole", 200, "abc"), Reply("whole", 503), refused, cut]
    assert Counter(map(server_load.end_of, ends)) == {"whole": 1, "refused": 1, "not taken": 1, "broken": 1}
