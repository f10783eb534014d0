"""The model's thread: all that takes longer than a moment happens here, and the window hears of it by signals."""

import threading
import time
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, QThread, Signal, Slot

EVERY_S = 0.25  # between two reports of figures
WINDOW_BYTES = 110_000_000  # what Qt and its fonts add to the process: measured on Linux, off screen


class Worker(QObject):
    """A model and a conversation with it; lives in a QThread, where its slots run one after the other.

    `go` and `stop` may be called from any thread.
    """

    progressed = Signal(str, int, int)  # what, done, total
    opened = Signal(str, str)  # name of the model, "resident" or "streamed"
    wrote = Signal(str)  # a piece of an answer
    measured = Signal(str)  # figures, in a line
    answered = Signal(str)  # why the answer ended: "stop", "length", "stopped"; empty where there is none
    replaced = Signal(list)  # messages of a conversation that was loaded
    failed = Signal(str)  # a sentence

    def __init__(self, model: str, memory: str, context: int, max_tokens: int):
        super().__init__()
        self._name, self._memory, self._context, self._max_tokens = model, memory, context, max_tokens
        self._stop = threading.Event()
        self._model: Any = None
        self._talk: Any = None

    def go(self) -> None:
        """Allow an answer; called before it is asked for, so that no `stop` after that is lost."""
        self._stop.clear()

    def stop(self) -> None:
        """End what is under way at the next token, or at the next step of loading."""
        self._stop.set()

    @Slot()
    def open(self) -> None:
        """Load the model, in the thread that will run it."""
        try:
            from tiny_qmoe_mlx import budget, load, locate
            from tiny_qmoe_mlx.conversation import Conversation

            directory = locate.model_directory(self._name, quiet=True)
            memory = budget.parse_memory(self._memory) - WINDOW_BYTES
            self._model, tokenizer = load(directory, memory, self._context, self._progress)
            self._talk = Conversation(self._model, tokenizer, self._context)
        except InterruptedError:
            self.failed.emit("loading was stopped")
            return
        except (ValueError, OSError, ImportError, MemoryError, SystemExit) as error:
            window = f" (with {WINDOW_BYTES / 1e6:.0f}MB more for the window)" if "[memory]" in str(error) else ""
            self.failed.emit(_sentence(error) + window)
            return
        self.opened.emit(Path(self._name).name, self._model.tiny_qmoe.stats()["mode"])

    def _progress(self, what: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise InterruptedError(what)
        self.progressed.emit(what, done, total)

    @Slot(str)
    def ask(self, text: str) -> None:
        """Put a question; pieces, figures and the end come as signals."""
        from tiny_qmoe_mlx import blas

        reason = ""
        try:
            with blas.shared_machine():
                reason = self._answer(text)
        except (ValueError, OSError, MemoryError) as error:
            self.failed.emit(_sentence(error))
        self.answered.emit(reason)

    def _answer(self, text: str) -> str:
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        before, told, response = self._model.tiny_qmoe.stats(), 0.0, None
        sampling = {
            "sampler": make_sampler(0.3, top_p=0.9),
            "logits_processors": make_logits_processors(repetition_penalty=1.1, repetition_context_size=64),
        }
        for response in self._talk.ask(text, self._max_tokens, self._stop.is_set, **sampling):
            self.wrote.emit(response.text)
            if time.monotonic() >= told + EVERY_S or response.finish_reason:
                told = time.monotonic()
                self.measured.emit(figures(response, self._model.tiny_qmoe.stats(), before))
        return "stopped" if self._stop.is_set() or response is None else response.finish_reason or ""

    @Slot()
    def reset(self) -> None:
        """Forget the conversation."""
        if self._talk is not None:
            self._talk.reset()

    @Slot(str)
    def save(self, file: str) -> None:
        """Write the conversation as `chat`'s /save does."""
        from tiny_qmoe_mlx.staging import write_json

        try:
            write_json(Path(file), {"model": self._name, "messages": self._talk.messages if self._talk else []})
        except OSError as error:
            self.failed.emit(_sentence(error))

    @Slot(str)
    def load(self, file: str) -> None:
        """Go on from a conversation that was saved."""
        from tiny_qmoe_mlx.chat import read_messages

        try:
            if self._talk is None:
                raise ValueError("a model should be open before a conversation is, none is")
            messages = read_messages(Path(file))
            self._talk.load(messages)
        except (ValueError, OSError) as error:
            self.failed.emit(_sentence(error))
        else:
            self.replaced.emit(messages)

    @Slot()
    def close(self) -> None:
        """Free the model, and end the thread."""
        if self._model is not None:
            self._model.close()
        self._model = self._talk = None
        QThread.currentThread().quit()


def figures(response: Any, now: dict[str, Any], before: dict[str, Any]) -> str:
    """Speed, hits, bytes read a token, and memory, since the counters `before`."""
    hits, misses, read = (now[key] - before[key] for key in ("expert_hits", "expert_misses", "bytes_read"))
    return (
        f"{response.generation_tps:.1f} tokens/s   {100 * hits / max(1, hits + misses):.1f} % hits   "
        f"{read / 1e9 / response.generation_tokens:.4f} GB a token   "
        f"{now['peak_memory_bytes'] / 1e6:.0f} MB of {(now['budget_bytes'] + WINDOW_BYTES) / 1e6:.0f} MB"
    )


def _sentence(error: BaseException) -> str:
    from tiny_qmoe_mlx import terminal

    return terminal.sentence(error)
