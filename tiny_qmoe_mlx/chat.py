"""`python -m tiny_qmoe_mlx.chat`: talk with a converted model in the terminal, under one memory budget.

At a terminal it prompts, and a line may be edited; otherwise each line of standard input is a message and each answer
goes to stdout, with --json as one line. The conversation itself is conversation.py's.
"""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tiny_qmoe_mlx import generate_options as options
from tiny_qmoe_mlx import locate, paths, terminal
from tiny_qmoe_mlx.generate import decoding, measure, summary, write

if TYPE_CHECKING:
    from tiny_qmoe_mlx.conversation import Conversation

DESCRIPTION = "talk with a converted model under one memory budget."
EXAMPLES = """
  python -m tiny_qmoe_mlx.chat --model demo
  python -m tiny_qmoe_mlx.chat --model qwen3-2bit --memory 6GB --context 8192 --system-prompt "Be brief."
  printf 'What is a tree?\\nAnd a forest?\\n' | python -m tiny_qmoe_mlx.chat --model demo --json
"""
HELP = """\
/stats        the last answer's figures: speed, hits, GB a token, memory, context
/system TEXT  set the system message; without TEXT there is none
/save FILE    write the conversation as JSON
/load FILE    go on from a conversation that was saved
/reset        forget the conversation, but for the system message
/help         this list
/exit         leave; Ctrl-D does too
A message that begins with a slash: write two. Ctrl-C stops an answer, once more leaves."""
PROMPT = "> "
EXCLUDE = (("draft_model", "kv_bits"),)  # mlx-lm keeps no quantized cache of a pair from one answer to the next
MOST_BYTES = 64 << 20  # of a saved conversation: more text than any context holds


@dataclass
class Session:
    """A conversation at the terminal. answer: options of `Conversation.ask`; beside: bytes of the budget that the
    draft model takes; limit: tokens that the model was made for; live: a person sits there; stats: figures of the last
    answer; failed: something was refused.
    """

    conversation: "Conversation"
    model: Any
    answer: dict[str, Any]
    args: argparse.Namespace
    beside: int
    limit: int
    live: bool
    stats: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = terminal.parser("chat", f"{DESCRIPTION}\n\nin the chat:\n{HELP}", EXAMPLES)
    terminal.add_model(p)
    options.add_template(p)
    options.add_length(p)
    options.add_sampling(p)
    options.add_memory(p)
    options.add_draft(p)
    options.add_streaming(p)
    terminal.add_quiet(p)
    terminal.add_json(p)
    p.set_defaults(prompt=None, prompt_cache_file=None)  # of `generate`
    p.add_argument("-m", dest="max_tokens", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    options.check(args)
    for one, other in EXCLUDE:
        if getattr(args, one) is not None and getattr(args, other) is not None:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in (one, other))
            raise ValueError(f"[options] {flags} exclude each other in a chat; leave one of them out.")
    _require_text(args.system_prompt or "", "--system-prompt")
    live = not args.json and all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    directory = locate.model_directory(args.model, args.quiet or args.json)

    from tiny_qmoe_mlx import blas

    session = _open(directory, args, live)
    try:
        with blas.shared_machine():
            _talk(session) if live else _read(session)
    finally:
        session.model.close()  # which writes the profile, also after Ctrl-C
    return terminal.FAILED if session.failed and not live else 0


