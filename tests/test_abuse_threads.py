"""Threads, forks and Ctrl-C: a short run of abuse/threads.py, and each defect that it has found."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import metal_cpu
import mlx.core as mx
import pytest
import records
from abuse import numbers
from abuse import threads as abuse
from commands import environment
from mlx.nn import Module

from tiny_qmoe_mlx import container, interrupts, metal, native, process
from tiny_qmoe_mlx.conversion.run import convert
from tiny_qmoe_mlx.expert_kind import expert_kind
from tiny_qmoe_mlx.streaming.cache import ExpertCache
from tiny_qmoe_mlx.streaming.demand import Demand
from tiny_qmoe_mlx.streaming.store import ExpertStore

pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return abuse.Bench(tmp_path_factory.mktemp("bench"))


# ---- random rounds


@pytest.mark.parametrize("scenario", abuse.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_round_of_each_scenario(bench, scenario):
    abuse.play(bench, 0, scenario)


# ---- threads


def test_a_generation_in_each_thread_while_another_model_is_loaded(bench):
    """Its budget, pool and counters are its own."""
    directory = bench.model("trellis")
    loaded, more = abuse.load(directory, 0), []
    worker = abuse.Generating(bench, "trellis", loaded, 0, 3)
    more.append(abuse.load(directory, 1))
    worker.check()
    first, second = (model.tiny_qmoe.stats() for model, _ in (loaded, *more))
    assert (first["mode"], second["mode"]) == ("streamed", "resident")
    assert second["expert_hits"] == second["expert_misses"] == 0 < first["expert_misses"]
    assert first["budget_bytes"] < second["budget_bytes"]
    for model, _ in (loaded, *more):
        model.close()


@pytest.fixture
def cache(tmp_path):
    """Two layers of six experts, and four slots."""
    records.write_model(tmp_path / "model", hidden=64, width=64, experts=6, layers=2, alignment=128, rates=[2])
    opened = container.open_model(tmp_path / "model")
    kinds = [expert_kind(layer, opened.spec, Module()) for layer in opened.spec.layers]
    made = ExpertCache(ExpertStore(opened, kinds), {opened.spec.layers[0].record_bytes: 4})
    yield made
    made.close()


def take(demand):
    """All of its experts, held; how many."""
    return sum(len(experts) for experts, _ in demand)


def test_an_expert_that_came_for_another_thread_meanwhile_is_not_read_twice(cache):
    """It was, into a second slot, while the first was in use, and a slot of somebody else's was taken for its own."""
    other = Demand(cache, 1, [0, 1, 2, 3])
    assert take(other) == 4
    late = Demand(cache, 0, [5])  # finds no slot
    other.release([0, 1, 2, 3])
    with Demand(cache, 0, [5]) as early:
        ((_, (offset,)),) = list(early)
        ((_, (again,)),) = list(late)
        assert again == offset and cache.store.records_read == 5
        late.release([5])
        assert (0, 5) in cache.pool_of_layer[0].pins
    abuse.check_sound(cache)


def test_a_prefill_leaves_an_expert_that_another_thread_has_brought(cache):
    other = Demand(cache, 1, [0, 1, 2, 3])
    assert take(other) == 4
    late = Demand(cache, 0, [5], cold=True)
    other.release([0, 1, 2, 3])
    with Demand(cache, 0, [5]) as early:
        assert take(early) == 1
    assert take(late) == 1
    late.release([5])
    assert 5 in cache.pool_of_layer[0].order.used[0]


def test_a_guess_that_a_waiting_demand_has_joined_is_not_dropped(cache, monkeypatch):
    """The demand would wait for ever."""
    other = Demand(cache, 1, [0, 1, 2, 3])
    assert take(other) == 4
    late = Demand(cache, 0, [5])  # finds no slot
    other.release([0, 1, 2, 3])
    readers = cache._readers
    monkeypatch.setattr(readers, "submit", lambda reads, demanded: readers._expected.extend(reads))  # wakes nobody
    cache.expect(0, [5])
    with cache._changed:
        late._look_again()
    cache.expect(0, [1])  # another thread's, which drops guesses that nobody wants
    assert (0, 5) in cache._loading and [read.experts for read in readers._demanded] == [[5]]
    monkeypatch.undo()
    with readers._changed:
        readers._changed.notify_all()
    assert take(late) == 1


