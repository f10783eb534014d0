"""What writes files, for faults_writing.py: how it is run, and what has to be true after a fault and after going on."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from commands import environment

from abuse import disk, fault_models
from abuse.fault_models import BITS, PLAIN, convert, whole, within
from tiny_qmoe_mlx import chat, container
from tiny_qmoe_mlx.streaming.profile import load_profile
from tiny_qmoe_mlx.streaming.trace import read_trace

SAID = b"why\n/save talk.json\n"
FINETUNE = """
import numpy as np
from pathlib import Path
from tiny_qmoe_mlx import terminal
from tiny_qmoe_mlx.finetune.gains import Settings, finetune_gains
tokens = np.random.default_rng(1).integers(0, 256, (8, 24)).astype(np.int32)
small = Settings(steps=4, batch=2, rate=0.01, held_out=2, every=2, top=258)
def main(argv):
    print(finetune_gains(Path("out"), Path("hf"), tokens, small)["changed"])
raise SystemExit(terminal.run(main, []))
"""


@dataclass(frozen=True)
class Task:
    """A command that writes files.

    left: what is wrong with a directory after a fault, or "". finished: with it after a run that ended well. again: a
    run without faults; what is wrong then. begin: called before each attempt. writes: below its directory.
    """

    name: str
    weight: int
    template: Path
    argv: tuple
    left: Callable[[Path], str]
    finished: Callable[[Path], str]
    again: Callable[[Path], str]
    data: bytes = b""
    env: dict[str, str] | None = None
    writes: bool = True
    begin: Callable[[], None] = lambda: None
    seconds: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def tasks(work: Path, only: Iterable[str] = ()) -> Iterator[tuple[Path, list[Task]]]:
    """The shim, and all tasks (or those named), each measured in a run without faults; a small hub takes uploads."""
    shim, names = disk.build(work), list(only) or list(MAKERS)
    original = fault_models.make_original(work / "original")
    model = disk.fresh(original, work / "model")
    with within(model):
        convert(BITS)
    with _hub(work) if "upload" in names else contextlib.nullcontext() as server:
        places = Places(shim, original, model, server)
        yield shim, [_measured(MAKERS[name](places), shim, work) for name in names]


@dataclass(frozen=True)
class Places:
    """What tasks are made of: an original, the same with its converted model, and a hub."""

    shim: Path
    original: Path
    model: Path
    server: Any


def _measured(task: Task, shim: Path, work: Path) -> Task:
    top = disk.fresh(task.template, work / "first")
    done = disk.run(shim, top, *task.argv, data=task.data, env=task.env)
    assert done.status == 0, (task.name, done)
    assert not (task.left(top) or task.finished(top)), (task.name, task.left(top), task.finished(top))
    return replace(task, seconds=done.seconds, calls=done.calls)


def _by_command(shim: Path, argv: tuple, finished: Callable[[Path], str], data: bytes = b"", env=None):
    """`again` by the command itself."""

    def again(top: Path) -> str:
        done = disk.run(shim, top, *argv, data=data, env=env)
        return finished(top) if done.status == 0 else f"it did not go on: {done.err[-500:]}"

    return again


def _strangers(top: Path, *known: str) -> str:
    left = {p.name for p in top.iterdir()} - {"hf", "text.txt", "out", *known}
    return f"left behind: {sorted(left)}" if left else ""


# ---- conversions


def _convert(places: Places) -> Task:
    files = disk.contents(places.model / "out")
    return _conversion("convert", 6, places.original, PLAIN, files, lambda: convert(BITS))


def _overwrite(places: Places) -> Task:
    """The same over a model of other bits."""
    line = list(PLAIN)
    line[line.index(BITS)] = "2"
    other = disk.fresh(places.model, places.model.with_name("other"))
    with within(other):
        convert("2", overwrite=True)
    files, run = disk.contents(other / "out"), lambda: convert("2", overwrite=True)
    return _conversion("convert --overwrite", 3, places.model, (*line, "--overwrite"), files, run)


def _conversion(
    name: str, weight: int, template: Path, argv: tuple, files: dict[str, bytes], run: Callable[[], None]
) -> Task:
    def left(top: Path) -> str:
        aside = [p.name for p in top.glob("out.replaced-*")]
        return (whole(top / "out") if (top / "out").exists() else "") or _strangers(top, "out.partial", *aside)

    def finished(top: Path) -> str:
        found = disk.contents(top / "out")
        differ = [name for name in files if found.get(name) != files[name]]
        return f"other bytes of {', '.join(differ)}" if differ else _strangers(top)

    def again(top: Path) -> str:
        with within(top):
            try:
                run()
            except FileExistsError as error:
                if "is a converted model already" not in str(error):
                    return str(error)
            except Exception as error:  # whatever it is, it is wrong
                return f"it did not go on: {type(error).__name__} {error}"
        return finished(top)

    return Task(name, weight, template, argv, left, finished, again)


# ---- small files


GENERATE = ("generate", "--model", "out", "--prompt", "hello there", "--max-tokens", 20, "--json")


def _profile(places: Places) -> Task:
    """Over an older one."""
    top = disk.fresh(places.model, places.model.with_name("used"))
    opened = container.open_model(top / "out")
    argv = (*GENERATE, "--memory", fault_models.least(top / "out"), "--profile", "use.json")
    assert disk.run(places.shim, top, *argv).status == 0

    def left(at: Path) -> str:
        wrong = _readable(lambda: load_profile(at / "use.json", opened))
        return wrong or _strangers(at, "use.json", "use.json.partial")

    return Task("profile", 2, top, argv, left, left, _by_command(places.shim, argv, left))


def _save(places: Places) -> Task:
    """A conversation over an older one."""
    argv = ("chat", "--model", "out", "--max-tokens", 12)
    top = disk.fresh(places.model, places.model.with_name("talked"))
    assert disk.run(places.shim, top, *argv, data=SAID).status == 0

    def left(at: Path) -> str:
        wrong = _readable(lambda: chat.read_messages(at / "talk.json"))
        return wrong or _strangers(at, "talk.json", "talk.json.partial")

    return Task("/save", 2, top, argv, left, left, _by_command(places.shim, argv, left, SAID), SAID)


def _trace(places: Places) -> Task:
    """A trace that was cut off is read up to its last whole line; one without its first line is refused."""
    argv, first = (*GENERATE, "--trace", "t.txt"), disk.fresh(places.model, places.model.with_name("traced"))
    assert disk.run(places.shim, first, *argv).status == 0
    lines = (first / "t.txt").read_bytes()

    def left(top: Path) -> str:
        file = top / "t.txt"
        data = file.read_bytes() if file.exists() else b""
        if data and not lines.startswith(data):
            return "a trace of something else"
        return _readable(lambda: read_trace(file)) if b"\n" in data else ""

    def finished(top: Path) -> str:
        return "" if (top / "t.txt").read_bytes() == lines else "another trace"

    return Task("trace", 2, places.model, argv, left, finished, _by_command(places.shim, argv, finished))


def _readable(read: Callable[[], object]) -> str:
    try:
        read()
    except (ValueError, OSError) as error:
        return f"what has its name cannot be read: {error}"
    return ""


# ---- a whole model that is changed


def _report(places: Places) -> Task:
    argv = ("evaluate", "--model", "out", "--against", "hf", "--text", "text.txt", "--report", "--tasks", 0)
    argv = (*argv, "--tokens", 128, "--window", 64, "--json")

    def left(top: Path) -> str:
        return whole(top / "out") or _strangers(top)

    return Task("report", 3, places.model, argv, left, left, _by_command(places.shim, argv, left))


def _finetune(places: Places) -> Task:
    """Gains trained: the new model takes the old one's place whole."""
    low, argv = disk.fresh(places.model, places.model.with_name("low")), ("-c", FINETUNE)
    with within(low):
        convert("1.5", overwrite=True)
    first = disk.fresh(low, low.with_name("tuned"))
    done = disk.run(places.shim, first, *argv)
    assert (done.status, done.out) == (0, "True\n"), done
    old, new = disk.contents(low / "out"), disk.contents(first / "out")

    def left(top: Path) -> str:
        there = [p for p in (top / "out", *top.glob("out.replaced-*")) if p.exists()]
        found = [disk.contents(p) for p in there]
        known = old in found or new in found
        return "" if known else f"the model is neither the old nor the new one in {[p.name for p in there]}"

    def again(top: Path) -> str:
        """It starts from what stands there: the old model becomes the new one, the new one is trained further."""
        before = disk.contents(top / "out")
        done = disk.run(places.shim, top, *argv)
        if done.status:
            return f"it did not go on: {done.err[-500:]}"
        same = disk.contents(top / "out") == new or before == new
        return ("" if same else "other bytes than a run without faults") or whole(top / "out") or _strangers(top)

    return Task("finetune gains", 3, low, argv, left, left, again)


