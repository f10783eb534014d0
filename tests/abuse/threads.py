"""Several threads and several models in one process: tokens are those that one thread alone gets, or one sentence.

    PYTHONPATH=tests python -m abuse.threads --seconds 600

Each round draws one of the scenarios below: threads that generate at once on one model or two (of other codecs, under
memory pressure, with a trace), a model that is closed or forgotten under them, a fork, Ctrl-C followed by more work.
"""

import argparse
import atexit
import faulthandler
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_qmoe_mlx
from abuse import record
from tiny_qmoe_mlx.conversion.run import Settings, convert
from tiny_qmoe_mlx.plan import plan
from tiny_qmoe_mlx.runtime import Streaming
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.trace import read_trace

PROMISE = "Threads and models in one process get the tokens that one thread alone gets, or one sentence."
KINDS = {  # name: family, settings
    "trellis": ("qwen3_moe", {"bits": 3.0}),
    "shared expert": ("deepseek_v2", {"bits": 3.0}),
    "qmoe": ("mixtral", {"codec": "qmoe", "bits": 1.5}),
    "lossless": ("llama", {"codec": "lossless"}),
}
CONTEXT, TOKENS, HANG_S, ENOUGH = 600, 12, 300, 20
PROMPTS = [[7, 8, 9 + i, *range(11 * i)] for i in range(8)]
CLOSED = "[model] should be open, it has been closed; load it again."


@dataclass
class Bench:
    """Converted models by kind, made when they are first asked for, with what one thread alone gets from them."""

    root: Path
    made: dict[str, Path] = field(default_factory=dict)
    expected: dict[str, list[list[int]]] = field(default_factory=dict)
    found: Counter = field(default_factory=Counter)

    def model(self, kind: str) -> Path:
        import tiny_models

        if kind not in self.made:
            family, settings = KINDS[kind]
            source = tiny_models.make_checkpoint(self.root / kind / "hf", family)
            small = {"sequences": 4, "sequence_tokens": 64, "calibration": "builtin", **settings}
            self.made[kind] = convert(source, self.root / kind / "out", Settings(**small))
            model, tokenizer = load(self.made[kind], 1.0)
            self.expected[kind] = [tokens_of(model, tokenizer, prompt) for prompt in PROMPTS]
            model.close()
        return self.made[kind]


def load(directory: Path, share: float, **streaming: Any) -> tuple[Any, Any]:
    """With a budget between the fewest experts (0) and all (1)."""
    found = plan(directory, context=CONTEXT, probe=False)
    low, high = found["min_budget_bytes"], found["resident_budget_bytes"]
    return tiny_qmoe_mlx.load(directory, int(low + share * (high - low)), CONTEXT, streaming=Streaming(**streaming))


def tokens_of(model: Any, tokenizer: Any, prompt: list[int], count: int = TOKENS) -> list[int]:
    return [r.token for r in tiny_qmoe_mlx.stream_generate(model, tokenizer, prompt, max_tokens=count)]


def check_sound(cache: ExpertCache) -> None:
    """With nobody at work every slot is in one place and nothing is pinned."""
    until = time.monotonic() + HANG_S
    while time.monotonic() < until:
        with cache._changed:
            if not cache._loading:  # what was expected may still be on its way
                break
        time.sleep(0.01)
    for pool in cache.pools.values():
        assert not pool.pins, f"pins are left: {pool.pins}"
        slots = sorted([*pool.free, *pool.slot_of.values(), *pool.withdrawn])
        assert slots == list(range(pool.slots)), f"slots {slots} of {pool.slots}"