def test_pressure_leaves_the_slots_that_a_gpu_holds_at_once(cache):
    """The demand would wait for ever: it gives nothing back before all have come."""
    assert cache.reserve(0, 4) and not cache.reserve(0, 5)
    assert cache.reserve(0, 3) and cache.shrink(1 << 30) == cache.pool_of_layer[0].record_bytes
    assert take(Demand(cache, 0, [0, 2, 4])) == 3
    assert not cache.reserve(0, 4)


def test_a_trace_of_several_threads_can_be_read(bench, tmp_path):
    loaded = abuse.load(bench.model("trellis"), 1, trace=(trace := tmp_path / "trace.txt"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [abuse.Generating(bench, "trellis", loaded, i, 2) for i in range(6)]
        assert sum(worker.check() for worker in workers) > 0
    finally:
        sys.setswitchinterval(interval)
    loaded[0].close()
    found = {tuple(line.split()[:2]) for line in trace.read_text().splitlines()[1:]}
    assert len(abuse.read_trace(trace).calls) == len(found) > 100


@metal_cpu.required
def test_threads_on_a_gpu_that_streams(bench, monkeypatch):
    """One evaluated what another had in flight, which MLX refuses; pins were lost, and demands waited for ever."""
    monkeypatch.setattr(metal, "available", lambda: False)
    loaded = abuse.load(bench.model("trellis"), 0)
    monkeypatch.setattr(metal, "available", lambda: True)
    prompts, found, wrong = [[7, 8, 9], [10, 11, 12]], {}, []

    def work(which):
        try:
            found[which] = [abuse.tokens_of(*loaded, prompts[which], 3) for _ in range(2)]
        except BaseException as error:
            wrong.append(error)

    with numbers.emulated():
        alone = [abuse.tokens_of(*loaded, prompt, 3) for prompt in prompts]
        workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(abuse.HANG_S)
    assert not wrong and found == {which: [alone[which]] * 2 for which in range(2)}, wrong
    assert loaded[0].tiny_qmoe.dispatch.counts["decode metal"] > 0
    abuse.check_sound(loaded[0].tiny_qmoe.cache)
    loaded[0].close()


# ---- the end of the process

END = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from abuse import threads as abuse
loaded = abuse.load({directory!r}, {share})
def work():
    for _ in range({rounds}):
        abuse.tokens_of(*loaded, [7, 8, 9])
workers = [threading.Thread(target=work, daemon={daemon}) for _ in range(4)]
for worker in workers:
    worker.start()
if {daemon}:
    time.sleep(0.3)
else:
    for worker in workers:
        worker.join()
"""


@pytest.mark.parametrize(("daemon", "share"), [(False, 1), (False, 0), (True, 1), (True, 0)])
def test_a_program_ends_after_its_threads_have_generated(bench, daemon, share):
    """It aborted: MLX freed what the threads had compiled while Python ended."""
    names = {"tests": str(abuse.Path(__file__).parent), "directory": str(bench.model("trellis"))}
    code = END.format(**names, daemon=daemon, share=share, rounds=1000 if daemon else 1)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done
    assert "terminate called" not in done.stderr
    assert daemon or not done.stderr  # a daemon thread says that its model has been closed


# ---- forks and copies


def in_child(work):
    """The exit status of a fork that does some work."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except ValueError as error:
            os._exit(10 if "was forked from it later" in str(error) else 11)
        except BaseException:
            os._exit(12)
    until = time.monotonic() + 60
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="a fork of a process with threads; macOS warns of it")
@pytest.mark.parametrize("held", [False, True], ids=["free", "locks held"])
def test_a_fork_is_refused_and_harmless(bench, tmp_path, held):
    model, tokenizer = loaded = abuse.load(bench.model("trellis"), 0, trace=(trace := tmp_path / "trace.txt"))
    abuse.tokens_of(*loaded, [7, 8, 9])
    cache = model.tiny_qmoe.cache
    locks = [model.door._changed, cache._changed, cache._readers._changed] if held else []
    held_now, go_on = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold, args=(locks, held_now, go_on))
    holder.start()
    assert held_now.wait(60)
    try:
        refused = (
            lambda: abuse.tokens_of(*loaded, [7, 8, 9]),
            lambda: model(mx.array([[1]])),
            model.tiny_qmoe.stats,
            lambda: abuse.load(bench.model("trellis"), 1),
            lambda: convert(bench.root / "trellis" / "hf", tmp_path / "out"),
        )
        assert [in_child(work) for work in refused] == [10] * len(refused)
        assert in_child(model.close) == in_child(model.tiny_qmoe._end) == 0
    finally:
        go_on.set()
        holder.join()
    assert abuse.tokens_of(*loaded, abuse.PROMPTS[0]) == bench.expected["trellis"][0]
    model.close()
    assert abuse.read_trace(trace).calls, "the fork has not written into it"


