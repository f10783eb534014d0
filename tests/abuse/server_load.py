"""The server under load: many clients at once, most of them impolite, and what is left of it afterwards.

    PYTHONPATH=tests python -m abuse.server_load [--clients N] [--seconds N] [--seed N]

Each prompt has a number of its own and a greedy answer that the library gave alone, and a single client got: an answer
that is lost, cut, crossed with another or computed wrongly does not equal it. Prompts where two tokens come within a
rounding error of each other are left out, as a batch may choose the other.

Memory is looked at each second, once half as many seconds of the same load have filled buffers and caches: what a
process holds has in it what is free and kept for the next call, so the medians of the first and the last third of the
time are compared.
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from server_process import Server, chat, least, serving

import tiny_qmoe_mlx
from abuse import load_clients, record, served_model
from abuse.load_clients import CHAT, KEY, TEXT, Question, Reply, once
from abuse.soak import thirds

PROMISE = "Under load each client gets its own whole answer or a refusal that says when to come back."
CONTEXT, QUEUE, GRACE_S = 2048, 40, 60
CLOSE = 1e-2  # logits closer than this may change places in a batch: rounding is below 1e-4 here
QUESTIONS = 96
FAIR, FAIR_FROM = 0.5, 20  # the least answers of a client over the median, where that is so many
COUNTED = "tiny_qmoe_http_responses_total"


def questions(model: Path, count: int, seed: int) -> list[Question]:
    """Prompts with their answers, by the library, alone."""
    loaded, tokenizer = tiny_qmoe_mlx.load(model)
    found = []
    with loaded:
        for i, prompt in enumerate(served_model.prompts(2 * count, seed)):
            tokens = 6 + 7 * i % 20
            path, own = (CHAT, {"messages": chat(prompt)}) if i % 3 == 0 else (TEXT, {"prompt": prompt})
            ids = tokenizer.encode(prompt)
            if path == CHAT:
                ids = tokenizer.apply_chat_template(own["messages"], add_generation_prompt=True)
            answer = alone(loaded, tokenizer, ids, tokens)
            if answer is not None and len(found) < count:
                found.append(Question(path, {**own, "max_tokens": tokens}, answer, tokens))
    assert len(found) == count and len({question.answer for question in found}) == count
    return found


def alone(model: Any, tokenizer: Any, ids: list[int], tokens: int) -> str | None:
    """The greedy answer; None where some choice is too close to call."""
    responses = list(tiny_qmoe_mlx.stream_generate(model, tokenizer, ids, max_tokens=tokens))
    chosen = [response.token for response in responses]
    logits = model(mx.array([ids + chosen[:-1]]))[0, len(ids) - 1 :]
    best = mx.sort(logits, axis=-1)[:, -2:]
    if mx.min(best[:, 1] - best[:, 0]).item() < CLOSE:
        return None
    return "".join(response.text for response in responses)


@dataclass(frozen=True)
class Held:
    """What a process holds: resident bytes, threads, open files."""

    bytes: int
    threads: int
    files: int


def held(pid: int) -> Held:
    """Of a process on Linux."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Held(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


def crowd(port: int, asked: list[Question], clients: int, seconds: float, seed: int) -> list[list[Reply]]:
    """Replies of each client; all ask without end until the time is over."""
    end = time.monotonic() + seconds
    kinds, weights = list(load_clients.KINDS), list(load_clients.KINDS.values())

    def one(number: int) -> list[Reply]:
        draw, replies = random.Random(f"{seed} {number}"), []
        while time.monotonic() < end:
            (kind,) = draw.choices(kinds, weights)
            replies.append(once(kind, port, draw.choice(asked), draw))
            time.sleep(min(replies[-1].retry_s, draw.uniform(0.2, 1)))
        return replies

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, range(clients)))


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Resident bytes of a process, each second while the block runs; at least one look."""
    sizes, over = [held(pid).bytes], threading.Event()

    def look() -> None:
        while not over.wait(1):
            sizes.append(held(pid).bytes)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def percentile(values: list[float], share: float) -> float:
    """Of values, of which there is at least one."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def latencies(replies: list[Reply]) -> dict[str, float | int]:
    """Seconds to the first token of streams, and to the end of answers, without clients that are slow themselves."""
    polite = [r for r in replies if r.text is not None and r.kind in ("whole", "stream")]
    first, whole = [r.first_s for r in polite if r.first_s], [r.whole_s for r in polite if r.whole_s]
    named = {}
    for words, values in (("first token", first), ("whole answer", whole)):
        for share in (50, 95, 99):
            named[f"{words}, s, {share} % within"] = round(percentile(values, share / 100), 3)
    return named


