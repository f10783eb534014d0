"""A long run in one process under a tight budget: nothing that it holds may grow, and every token stays right.

    PYTHONPATH=tests python -m abuse.soak [--model tiny|demo] [--tokens N] [--seed N]

Rounds change prompts, lengths and batch sizes at random: whole answers, streams that are closed or forgotten early, a
prompt cache used again, batches, errors (a refused context, an empty prompt, a processor that fails), budgets that
change, models loaded anew. Tokens are compared with those of the model with every expert in memory, made in a process
of its own.

Memory is looked at between rounds. What a process holds has in it what MLX and the C library have freed and keep for
the next call, some tens of megabytes, more or less at each look: that may not rise from the first third of the run to
the last, nor go beyond the budget. What is left once both have given it back, at the first look that counts and at the
end, each time with the model loaded anew and one answer written, has to be the same.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import tiny_qmoe_mlx
from abuse import record, served_model
from tiny_qmoe_mlx import budget, footprint, locate, models
from tiny_qmoe_mlx.container import open_model
from tiny_qmoe_mlx.errors import BudgetError
from tiny_qmoe_mlx.runtime import peak_memory
from tiny_qmoe_mlx.serving.figures import resident_bytes

PROMISE = "Memory, files, threads and objects do not grow over a long run, and no token is wrong."
CONTEXT, LONGEST, PROMPTS = 1024, 48, 24
ALLOWED = 0.02  # of what is held after the first tokens
CLOSE = 1e-2  # logits closer than this may change places in a batch: rounding is below 1e-3 here
SHARE = 0.25  # of the experts beyond the fewest that work, in the budget


@dataclass(frozen=True)
class Known:
    """A prompt, the tokens that follow it, and by how much each was ahead of the next."""

    ids: list[int]
    tokens: list[int]
    lead: list[float]

    def agrees(self, tokens: list[int]) -> bool:
        """Whether a batch may write these tokens: they part, if they do, where two were close."""
        parts = next((i for i, (a, b) in enumerate(zip(tokens, self.tokens, strict=False)) if a != b), None)
        return parts is None or self.lead[parts] < CLOSE


@dataclass(frozen=True)
class Sample:
    """What the process holds after so many tokens; kept_bytes: without what is free, where that was asked for."""

    tokens: int
    bytes: int
    kept_bytes: int | None
    active_bytes: int
    cache_bytes: int
    files: int
    threads: int
    objects: int


def sample(tokens: int) -> Sample:
    """Now; bytes are resident ones."""
    gc.collect()
    now, cache = resident_bytes() or 0, mx.get_cache_memory()
    files, threads = (min(_listed(name) for _ in range(5)) for name in ("fd", "task"))
    objects = sum(str(type(o).__module__).startswith("tiny_qmoe_mlx") for o in gc.get_objects())
    return Sample(tokens, now, None, mx.get_active_memory(), cache, files, threads, objects)


def _listed(name: str) -> int:
    """Entries of a directory of this process, a moment later: the thread that looks at the system's pressure opens a
    file now and then."""
    time.sleep(0.01)
    return len(os.listdir(f"/proc/self/{name}"))


def kept_bytes() -> int:
    """Resident bytes once MLX and glibc have given back what is free."""
    gc.collect()
    mx.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes() or 0


def bounds(directory: Path) -> tuple[int, int]:
    """The smallest budget that works, and the tight one that the soak runs under."""
    found = budget.split(open_model(directory), sys.maxsize, CONTEXT, True)
    low, high = found.min_budget_bytes, found.resident_budget_bytes
    return low, low + int(SHARE * (high - low))


def answers(directory: Path, count: int, seed: int) -> list[Known]:
    """Prompts and what follows them, with every expert in memory."""
    loaded, tokenizer = models.load(directory, "90%", CONTEXT)
    with loaded:
        assert loaded.tiny_qmoe.budget.mode == "resident"
        return [known(loaded, tokenizer, prompt) for prompt in served_model.prompts(count, seed)]


def known(loaded: Any, tokenizer: Any, prompt: str) -> Known:
    """One prompt, after which the model writes as many tokens as it will."""
    ids = tokenizer.encode(prompt)
    tokens = [r.token for r in tiny_qmoe_mlx.stream_generate(loaded, tokenizer, ids, max_tokens=LONGEST)]
    logits = loaded(mx.array([ids + tokens[:-1]]))[0, len(ids) - 1 :].astype(mx.float32)
    best = mx.sort(logits, axis=-1)[:, -2:]
    return Known(ids, tokens, (best[:, 1] - best[:, 0]).tolist())


@dataclass
class Soak:
    """A run: its model, what has been written, and what went wrong."""

    directory: Path
    known: list[Known]
    draw: random.Random
    model: Any = None
    tokenizer: Any = None
    written: int = 0
    wrong: list[str] = field(default_factory=list)
    rounds: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    @property
    def budget_bytes(self) -> int:
        return bounds(self.directory)[1]

    def pick(self) -> tuple[Known, int]:
        one = self.draw.choice(self.known)
        return one, self.draw.randint(1, len(one.tokens))

    def check(self, what: str, right: bool, tokens: list[int]) -> None:
        self.written += len(tokens)
        if not right:
            self.wrong.append(f"{what} wrote {tokens}")

    def stream(self, one: Known, most: int, **options: Any) -> Any:
        return tiny_qmoe_mlx.stream_generate(self.model, self.tokenizer, one.ids, max_tokens=most, **options)

    # ---- rounds

    def load(self) -> None:
        """The model, or the model anew."""
        if self.model is not None:
            self.model.close()
        self.model = self.tokenizer = None  # or those of two models would be in memory
        self.model, self.tokenizer = models.load(self.directory, bounds(self.directory)[1], CONTEXT)
        assert self.model.tiny_qmoe.budget.mode == "streamed"

    def whole(self) -> None:
        one, most = self.pick()
        tokens = [r.token for r in self.stream(one, most)]
        self.check("a whole answer", tokens == one.tokens[:most], tokens)

    def closed_early(self) -> None:
        one, most = self.pick()
        stream = self.stream(one, LONGEST)
        tokens = [next(stream).token for _ in range(most)]
        if self.draw.random() < 0.5:
            stream.close()
        self.check("a stream that is left", tokens == one.tokens[:most], tokens)

    def batch(self) -> None:
        picked = [self.pick() for _ in range(self.draw.randint(2, 6))]
        ids, most = [one.ids for one, _ in picked], [most for _, most in picked]
        found = tiny_qmoe_mlx.batch_generate(self.model, self.tokenizer, ids, max_tokens=most)
        self.written += sum(most)
        for (one, size), text in zip(picked, found.texts, strict=True):
            words = [token for token in one.tokens[:size] if token not in self.tokenizer.eos_token_ids]
            right = text == self.tokenizer.decode(words) or min(one.lead[:size]) < CLOSE
            self.check(f"a batch of {len(ids)} ({text!r})", right, [])

    def cached(self) -> None:
        """An answer in two parts, the second from the first one's KV cache."""
        one, most = self.pick()
        cache, first = make_prompt_cache(self.model), self.draw.randint(1, most)
        tokens = [r.token for r in self.stream(one, first, prompt_cache=cache)]
        if first < most:
            trim_prompt_cache(cache, 1)  # mlx-lm has computed the last token too
            rest = Known(tokens[-1:], [], [])
            tokens += [r.token for r in self.stream(rest, most - first, prompt_cache=cache)]
        self.check("an answer in two parts", one.agrees(tokens), tokens)

    def fails(self) -> None:
        """A processor that raises, an empty prompt, a context and a budget that cannot be."""
        one, most = self.pick()
        calls = iter(range(most))

        def processor(tokens: mx.array, logits: mx.array) -> mx.array:
            next(calls)  # raises StopIteration, which a generator turns into RuntimeError
            return logits

        with suppress(RuntimeError):
            self.written += sum(1 for _ in self.stream(one, LONGEST + 1, logits_processors=[processor]))
            self.wrong.append("a processor that fails went unheeded")
        with suppress(ValueError):
            tiny_qmoe_mlx.batch_generate(self.model, self.tokenizer, [one.ids, []])
            self.wrong.append("an empty prompt was taken")
        with suppress(BudgetError):
            models.load(self.directory, bounds(self.directory)[0], 2 * CONTEXT)
            self.wrong.append("a context that does not fit was taken")

    def changes_budget(self) -> None:
        low, high = bounds(self.directory)
        with suppress(BudgetError):
            self.model.tiny_qmoe.set_memory(low - 1)
            self.wrong.append("a budget that is too small was taken")
        one, most = self.pick()
        tokens = []
        for response in self.stream(one, most):
            tokens.append(response.token)
            self.model.tiny_qmoe.set_memory(self.draw.randint(low, high))
        self.model.tiny_qmoe.set_memory(high)
        self.check("an answer under changing budgets", tokens == one.tokens[:most], tokens)

    def run(self, tokens: int, settled: int) -> None:
        """Rounds until so many tokens are written, with five looks up to `settled` and as often from there on."""
        kinds: dict[Callable[[], None], int] = {
            self.whole: 30,
            self.closed_early: 20,
            self.batch: 20,
            self.cached: 15,
            self.changes_budget: 10,
            self.fails: 4,
            self.load: 1,
        }
        self.load()
        every = max(1, settled // 5)
        while self.written < tokens:
            (kind,) = self.draw.choices(list(kinds), list(kinds.values()))
            self.rounds[kind.__name__] += 1
            kind()
            if self.written >= every * (len(self.samples) + 1) or self.written >= tokens:
                first = self.written >= settled and all(s.kept_bytes is None for s in self.samples)
                self.look(first or self.written >= tokens)

    def look(self, kept: bool) -> None:
        """Note what is held; without what is free, in a state that can come again."""
        now = sample(self.written)
        if kept:
            self.load()
            for _ in self.stream(self.known[0], LONGEST):
                pass
            now = replace(now, kept_bytes=kept_bytes())
        self.samples.append(now)


def grown(samples: list[Sample], settled: int) -> list[str]:
    """What has grown, after `settled` tokens, by more than it may."""
    start, *later = [s for s in samples if s.tokens >= settled]
    before, after = thirds([s.bytes for s in (start, *later)])
    faults = (
        [] if after <= (1 + ALLOWED) * before else [f"resident: {before} bytes in the first third, {after} in the last"]
    )
    if start.kept_bytes and later[-1].kept_bytes and later[-1].kept_bytes > (1 + ALLOWED) * start.kept_bytes:
        faults.append(
            f"resident without what is free: {start.kept_bytes} bytes at first, {later[-1].kept_bytes} at the end"
        )
    if max(s.cache_bytes for s in samples) > footprint.MLX_CACHE_BYTES:
        faults.append("MLX's cache is over its limit")
    for what, spare in (("files", 0), ("threads", 0), ("objects", 0), ("active_bytes", 1 << 20)):
        old, new = getattr(start, what), getattr(later[-1], what)
        if new > old + spare:
            faults.append(f"{new} {what} at the end, {old} at first")
    return faults


def thirds(sizes: list[int]) -> tuple[int, int]:
    """The medians of the first and of the last third."""
    count = max(1, len(sizes) // 3)
    return round(statistics.median(sizes[:count])), round(statistics.median(sizes[-count:]))


def spread(samples: list[Sample]) -> tuple[float, float]:
    """The least and the most memory over the median."""
    sizes = [s.bytes for s in samples]
    middle = statistics.median(sizes)
    return min(sizes) / middle, max(sizes) / middle


def soak(directory: Path, tokens: int, settled: int, seed: int, prompts: int = PROMPTS) -> tuple[Soak, list[str]]:
    """Run, and say what broke."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        expected = other.submit(answers, directory, prompts, seed).result()
    found = Soak(directory, expected, random.Random(seed))
    found.run(tokens, settled)
    found.model.close()
    return found, [*found.wrong, *grown(found.samples, settled)]


def figures(found: Soak, settled: int) -> dict[str, Any]:
    """For the record."""
    start, *later = [s for s in found.samples if s.tokens >= settled]
    last, looks = later[-1], [start, *later]
    least, most = spread(looks)
    ends = [size / 1e6 for size in thirds([s.bytes for s in looks])]
    kept = [(s.kept_bytes or 0) / 1e6 for s in (start, last)]
    return {
        "tokens": found.written,
        "rounds": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.rounds.most_common()),
        f"resident memory after the first {settled} tokens, of its median": f"{least:.4f} to {most:.4f}",
        "its median in the first and last third, MB": f"{ends[0]:.2f}, {ends[1]:.2f}",
        "without what MLX and glibc keep free, then and at the end, MB": f"{kept[0]:.2f}, {kept[1]:.2f}",
        "the most that the process held, of the budget": f"{peak_memory() / found.budget_bytes:.3f}",
        "MLX's cache at most, MB": round(max(s.cache_bytes for s in found.samples) / 1e6, 2),
        "MLX's live arrays then and at the end, MB": f"{start.active_bytes / 1e6:.2f}, {last.active_bytes / 1e6:.2f}",
        "open files, threads, objects of ours then": f"{start.files}, {start.threads}, {start.objects}",
        "files, threads, objects at the end": f"{last.files}, {last.threads}, {last.objects}",
    }


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=PROMISE)
    parser.add_argument("--model", choices=("tiny", "demo"), default="tiny")
    parser.add_argument("--tokens", type=int, help="default 100000, of the demo 5000")
    parser.add_argument("--seed", type=int, default=0)
    args, start = parser.parse_args(argv), time.monotonic()
    tiny = args.model == "tiny"
    settled, tokens = (5000, args.tokens or 100_000) if tiny else (1000, args.tokens or 5000)
    with tempfile.TemporaryDirectory() as folder:
        directory = served_model.make(Path(folder)) if tiny else locate.model_directory("demo", quiet=True)
        found, faults = soak(directory, tokens, settled, args.seed, PROMPTS if tiny else 8)
        if peak_memory() > found.budget_bytes:
            faults.append(f"{peak_memory()} bytes were held, the budget is {found.budget_bytes}")
        numbers = figures(found, settled)
    for fault in faults[:20]:
        print(fault)
    for s in found.samples:
        print(s)
    seconds = time.monotonic() - start
    name = f"soak_{args.model}"
    record.keep(5, name, PROMISE, "abuse.soak", seconds, numbers, len(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
