"""What the runs on a failing disk work with: a tiny original, a text, and commands whose right answers are known.

Records of the converted model are multiples of a sector, so that they are read past the page cache (O_DIRECT).
"""

import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import chat_model

from abuse import disk
from tiny_qmoe_mlx import budget, container
from tiny_qmoe_mlx.conversion.run import Settings
from tiny_qmoe_mlx.conversion.run import convert as run_convert
from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.verify import find_problems

WORDS = "the river stone light walks under old quick bright over slow small green house tree wind rain".split()
BITS = "3.09"  # of experts of 256 x 128, whose records are then 9 times 4096 bytes
SOURCE = ("--hf-path", "hf", "--mlx-path", "out", "--calibration", "text.txt")
SETTINGS = {"sequences": 4, "sequence_tokens": 32}
CONVERT = ("convert", *SOURCE, "--bits", BITS, "--calibration-sequences", "4", "--calibration-tokens", "32")
PLAIN = (*CONVERT, "--report", "none")
CONTEXT = 1024
SERVER_BYTES = 66_000_000  # that a server asks for beside the model: clients, and a longer context
TIMES = ("_tps", "_s", "ttft")  # of figures that differ from run to run
SERVE = """
import ctypes, http.client, json, os, re, signal, sys, threading
from tiny_qmoe_mlx import server, terminal

failed = 0

def ask(port):
    global failed
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"prompt": "hello there", "max_tokens": 20, "temperature": 0})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    if answer.status == 200:
        os.write(1, found["choices"][0]["text"].encode())
    else:
        failed = 1
        os.write(2, f"error: {found['error']['message'].partition('failed: ')[2]}\\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)

class Lines:
    def write(self, text):
        if port := re.search(r":(\\d+) \\(", text):
            threading.Thread(target=ask, args=[int(port[1])], daemon=True).start()
    def flush(self):
        pass

sys.stdout = Lines()
status = terminal.run(server.main, sys.argv[1:])
ctypes.CDLL(None).fault_counts()
os._exit(failed or status)  # as the command itself ends
"""  # a server that is asked once, prints the text of its answer or the error, and is stopped
ASKED = b"why\n/system be brief\nhow\n"


@dataclass(frozen=True)
class Command:
    """A command line run in a directory made from `template`, and what it gave without faults.

    right: whether a run that ended well gave the same. data: its standard input.
    """

    name: str
    argv: tuple
    template: Path
    right: Callable[[disk.Done, Path], bool]
    data: bytes = b""
    seconds: float = 0.0
    calls: dict[str, int] | None = None


def make_original(top: Path) -> Path:
    """A directory with hf, an original that has a chat template, and text.txt; the directory."""
    sizes = {"moe_intermediate_size": 256, "hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    chat_model.make_checkpoint(top / "hf", **sizes)
    (top / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return top


@contextlib.contextmanager
def within(top: Path) -> Iterator[None]:
    """Work in a directory."""
    before = Path.cwd()
    os.chdir(top)
    try:
        yield
    finally:
        os.chdir(before)


def convert(bits: str, overwrite: bool = False) -> None:
    """The command `PLAIN` in this process and the current directory."""
    settings = Settings(bits=float(bits), calibration="text.txt", **SETTINGS)
    run_convert("hf", "out", settings, overwrite=overwrite)


def whole(model: Path) -> str:
    """What is wrong with a model that has its final name."""
    try:
        problems = list(find_problems(model))
    except FormatError as error:
        return f"{model.name} is there and no model: {error}"
    return f"{model.name} is there and damaged: {problems[0].problem}" if problems else ""


def least(model: Path) -> int:
    """Bytes of a budget in which nearly every expert is read anew for every token."""
    return budget.split(container.open_model(model), sys.maxsize, CONTEXT).min_budget_bytes + 20_000


def figures(text: str) -> dict:
    """What a command printed as JSON, without what differs from run to run."""
    found = json.loads(text)
    return {k: v for k, v in found.items() if not k.endswith(TIMES) and k not in VARYING}


VARYING = {
    "peak_memory_bytes",
    "expert_hits",
    "expert_misses",
    "records_read",
    "bytes_read",
    "bytes_per_token",
    "read_retries",
    "lookahead_reads",
    "lookahead_used",
    "stalls",
    "dispatch",
    "expected_tps",
    "limit",
    "disk_busy_s",
    "budget_bytes",
    "resident_bytes",
    "pool_bytes",
    "direct_reads",
}


def commands(shim: Path, work: Path, only: tuple[str, ...] = ()) -> list[Command]:
    """Commands (or those named) whose answers and calls are known."""
    top = make_original(work / "original")
    whole = work / "whole"
    first = disk.run(shim, disk.fresh(top, whole), *PLAIN)
    assert (first.status, first.err) == (0, ""), first
    files = disk.contents(whole / "out")
    assert all(layer.record_bytes % 4096 == 0 for layer in container.open_model(whole / "out").spec.layers)
    model = disk.fresh(whole, work / "model")
    out = [Command("convert", PLAIN, top, lambda done, at: disk.contents(at / "out") == files)]
    line = ("generate", "--model", "out", "--prompt", "hello there", "--max-tokens", 40, "--json", "--memory")
    streamed = (*line, least(model / "out"))
    evaluate = ("evaluate", "--model", "out", "--text", "text.txt", "--against", "hf", "--tokens", 256)
    others = {
        "generate, streamed": streamed,
        "generate, resident": (*line, "1GB"),
        "verify": ("verify", "--model", "out", "--json"),
        "evaluate": (*evaluate, "--window", 128, "--json", "--memory", "1GB"),
        "plan": ("plan", "--model", "out", "--json"),
    }
    serve = ("-c", SERVE, "--model", "out", "--port", 0, "--quiet", "--log-level", "critical", "--memory")
    out += [_json(name, argv, model, shim, work) for name, argv in others.items() if not only or name in only]
    talk = ("chat", "--model", "out", "--max-tokens", 12, "--memory", streamed[-1])
    texts = {"chat": (talk, ASKED), "server": ((*serve, streamed[-1] + SERVER_BYTES), b"")}
    out += [_text(name, *texts[name], model, shim, work) for name in texts if not only or name in only]
    return [_timed(one, shim, work) for one in out]


def _json(name: str, argv: tuple, template: Path, shim: Path, work: Path) -> Command:
    done = disk.run(shim, disk.fresh(template, work / "first"), *argv)
    assert (done.status, done.err) == (0, ""), done
    want = figures(done.out)
    return Command(name, argv, template, lambda done, at: figures(done.out) == want)


def _text(name: str, argv: tuple, data: bytes, template: Path, shim: Path, work: Path) -> Command:
    done = disk.run(shim, disk.fresh(template, work / "first"), *argv, data=data)
    assert (done.status, done.err) == (0, "") and len(done.out) > 10, done
    want = done.out
    return Command(name, argv, template, lambda done, at: done.out == want, data)


def _timed(command: Command, shim: Path, work: Path) -> Command:
    """The command with the time and the calls of a run without faults, which has to give the right answer."""
    top = disk.fresh(command.template, work / "first")
    done = disk.run(shim, top, *command.argv, data=command.data)
    assert done.status == 0 and command.right(done, top) and not done.injected, (command.name, done)
    return Command(command.name, command.argv, command.template, command.right, command.data, done.seconds, done.calls)