def hold(locks, held_now, go_on):
    for lock in locks:
        lock.acquire()
    held_now.set()
    go_on.wait(60)
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_neither_copied_nor_pickled(bench, copied):
    model, _ = abuse.load(bench.model("trellis"), 1)
    with pytest.raises(TypeError, match=r"^\[model\] should stay where it was loaded"):
        copied(model)
    model.close()


# ---- Ctrl-C


@pytest.fixture
def ctrl_c():
    """Pressed now, in this thread; the handler is Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_a_block(ctrl_c):
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupts.later():
        with interrupts.later():
            ctrl_c()
            steps.append("inner")
        steps.append("outer")
    assert steps == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_comes_through_where_nothing_is_half_changed(ctrl_c):
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupts.later():
        ctrl_c()
        steps.append("before")
        interrupts.now()
        steps.append("after")
    assert steps == ["before"]
    with interrupts.later():  # it was once
        pass


def test_an_error_in_the_block_goes_on_its_way(ctrl_c):
    with pytest.raises(KeyError), interrupts.later():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_ignored(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.later():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# what changes under locks
LOCKED = ("cache.py", "demand.py", "pool.py", "order.py", "readers.py", "door.py", "threading.py")


def watched(loaded, at, press):
    """Two tokens, and what `press` does at the at-th line of the code under locks; how many lines there are."""
    left = at

    def watch(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename.endswith(LOCKED):
            left -= 1
            if not left:
                press()
        return watch

    sys.settrace(watch)
    try:
        abuse.tokens_of(*loaded, [7, 8, 9], 2)
    finally:
        sys.settrace(None)
    return at - left


def test_ctrl_c_at_any_line_leaves_locks_and_slots_whole(bench, ctrl_c):
    """A notebook goes on with the same model: a lock that stays held, or a slot that is in no list, would stop it."""
    loaded = abuse.load(bench.model("trellis"), 0, lookahead="on")
    lines, pressed = watched(loaded, 1 << 30, ctrl_c), 0
    for at in range(1, lines, lines // 120):
        try:
            watched(loaded, at, ctrl_c)
        except KeyboardInterrupt:
            pressed += 1
        abuse.check_sound(loaded[0].tiny_qmoe.cache)
        assert not loaded[0].door._inside, at
    assert pressed > 80
    assert abuse.tokens_of(*loaded, abuse.PROMPTS[3]) == bench.expected["trellis"][3]
    loaded[0].close()


def test_a_thread_that_has_gone_is_forgotten():
    thread = threading.Thread(target=lambda: process.enter("test"))
    thread.start()
    number = thread.native_id
    thread.join()
    until = time.monotonic() + 60
    while (process.TASKS / str(number)).exists() and time.monotonic() < until:
        time.sleep(0.01)
    another = threading.Thread(target=lambda: process.enter("test"))
    another.start()
    another.join()
    assert number not in process._used or another.native_id == number