def _open(directory: Path, args: argparse.Namespace, live: bool) -> Session:
    """Load the model for a chat; what can be refused is refused before."""
    from tiny_qmoe_mlx import budget, footprint, models
    from tiny_qmoe_mlx import generate_setup as setup
    from tiny_qmoe_mlx.conversation import Conversation
    from tiny_qmoe_mlx.masked_spans import refuse
    from tiny_qmoe_mlx.original import checkpoint

    refuse(checkpoint.read_config(directory), "chat")
    tokenizer = models.open_tokenizer(directory)
    setup.check_tokens(directory, tokenizer, args)
    provided, most = setup.chat_context(directory, args)
    draft, beside = setup.open_draft(directory, tokenizer, provided, args)
    shape = {"draft": draft, "max_kv_size": args.max_kv_size, "template": args.chat_template_config}
    Conversation(None, tokenizer, most, args.system_prompt, **shape)  # refuses what there is to refuse
    memory = budget.parse_memory(args.memory) - beside
    with terminal.Bars(args.quiet or args.json) as bars:
        model, _ = models.load(directory, memory, provided, bars, tokenizer, options.streaming_of(args))
    try:
        setup.check_caches(model, None, args)
        conversation = Conversation(model, tokenizer, most, args.system_prompt, **shape)
        answer = decoding(tokenizer, draft, None, args)
    except BaseException:
        model.close()
        raise
    for name in ("prompt_cache", "draft_model", "max_kv_size"):  # the conversation's own
        answer.pop(name, None)
    limit = footprint.longest_context(checkpoint.read_config(directory))
    return Session(conversation, model, answer, args, beside, limit, live)


# ---- where the lines come from


def _talk(session: Session) -> None:
    """Prompt until the person leaves. Ctrl-C stops an answer; a second one, or Ctrl-D, leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited, and called back)
    print("/help lists the commands, Ctrl-D leaves.")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    warned = False
    try:
        while True:
            try:
                line = input(PROMPT)
            except KeyboardInterrupt:
                if warned:
                    raise
                warned = True
                print("\nCtrl-C again, or Ctrl-D, leaves.")
                continue
            with _interrupt() as stopped:
                if not _handle(session, line, stopped):
                    return
            warned = stopped()
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; the second time it raises KeyboardInterrupt, as it does outside."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _read(session: Session) -> None:
    """Take every line of standard input.

    Raises:
        ValueError: it is closed, no UTF-8, or a line has no end.
    """
    if sys.stdin is None:
        raise ValueError("[chat] standard input should be open, it is closed; give messages, one a line.")
    most = options.MOST_TEXT
    while True:
        try:
            line = sys.stdin.readline(most + 1)
        except UnicodeError as error:
            raise ValueError(f"[chat] standard input should be UTF-8 text and is not: {error}.") from error
        if len(line) > most:
            raise ValueError(f"[chat] a line of standard input should have at most {most} characters, one has more.")
        if not line or not _handle(session, line, lambda: False):
            return


# ---- what a line does


def _handle(session: Session, line: str, stopped: Callable[[], bool]) -> bool:
    """Do what a line says; False to leave. What is refused is said, and the chat goes on."""
    line = line.strip()
    command = line.startswith("/") and not line.startswith("//")
    # where nobody could do anything about it, an answer that cannot be read from disk or written ends all
    bearable = (ValueError, OSError, MemoryError) if command or session.live else (ValueError,)
    try:
        _require_text(line, "a message")
        if command:
            return _obey(session, *line.partition(" ")[::2])
        if line:
            _answer(session, line.removeprefix("/") if line.startswith("//") else line, stopped)
    except bearable as error:
        session.failed = True
        _complain(session, terminal.sentence(error))
    return True


def _obey(session: Session, name: str, rest: str) -> bool:
    """Do what a command says; False to leave."""
    if name == "/exit":
        return False
    if name not in COMMANDS:
        raise ValueError(f"[chat] {name} should be one of {', '.join((*COMMANDS, '/exit'))}; see /help.")
    value, text = COMMANDS[name](session, rest.strip())
    if session.args.json:
        terminal.print_json({"command": name, **value})
    elif session.live or name in SPOKEN:
        print(text, flush=True)
    return True


def _require_text(text: str, what: str) -> None:
    try:
        text.encode()  # bytes that were no UTF-8 came in as lone surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise ValueError(f"[chat] {what} should be UTF-8 text and is not: {error}.") from error


def _complain(session: Session, sentence: str) -> None:
    if session.args.json:
        terminal.print_json({"error": sentence})
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)


def _answer(session: Session, text: str, stopped: Callable[[], bool]) -> None:
    """Put a question and write the answer as it comes."""
    from tiny_qmoe_mlx.conversation import ContextFull

    said: list[str] = []

    def say(piece: str) -> None:
        said.append(piece)
        write(piece)

    since = session.model.tiny_qmoe.stats()
    responses = session.conversation.ask(text, stopped=stopped, **session.answer)
    try:
        found = measure(session.model, responses, None if session.args.json else say, since)
    except ContextFull as error:
        raise ValueError(f"[chat] {_full(session)}") from error
    finally:
        if said:
            print(flush=True)
    if found:
        session.stats = _complete(session, found)
    if session.args.json:
        terminal.print_json(session.stats)
    elif session.live and (note := _note(session, found, stopped())):
        print(note)


def _complete(session: Session, found: dict[str, Any]) -> dict[str, Any]:
    """An answer's figures with the whole budget, and where the context stands."""
    conversation = session.conversation
    found["budget_bytes"] += session.beside
    if session.args.draft_model is None:
        del found["draft_tokens"]
    return {**found, "context_tokens": len(conversation.tokens), "context": conversation.context}