# ---- the hub


@contextlib.contextmanager
def _hub(work: Path) -> Iterator[Any]:
    """A small hub."""
    from hub_server import Hub  # a plugin of pytest's: not imported where tests import this module

    (work / "hub").mkdir()
    with Hub(work / "hub") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _upload(places: Places) -> Task:
    """`convert --upload-repo` of a model that is whole."""
    argv, server = (*PLAIN, "--upload-repo", "org/sent"), places.server
    files, repository = disk.contents(places.model / "out"), server.root / "org--sent"
    env = {"HF_ENDPOINT": server.address, "HF_HOME": str(server.root / "cache"), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writer", "NO_PROXY": "127.0.0.1"}

    def left(at: Path) -> str:
        held = disk.contents(repository)
        if container.MANIFEST in held and any(held.get(name) != data for name, data in files.items()):
            return "the hub has a manifest before it has the model"
        return whole(at / "out") or _strangers(at)

    def finished(at: Path) -> str:
        held = disk.contents(repository)
        differ = [name for name, data in files.items() if held.get(name) != data]
        return f"the hub has other bytes of {differ}" if differ else ""

    again = _by_command(places.shim, argv, finished, env=environment(**env))
    begin = partial(_empty, server)
    return Task(
        "upload", 3, places.model, argv, left, finished, again, env=environment(**env), writes=False, begin=begin
    )


def _empty(server) -> None:
    """Forget what was sent."""
    for file in (server.root / "org--sent").glob("*"):
        file.unlink()
    if (server.root / "org--sent").exists():
        (server.root / "org--sent").rmdir()
    for held in (server.repositories, server.objects, server.revisions):
        held.clear()


MAKERS: dict[str, Callable[[Places], Task]] = {
    "convert": _convert,
    "convert --overwrite": _overwrite,
    "profile": _profile,
    "/save": _save,
    "trace": _trace,
    "report": _report,
    "finetune gains": _finetune,
    "upload": _upload,
}
