"""`python -m tiny_qmoe_mlx.server`: OpenAI's API, a page and figures of one converted model, under one memory budget.

mlx_lm.server's own code answers; the parts are in serving/.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from types import FrameType

    from tiny_qmoe_mlx.serving.generation import Generation
    from tiny_qmoe_mlx.serving.sockets import Server

NEEDS = "0.32"
POLL_S = 0.1  # seconds between two looks for a signal
PARTS = (
    "APIHandler",
    "BatchGenerator",
    "GenerationContext",
    "LRUPromptCache",
    "ModelDescription",
    "ModelProvider",
    "ResponseGenerator",
    "_make_logits_processors",
    "_make_sampler",
    "make_text_state_machine",
)


def main(argv: list[str]) -> int:
    """Run the command."""
    from tiny_qmoe_mlx import blas, locate
    from tiny_qmoe_mlx.serving import options
    from tiny_qmoe_mlx.serving.sockets import Server

    args = options.parse(argv)
    with Server(args.host, args.port) as listening:
        directory = locate.model_directory(args.model, args.quiet)
        start_log(args.log_level)
        require_mlx_lm()
        model, generation = _open(directory, args)
        try:
            with blas.shared_machine():
                serve(listening, generation, args)
        finally:
            generation.stop_and_join()
            model.close()  # which writes the profile
    return 0


def require_mlx_lm() -> None:
    """Refuse an mlx-lm whose server is made of other parts than those that ours takes from it.

    Raises:
        ImportError: with the version that is installed.
    """
    from mlx_lm import __version__, server

    if not all(hasattr(server, name) for name in PARTS):
        raise ImportError(f"[server] mlx-lm should be {NEEDS} or later, {__version__} is installed; upgrade it.")


def start_log(level: str) -> None:
    """Log to stderr; what people ask and are answered is in it at level debug alone."""
    import logging

    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if level != "debug":  # mlx-lm reports every prompt's progress as info
        logging.getLogger().setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    logging.getLogger("tiny_qmoe_mlx").setLevel(level.upper())


def _open(directory: Path, args: "argparse.Namespace") -> "tuple[Any, Generation]":
    """The model, and the thread that answers with it."""
    import mlx.core as mx

    from tiny_qmoe_mlx import chat_template, footprint, generate_options, generate_setup, masked_spans, models, terminal
    from tiny_qmoe_mlx.original import checkpoint
    from tiny_qmoe_mlx.serving import room
    from tiny_qmoe_mlx.serving.generation import Generation, Provider

    args.prefill_step_size = footprint.PREFILL_CHUNK
    config, cpu = checkpoint.read_config(directory), mx.default_device() == mx.cpu
    masked_spans.refuse(config, "the server")
    chat_template.bound_arithmetic()
    tokenizer = models.open_tokenizer(directory)
    if args.chat_template:
        tokenizer.chat_template, tokenizer.has_chat_template = args.chat_template, True
    if args.chat_template or (args.chat_template_args and tokenizer.has_chat_template):
        how = {"tokenize": False, "add_generation_prompt": True, **args.chat_template_args}
        chat_template.render(tokenizer, [chat_template.TRIAL], "see --chat-template and --chat-template-args", **how)
    args.prompt_cache_bytes = room.prompt_cache_bytes(config, args, cpu)
    draft, draft_bytes = room.open_draft(directory, tokenizer, args)
    memory = room.memory_of_model(directory, config, draft_bytes, args, cpu)
    with terminal.Bars(args.quiet) as bars:
        model, _ = models.load(directory, memory, args.context, bars, tokenizer, generate_options.streaming_of(args))
    try:
        generate_setup.check_caches(model, None, args)
    except ValueError:
        model.close()
        raise
    provider = Provider(args, model, tokenizer, draft)
    return model, Generation(provider, str(directory), config, room.beside(directory, config, draft_bytes, args), cpu)


def answer(listening: "Server", generation: "Generation") -> threading.Thread:
    """Let clients in, each in a thread of its own; the thread that does so."""
    from mlx_lm.server import get_system_fingerprint

    from tiny_qmoe_mlx.serving.handler import Handler
    from tiny_qmoe_mlx.serving.schema import Grammars
    from tiny_qmoe_mlx.vocabulary import vocabulary

    tokenizer = generation.model_provider.tokenizer
    grammars = Grammars(tokenizer, vocabulary(generation.config, len(tokenizer)))
    fingerprint = get_system_fingerprint()
    listening.RequestHandlerClass = partial(Handler, generation=generation, grammars=grammars, fingerprint=fingerprint)
    thread = threading.Thread(target=listening.serve_forever, args=(0.1,), name="connections", daemon=True)
    thread.start()
    return thread


def serve(listening: "Server", generation: "Generation", args: "argparse.Namespace") -> None:
    """Answer until Ctrl-C or a polite kill; answers under way may then end, unless there is a second signal."""
    from tiny_qmoe_mlx import terminal

    asked = _stop_on_signals()
    terminal.check_stopped()  # before
    clients = answer(listening, generation)
    print(ready(args, listening.server_port), flush=True)
    while not asked:
        time.sleep(POLL_S)
    listening.shutdown()
    clients.join()
    listening.socket.close()  # nobody else connects
    if not generation.drain(args.grace):
        print(f"answers that took more than {args.grace:g} s were cut off", file=sys.stderr)


def _stop_on_signals() -> list[int]:
    """The first signal asks to stop, by its number in the list; a second ends at once.

    Neither an Event nor a queue to wait at: a handler that comes while this very thread holds the Event's lock would
    wait for it for ever; and the system may give a signal to another thread, which does not wake this one, and handlers
    run in this one alone (a server under load never stopped).
    """
    from tiny_qmoe_mlx import terminal

    asked: list[int] = []

    def ask(number: int, frame: "FrameType | None") -> None:
        if asked:
            terminal.stop(number, frame)
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # not where a shell runs this in the background
        signal.signal(signal.SIGINT, ask)
    return asked


def ready(args: "argparse.Namespace", port: int) -> str:
    """What is printed when the first request may come."""
    from tiny_qmoe_mlx.serving.callers import is_local

    host = f"[{args.host}]" if ":" in args.host else args.host
    line = f"serving {args.model} at http://{host}:{port} (a page there; OpenAI's API under /v1; figures at /metrics)"
    if not is_local(args.host) and args.api_key is None:
        line += "; anyone who reaches this machine can use it: see --api-key-file"
    return f"{line}; Ctrl-C stops"


if __name__ == "__main__":
    from tiny_qmoe_mlx import terminal

    status = terminal.run(main)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # nobody reads any more
                stream.flush()
    # Not by way of Python's own end: MLX frees what the generation thread compiled when that thread has gone for the
    # system too, which is after it can be joined, and aborts the process where Python is ending meanwhile.
    os._exit(status)