def _note(session: Session, found: dict[str, Any], stopped: bool) -> str:
    """Why an answer ended before its end, and what to do; nothing where it did not."""
    if stopped:
        return "(stopped)"
    if found["finish_reason"] != "length":
        return ""
    if found["generation_tokens"] < session.args.max_tokens:
        return f"({_full(session)})"
    return f"(cut at --max-tokens {session.args.max_tokens}; say `go on`, or start with more)"


def _full(session: Session) -> str:
    context = session.conversation.context
    more = ", and a larger --context has room for more" if context < session.limit else ""
    return f"the context of {context} tokens is full; /save FILE keeps the conversation, /reset begins anew{more}"


# ---- commands: (session, what follows the name) -> (for --json, for a person)


def _stats(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    if not session.stats:
        raise ValueError("[chat] /stats needs an answer to tell of; say something first.")
    used, most = len(session.conversation.tokens), session.conversation.context
    return session.stats, f"{summary(session.stats)}; context {used} of {most} tokens"


def _system(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    session.conversation.system = rest or None
    return {"system": rest}, "system message set" if rest else "no system message"


def _reset(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    session.conversation.reset()
    return {}, "forgotten"


def _help(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    return {"help": HELP}, HELP


def _save(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    from tiny_qmoe_mlx.staging import write_named

    file, messages = _file("/save", rest), session.conversation.messages
    if file.exists():
        read_messages(file)  # only a conversation is ever replaced
    write_named(file, {"model": session.args.model, "messages": messages})
    return {"file": str(file), "messages": len(messages)}, f"{len(messages)} messages written to {file}"


def _load(session: Session, rest: str) -> tuple[dict[str, Any], str]:
    messages = read_messages(_file("/load", rest))
    session.conversation.load(messages)
    return {"messages": len(messages)}, f"{len(messages)} messages; the next answer reads them first"


COMMANDS: dict[str, Callable[[Session, str], tuple[dict[str, Any], str]]] = {
    "/stats": _stats,
    "/system": _system,
    "/save": _save,
    "/load": _load,
    "/reset": _reset,
    "/help": _help,
}
SPOKEN = ("/stats", "/help")  # whose text is the result, also where nobody sits at a terminal


def _file(command: str, name: str) -> Path:
    if not name or "\0" in name:
        raise ValueError(f"[chat] {command} should be followed by a file's name.")
    return paths.expanded(name)


def read_messages(file: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    from tiny_qmoe_mlx.conversation import ROLES
    from tiny_qmoe_mlx.disk_reads import read_bytes

    if not file.is_file():
        why = "it is none" if file.exists() else "there is no such file"
        raise ValueError(f"[chat] {file} should be the file of a conversation, {why}.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"[chat] {file} should be a conversation of at most {MOST_BYTES} bytes, it is larger.")
    try:
        messages = json.loads(read_bytes(file))["messages"]
        found = [{"role": m["role"], "content": m["content"]} for m in messages]
        if not all(m["role"] in ROLES and isinstance(m["content"], str) for m in found):
            raise ValueError(f"roles are {', '.join(ROLES)}, and contents are texts")
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"[chat] {file} should be a conversation that /save wrote, it is not: {reason}") from error
    return found


if __name__ == "__main__":
    sys.exit(terminal.run(main))