def miscounted(before: dict[str, float], after: dict[str, float], replies: list[Reply], looks: int) -> list[str]:
    """Figures of /metrics that cannot be what the clients saw; `looks` are those at /metrics itself.

    A client that has left may have been answered or not, and half a head is answered where it can be.
    """
    seen = Counter(reply.status for reply in replies if reply.status is not None)
    seen[200] += looks
    unsure = {200: "leaves unanswered", 503: "leaves unanswered", 400: "never asks"}
    wrong = []
    for status in sorted({*seen, 200, 400, 401, 413, 503, 500}):
        key = f'{COUNTED}{{status="{status}"}}'
        counted = after.get(key, 0) - before.get(key, 0)
        most = seen[status] + sum(reply.kind == unsure.get(status) for reply in replies)
        if not seen[status] <= counted <= most:
            wrong.append(f"{key} says {counted:.0f}, clients saw {seen[status]} to {most}")
    gone = after["tiny_qmoe_clients_gone_total"] - before["tiny_qmoe_clients_gone_total"]
    left = sum(reply.left for reply in replies)
    if gone > left:
        wrong.append(f"{gone:.0f} clients are said to have left, {left} did")
    return wrong


def stop_under_load(server: Server, asked: list[Question], clients: int) -> tuple[Counter[str], float, int]:
    """SIGTERM while all ask; how each ended, seconds until the server had, and its exit status."""
    ends: Counter[str] = Counter()
    lock, begun = threading.Lock(), threading.Barrier(clients + 1)

    def one(number: int) -> None:
        draw, kind = random.Random(number), load_clients.stream if number % 2 else load_clients.whole
        begun.wait()
        while True:
            reply = once(kind, server.port, draw.choice(asked), draw)
            with lock:
                ends[end_of(reply)] += 1
            if reply.fault:
                return
            time.sleep(min(reply.retry_s, 0.2))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(2)
    start = time.monotonic()
    server.child.terminate()
    status = server.child.wait(timeout=10 * GRACE_S)
    seconds = time.monotonic() - start
    for thread in threads:
        thread.join()
    return ends, seconds, status


def end_of(reply: Reply) -> str:
    """How a request ended: whole, refused, not taken (no byte of an answer), or broken."""
    if reply.fault is None:
        return "whole" if reply.text is not None else "refused"
    taken = reply.status is not None or "JSON" in reply.fault or "Incomplete" in reply.fault or "[DONE]" in reply.fault
    return "broken" if taken else "not taken"


@dataclass
class Outcome:
    """figures: for the record; faults: each promise that was broken, in words."""

    figures: dict[str, Any]
    faults: list[str]


def attack(folder: Path, model: Path, clients: int, seconds: float, seed: int, stops: bool = True) -> Outcome:
    """The whole of it, against a server of its own."""
    asked, key = questions(model, QUESTIONS, seed), folder / "key"
    key.write_text(KEY)
    options = ("--queue", QUEUE, "--api-key-file", key, "--grace", GRACE_S, "--context", CONTEXT)
    with serving(model, *options, "--memory", least(model, CONTEXT)) as server:
        server.key, files = KEY, held(server.child.pid).files
        draw = random.Random(seed)
        single = [once(load_clients.whole, server.port, question, draw) for question in asked]
        faults = [f"a single client: {reply.fault}" for reply in single if reply.fault]
        crowd(server.port, asked, clients, seconds / 2, seed + 1)  # after which buffers and caches have their size
        before, process = quiet(server, files)
        with watched(server.child.pid) as looks:
            groups = crowd(server.port, asked, clients, seconds, seed)
        after, later = quiet(server, files)
        replies = [reply for group in groups for reply in group]
        faults += [f"{reply.kind}: {reply.fault}" for reply in replies if reply.fault]
        faults += miscounted(before, after, replies, 1)
        faults += [*grown(process, later, looks, after), *starved(groups)]
        ends, stop_s, status = stop_under_load(server, asked, clients)
    if ends["broken"] or status != 0 or stop_s > GRACE_S + 10:
        faults.append(f"the stop: {dict(ends)}, exit status {status} after {stop_s:.1f} s")
    if any("Traceback" in line for line in server.errors):
        faults.append("the server's log has a traceback: " + " ".join(server.errors)[-600:])
    stop = {"answers while it stopped": ", ".join(f"{n} {w}" for w, n in ends.items()), "seconds to stop": stop_s}
    return Outcome({**tallied(groups), **latencies(replies), **sizes(process, later, looks, after), **stop}, faults)