class Generating:
    """A thread that generates until it has done its rounds or is refused; `check` raises what was wrong."""

    def __init__(self, bench: Bench, kind: str, loaded: tuple[Any, Any], which: int, rounds: int):
        self.expected, self.loaded, self.which, self.rounds = bench.expected[kind][which], loaded, which, rounds
        self.wrong: BaseException | None = None
        self.refused = False
        self.written = 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            for _ in range(self.rounds):
                self._once()
        except ValueError as error:
            self.refused = str(error) == CLOSED
            self.wrong = None if self.refused else error
        except BaseException as error:
            self.wrong = error

    def _once(self) -> None:
        model, tokenizer = self.loaded
        options = {"max_tokens": TOKENS}
        for place, response in enumerate(
            tiny_qmoe_mlx.stream_generate(model, tokenizer, PROMPTS[self.which], **options)
        ):
            assert response.token == self.expected[place], f"token {place} of prompt {self.which} is another"
            self.written += 1

    def check(self, may_be_refused: bool = False) -> int:
        self.thread.join(HANG_S)
        assert not self.thread.is_alive(), "a thread hangs"
        if self.wrong is not None:
            raise self.wrong
        assert may_be_refused or not self.refused, "a thread was refused"
        return self.written


@contextmanager
def squeezed(cache: ExpertCache, least: int, draw: random.Random) -> Iterator[None]:
    """Memory pressure that comes and goes meanwhile, down to the smallest pool that works."""
    stop = threading.Event()
    size, given = cache.pool_bytes, 0

    def squeeze() -> None:
        nonlocal given
        while not stop.wait(draw.uniform(0, 0.01)):
            if given and draw.random() < 0.5:
                given -= cache.grow(draw.randrange(given + 1))
            else:
                given += cache.shrink(draw.randrange(max(1, size - least - given + 1)))
        cache.grow(given)

    thread = threading.Thread(target=squeeze, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(HANG_S)


# ---- scenarios


def at_once(bench: Bench, draw: random.Random) -> None:
    """Up to eight threads on one model or two, some of them with a trace, some under pressure."""
    kinds = draw.sample(list(KINDS), draw.choice([1, 2])) if draw.random() < 0.7 else [draw.choice(list(KINDS))] * 2
    trace = bench.root / "trace.txt" if draw.random() < 0.5 else None
    loaded = []
    for number, kind in enumerate(kinds):
        own = trace if number == 0 else None
        options = {"lookahead": draw.choice(["on", "off", "auto"]), "readers": draw.choice([1, 8]), "trace": own}
        loaded.append(load(bench.model(kind), draw.choice([0, 0.3, 0.6, 1]), **options))
    runtime = loaded[0][0].tiny_qmoe
    with squeezed(runtime.cache, runtime.budget.least_pool_bytes, draw):
        workers = [
            Generating(bench, kinds[i % len(kinds)], loaded[i % len(kinds)], draw.randrange(len(PROMPTS)), 2)
            for i in range(draw.randint(2, 8))
        ]
        bench.found["tokens of threads at once"] += sum(worker.check() for worker in workers)
    for model, _ in loaded:
        check_sound(model.tiny_qmoe.cache)
        model.close()
    if trace:
        assert read_trace(trace).calls


def closed(bench: Bench, draw: random.Random) -> None:
    """A model that one thread closes, perhaps twice at once, while others generate."""
    kind, before = draw.choice(list(KINDS)), threading.active_count()
    loaded = load(bench.model(kind), draw.choice([0, 0.5, 1]))
    workers = [Generating(bench, kind, loaded, draw.randrange(len(PROMPTS)), 20) for _ in range(draw.randint(1, 4))]
    time.sleep(draw.uniform(0, 0.3))
    closers = [threading.Thread(target=loaded[0].close) for _ in range(draw.choice([1, 2]))]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join(HANG_S)
        assert not thread.is_alive(), "close hangs"
    for worker in workers:
        worker.check(may_be_refused=True)
        bench.found["generations that a close ended"] += worker.refused
    loaded[0].close()
    try:
        tokens_of(*loaded, PROMPTS[0])
        raise AssertionError("a closed model generates")
    except ValueError as error:
        assert str(error) == CLOSED, error
    assert threading.active_count() <= before, "reader threads are left"


def forgotten(bench: Bench, draw: random.Random) -> None:
    """A model that nobody closes; a generation of it is left in the middle."""
    kind, before = draw.choice(list(KINDS)), threading.active_count()
    model, tokenizer = load(bench.model(kind), draw.choice([0, 0.5, 1]))
    running = tiny_qmoe_mlx.stream_generate(model, tokenizer, draw.choice(PROMPTS), max_tokens=TOKENS)
    for _ in range(draw.randint(0, 3)):
        next(running)
    del running, model, tokenizer
    until = time.monotonic() + HANG_S
    while threading.active_count() > before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() <= before, "reader threads are left"
    bench.found["models that were forgotten"] += 1


def forked(bench: Bench, draw: random.Random) -> None:
    """A fork while another thread generates: the child is refused and ends, the parent goes on."""
    kind = draw.choice(list(KINDS))
    loaded = load(bench.model(kind), draw.choice([0, 0.5, 1]), trace=(trace := bench.root / "forked.txt"))
    worker = Generating(bench, kind, loaded, 1, 2)
    time.sleep(draw.uniform(0, 0.1))
    child = os.fork()
    if not child:
        os._exit(_in_child(bench, kind, loaded, draw.choice(["use", "close", "end", "load"])))
    until, status = time.monotonic() + 60, None
    while status is None and time.monotonic() < until:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if pid else time.sleep(0.01)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == 0, f"the fork ended with {status}"
    worker.check()
    assert tokens_of(*loaded, PROMPTS[0]) == bench.expected[kind][0]
    loaded[0].close()
    assert read_trace(trace).calls
    bench.found["forks"] += 1


def _in_child(bench: Bench, kind: str, loaded: tuple[Any, Any], what: str) -> int:
    try:
        if what == "close":
            loaded[0].close()
        elif what == "end":
            atexit._run_exitfuncs()
        elif what == "load":
            load(bench.model(kind), 1.0)
        else:
            tokens_of(*loaded, PROMPTS[2])
    except ValueError as error:
        return 0 if "forked" in str(error) and what in ("use", "load") else 3
    except BaseException:
        return 4
    return 0 if what in ("close", "end") else 5


def interrupted(bench: Bench, draw: random.Random) -> None:
    """Ctrl-C at random moments of a notebook's main thread, which goes on with the same model."""
    kind = draw.choice(list(KINDS))
    loaded = load(bench.model(kind), draw.choice([0, 0.5]), lookahead=draw.choice(["on", "off"]))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(10):
            which = draw.randrange(len(PROMPTS))
            timer = threading.Timer(draw.uniform(0, 0.2), os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                tokens_of(*loaded, PROMPTS[which])
                timer.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                bench.found["Ctrl-C with the same model used on"] += 1
            timer.join()
            check_sound(loaded[0].tiny_qmoe.cache)
            assert tokens_of(*loaded, PROMPTS[which]) == bench.expected[kind][which]
    finally:
        signal.signal(signal.SIGINT, before)
    loaded[0].close()


SCENARIOS: tuple[Callable[[Bench, random.Random], None], ...] = (at_once, closed, forgotten, forked, interrupted)


def play(bench: Bench, seed: int, scenario: Callable[[Bench, random.Random], None] | None = None) -> None:
    """One round; a hang ends the process with all stacks."""
    draw = random.Random(seed)
    faulthandler.dump_traceback_later(HANG_S * 2, exit=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(draw.choice([1e-6, 1e-4, interval]))
    try:
        (scenario or SCENARIOS[seed % len(SCENARIOS)])(bench, draw)
    finally:
        sys.setswitchinterval(interval)
        faulthandler.cancel_dump_traceback_later()
    bench.found["rounds"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, broken, seed = time.monotonic(), 0, args.seed
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a fork that ends would remove it
    bench = Bench(folder)
    while time.monotonic() - start < args.seconds and broken < ENOUGH:
        try:
            play(bench, seed)
        except Exception as error:
            broken += 1
            name = SCENARIOS[seed % len(SCENARIOS)].__name__
            print(f"seed {seed}, {name}: {type(error).__name__}: {error}", flush=True)
        seed += 1
    shutil.rmtree(folder)
    record.keep(7, "threads", PROMISE, "abuse.threads", time.monotonic() - start, bench.found, broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
