"""What the server counts, as Prometheus' text and as JSON for the page. Sizes are bytes, times seconds."""

import ctypes
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW_S = 5.0  # of the rate of tokens
SHOWN = (  # to the page
    "tokens_per_second",
    "hit_rate",
    "bytes_per_token",
    "budget_bytes",
    "held_bytes",
    "pool_bytes",
    "tokens",
    "active",
    "waiting",
    "context",
)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """Counts of all requests; any thread may add to them.

    Attributes:
        tokens, prompt_tokens: written, and read in prompts that were answered.
        statuses: HTTP status, number of answers; gone: clients that left before theirs was whole.
        request_s: seconds that an answer took lately.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[float] = deque()
        self.tokens = self.prompt_tokens = self.gone = 0
        self.statuses: Counter[int] = Counter()
        self.request_s = 1.0

    def token(self) -> None:
        now = time.monotonic()
        with self._lock:
            self.tokens += 1
            self._times.append(now)
            self._forget(now)

    def prompt(self, tokens: int) -> None:
        with self._lock:
            self.prompt_tokens += tokens

    def status(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1

    def by_status(self) -> dict[int, int]:
        with self._lock:
            return dict(sorted(self.statuses.items()))

    def left(self) -> None:
        with self._lock:
            self.gone += 1

    def took(self, seconds: float) -> None:
        with self._lock:
            self.request_s += 0.2 * (seconds - self.request_s)

    def tokens_per_second(self) -> float | None:
        """Of all requests together in the last seconds; None before the first token."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            return len(self._times) / WINDOW_S if self.tokens else None

    def _forget(self, now: float) -> None:
        while self._times and now - self._times[0] > WINDOW_S:
            self._times.popleft()


def resident_bytes() -> int | None:
    """Memory that this process holds now, as the system counts it; None where it does not say."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":  # not run on a Mac yet
        usage = (ctypes.c_uint64 * 64)()  # rusage_info_v0: uuid (16 bytes), then numbers; the 7th is the footprint
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, usage) == 0:
            return int(usage[2 + 7])
    return None


def experts(stats: dict[str, Any], cache: Any, name: str) -> dict[str, Any]:
    """What the page draws: layers, which experts are in memory, how often each was demanded, and figures."""
    layers = cache.store.container.spec.layers
    sizes = [{"layer": x.layer, "experts": x.experts, "record_bytes": x.record_bytes} for x in layers]
    use = [counts.tolist() for counts in cache.use]
    shown = {key: stats[key] for key in SHOWN}
    return {"model": name, "layers": sizes, "state": cache.snapshot(), "use": use, "stats": shown}


def text(rows: Iterator[tuple[str, str, str, Any]]) -> str:
    """Rows of name, type, help and value (a number, or a dictionary of label and number) in Prometheus' format."""
    lines = []
    for name, kind, help, value in rows:
        lines += [f"# HELP tiny_qmoe_{name} {help}", f"# TYPE tiny_qmoe_{name} {kind}"]
        for label, number in value.items() if isinstance(value, dict) else [("", value)]:
            lines.append(f"tiny_qmoe_{name}{label} {number}")
    return "\n".join(lines) + "\n"


def rows(found: dict[str, Any], counters: Counters) -> Iterator[tuple[str, str, str, Any]]:
    """Rows of `text`; those that the machine does not tell are left out.

    Args:
        found: of `Generation.stats`.
        counters: of all requests.
    """
    statuses = {f'{{status="{status}"}}': n for status, n in counters.by_status().items()}
    table = (
        ("budget_bytes", "gauge", "Memory budget of the process.", found["budget_bytes"]),
        ("resident_memory_bytes", "gauge", "Memory that the process holds now.", found["held_bytes"]),
        ("peak_memory_bytes", "gauge", "The most memory that the process has held.", found["peak_memory_bytes"]),
        ("pool_bytes", "gauge", "Expert slots in memory.", found["pool_bytes"]),
        ("kv_tokens", "gauge", "Tokens of KV cache set aside for requests under way.", found["kv_tokens"]),
        ("prompt_cache_bytes", "gauge", "KV caches of earlier prompts.", found["prompt_cache_bytes"]),
        ("expert_hits_total", "counter", "Demanded experts that were in memory.", found["expert_hits"]),
        ("expert_misses_total", "counter", "Demanded experts that had to be read.", found["expert_misses"]),
        ("expert_hit_ratio", "gauge", "Hits over demands since the start.", found["hit_rate"]),
        ("read_bytes_total", "counter", "Bytes of experts read from disk.", found["bytes_read"]),
        ("read_bytes_per_token", "gauge", "Bytes of experts read for each token written.", found["bytes_per_token"]),
        ("read_retries_total", "counter", "Reads that had to be repeated.", found["read_retries"]),
        ("io_wait_seconds_total", "counter", "Time that products waited for experts.", found["io_wait_s"]),
        ("disk_busy_seconds_total", "counter", "Time that some read was under way.", found["disk_busy_s"]),
        ("stalls_total", "counter", "Waits for the disk of more than five seconds.", found["stalls"]),
        ("lookahead_reads_total", "counter", "Experts read because they were expected.", found["lookahead_reads"]),
        ("lookahead_used_total", "counter", "Those of them that were demanded.", found["lookahead_used"]),
        ("generated_tokens_total", "counter", "Tokens written.", counters.tokens),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were taken up.", counters.prompt_tokens),
        ("tokens_per_second", "gauge", "Tokens written lately, of all requests.", found["tokens_per_second"]),
        ("requests_active", "gauge", "Requests being computed.", found["active"]),
        ("requests_waiting", "gauge", "Requests that wait for their turn.", found["waiting"]),
        ("http_responses_total", "counter", "Answers by HTTP status.", statuses),
        ("clients_gone_total", "counter", "Clients that left before their answer was whole.", counters.gone),
    )
    return (row for row in table if row[3] is not None)