def quiet(server: Server, files: int) -> tuple[dict[str, float], Held]:
    """The figures, and what it holds, once no client's connection or thread is left; `files` are open without any."""
    end, found = time.monotonic() + 120, held(server.child.pid)
    while time.monotonic() < end:
        time.sleep(0.5)
        before, found = found, held(server.child.pid)
        if found.files <= files and found.threads == before.threads:
            break
    metrics = server.metrics()
    assert metrics["tiny_qmoe_requests_active"] == metrics["tiny_qmoe_requests_waiting"] == 0, metrics
    return metrics, found


def grown(before: Held, after: Held, looks: list[int], metrics: dict[str, float]) -> list[str]:
    """What the load has left behind."""
    faults = []
    for what in ("threads", "files"):
        old, new = getattr(before, what), getattr(after, what)
        if new > old:
            faults.append(f"{new} {what} after the load, {old} before")
    first, last = thirds(looks)
    if last > 1.02 * first:
        faults.append(f"{last} bytes resident in the last third of the load, {first} in the first")
    if metrics["tiny_qmoe_peak_memory_bytes"] > metrics["tiny_qmoe_budget_bytes"]:
        faults.append("more memory held than the budget")
    return faults


def answered(groups: list[list[Reply]]) -> list[int]:
    """Whole answers of each client."""
    return [sum(reply.text is not None for reply in group) for group in groups]


def starved(groups: list[list[Reply]]) -> list[str]:
    """Clients that got far less than the others."""
    finished = answered(groups)
    middle = statistics.median(finished)
    few = [count for count in finished if count < FAIR * middle]
    return [f"{few} answers of some clients, the median is {middle}"] if few and middle >= FAIR_FROM else []


def tallied(groups: list[list[Reply]]) -> dict[str, Any]:
    """Counts of what clients got, and how evenly."""
    replies = [reply for group in groups for reply in group]
    finished = answered(groups)
    statuses = Counter(reply.status for reply in replies if reply.status)
    return {
        "clients": len(groups),
        "requests": len(replies),
        "whole answers, each equal to the single client's": sum(finished),
        "answers by status": ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())),
        "clients that left in the middle": sum(reply.left for reply in replies),
        "answers of a client, least of the median": round(min(finished) / max(1, statistics.median(finished)), 3),
    }


def sizes(before: Held, after: Held, looks: list[int], metrics: dict[str, float]) -> dict[str, Any]:
    megabytes = [round(size / 1e6, 1) for size in (*thirds(looks), before.bytes, after.bytes)]
    share = metrics["tiny_qmoe_peak_memory_bytes"] / metrics["tiny_qmoe_budget_bytes"]
    return {
        "resident MB under load, medians of the first and last third": f"{megabytes[0]}, {megabytes[1]}",
        "resident MB at rest, before and after": f"{megabytes[2]}, {megabytes[3]}",
        "most memory over the budget": round(share, 3),
        "threads, open files before and after": f"{before.threads}, {before.files}; {after.threads}, {after.files}",
    }


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=PROMISE)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args, start = parser.parse_args(argv), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = served_model.make(Path(folder))
        outcome = attack(Path(folder), model, args.clients, args.seconds, args.seed)
    for fault in outcome.faults[:20]:
        print(fault)
    broken, seconds = len(outcome.faults), time.monotonic() - start
    record.keep(6, "server_load", PROMISE, "abuse.server_load", seconds, outcome.figures, broken)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
