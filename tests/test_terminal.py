"""terminal.py: every failure is one sentence on stderr with the right exit status, and stdout stays clean."""

import ast
import errno
import os
import signal
import subprocess
import sys

import pytest

from tiny_qmoe_mlx import terminal
from tiny_qmoe_mlx.errors import BudgetError, FormatError

INTERRUPTED = b"error: interrupted\n"


def fail(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (
            FormatError("[config.json] bits should be 2,\n  received 3."),
            1,
            "[config.json] bits should be 2, received 3.",
        ),
        (BudgetError("[memory] too small"), 1, "[memory] too small"),
        (ValueError(""), 1, "ValueError"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a b"), 1, "[/a b] No such file or directory"),
        (OSError(errno.ENOSPC, "[out] the disk is full"), 1, "[out] the disk is full"),
        (OSError("[hub] no answer"), 1, "[hub] no answer"),
        (ModuleNotFoundError("No module named 'gguf'"), 1, "No module named 'gguf'"),
        (MemoryError(), 1, "the machine's memory is used up; give a smaller --memory or close other programs"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_sentence(capsys, error, status, text):
    assert terminal.run(fail(error), []) == status
    assert capsys.readouterr() == ("", f"error: {text}\n")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="why"):
        terminal.run(fail(ValueError("why")), ["--debug"])


def test_a_bug_is_not_hidden():
    with pytest.raises(KeyError):
        terminal.run(fail(KeyError("key")), [])


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_main_returns(returned, status):
    assert terminal.run(lambda argv: returned, []) == status


def test_wrong_arguments_are_one_sentence(capsys):
    parser = terminal.parser("verify", "Checks.", "  an example")
    terminal.add_model(parser)
    for argv, text in (
        ([], "error: the following arguments are required: --model; --help lists all options\n"),
        (["--mod", "x"], "error: the following arguments are required: --model; --help lists all options\n"),
        (["--model", "x", "--nothing"], "error: unrecognized arguments: --nothing; --help lists all options\n"),
    ):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(argv)
        assert error.value.code == terminal.USAGE
        assert capsys.readouterr() == ("", text)


def test_help_shows_the_examples_as_they_are():
    parser = terminal.parser("verify", "Checks.", "\n  first line\n    second line\n")
    text = parser.format_help()
    assert "python -m tiny_qmoe_mlx.verify" in text and text.endswith("examples:\n  first line\n    second line\n")


def test_no_bar_where_stderr_is_no_terminal(capsys):
    assert list(terminal.progress(range(3), description="reading")) == [0, 1, 2]
    with terminal.Bars() as bars:
        bars("one", 1, 2)
        bars("two", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_no_bar_when_asked_to_be_quiet(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(terminal.progress(range(3), quiet=True))
    assert capsys.readouterr() == ("", "")
    list(terminal.progress(range(3), description="reading"))
    out, err = capsys.readouterr()
    assert out == "" and "reading: 100%" in err


def test_a_bar_tells_the_time_left_from_what_came_since_it_began(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.Bars() as bars:
        bars("converting", 90, 100)  # as a conversion that goes on does
        left = bars._bar.format_meter(95, 100, 10, initial=bars._bar.initial)
        bars("fetching", 500_000_000, 2_000_000_000)
    assert "00:10<00:10" in left and "0.50" not in left  # 5 in 10 seconds, and 5 to go
    assert "fetching:  25%" in (err := capsys.readouterr().err) and "500M/2.00G" in err


def run_script(body: str, **options) -> subprocess.Popen:
    code = (
        f"import sys, time\nfrom tiny_qmoe_mlx import terminal\ndef main(argv):\n{body}\nsys.exit(terminal.run(main))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("sent", "status", "text"), [(signal.SIGINT, 130, b"error: interrupted\n"), (signal.SIGTERM, 143, b"")]
)
def test_signals_unwind(interruptible, sent, status, text):
    body = "    try: print('ready', flush=True); time.sleep(60)\n    finally: print('cleaned', flush=True)"
    child = run_script(body)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, sent)
    assert child.communicate(timeout=60) == (b"cleaned\n", text) and child.returncode == status


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["terminal.check_stopped()", "terminal.Bars()('x', 0, 1)", "Bar()"])
def test_a_signal_that_a_library_swallows_is_raised_again(interruptible, sent, status, where):
    """A server took no notice of Ctrl-C where it came while a library loaded."""
    body = f"""
    import os
    def Bar():
        with terminal.Bars(): pass
    try: os.kill(os.getpid(), {int(sent)}); time.sleep(60)
    except BaseException: pass
    {where}
    print('went on')"""
    child = run_script(body)
    assert child.communicate(timeout=60)[0] == b"" and child.returncode == status


@pytest.mark.parametrize(("sent", "status", "text"), [(signal.SIGINT, 130, b""), (signal.SIGTERM, 143, b"")])
def test_a_signal_on_the_way_out_ends_the_process_without_a_traceback(interruptible, sent, status, text):
    """Ctrl-C a second time, while Python waits for threads at its end, printed what it broke into."""
    child = run_script(
        f"    import atexit, os; atexit.register(lambda: (os.kill(os.getpid(), {int(sent)}), time.sleep(60)))"
    )
    assert child.communicate(timeout=60) == (b"", text) and child.returncode == status


@pytest.mark.parametrize(("sent", "status", "text"), [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, b"")])
def test_a_second_signal_ends_at_once_what_the_first_lets_end(interruptible, sent, status, text):
    body = "    try: print('ready', flush=True); time.sleep(60)\n    finally: print('ends', flush=True); time.sleep(60)"
    child = run_script(body)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    os.kill(child.pid, sent)
    assert child.stdout.readline() == b"ends\n"
    os.kill(child.pid, sent)
    assert child.communicate(timeout=60) == (b"", text) and child.returncode == status


EVERY_MOMENT = """
import os, signal, sys
from tiny_qmoe_mlx import terminal

def main(argv):
    global begun
    begun = True
    {main}

def look(frame, event, argument):  # at each instruction from the moment that main begins
    global begun, left
    if frame.f_code.co_filename != terminal.__file__ and frame.f_code is not main.__code__:
        return None
    frame.f_trace_opcodes = True
    if begun:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.{signal})
    return look

for moment in range(1, 10000):
    begun, left, (ours, theirs) = False, moment, os.pipe()
    child = os.fork()
    if not child:
        os.dup2(theirs, 2), os.close(theirs), os.close(ours)
        sys.stderr = open(2, "w", closefd=False)
        sys.settrace(look)
        status = terminal.run(main)
        sys.settrace(None)
        os._exit(99 if left > 0 else status)
    os.close(theirs)
    said = open(ours, "rb").read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 99:
        break
    print(status, said)
"""


@pytest.mark.parametrize(
    ("number", "main", "ends"),
    [
        ("SIGINT", "return 0", {(130, INTERRUPTED), (0, b""), (130, b"")}),
        ("SIGINT", "raise ValueError('wrong')", {(130, INTERRUPTED), (1, b"error: wrong\n"), (130, b"error: wrong\n")}),
        ("SIGINT", "os.kill(os.getpid(), signal.SIGINT)", {(130, INTERRUPTED)}),
        ("SIGTERM", "return 0", {(143, b""), (0, b"")}),
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGINT)", {(143, b""), (130, INTERRUPTED), (143, INTERRUPTED)}),
    ],
)
def test_a_signal_at_any_instruction_of_the_end(interruptible, number, main, ends):
    """Three of two hundred runs that were sent two Ctrl-C printed a traceback."""
    script = EVERY_MOMENT.format(signal=number, main=main)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert child.stderr == b""
    found = [line.split(b" ", 1) for line in child.stdout.splitlines()]
    assert len(found) > 20
    assert {(int(status), ast.literal_eval(said.decode())) for status, said in found} <= ends


def test_a_reader_that_leaves_is_no_error():
    child = run_script("    print('x' * 70000 + '\\n'); sys.stdin.read(); print('y' * 1000000)", stdin=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None and child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == b"" and child.wait(timeout=60) == 1
    child.stderr.close()
