"""The examples, as their READMEs print them, with a tiny model under the names; and the window, button by button."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import chat_model
import pytest
from commands import environment
from server_process import CHAT, events, serving

from tiny_qmoe_mlx import native

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PARAMETERS = "SOURCE = {source!r}\nRATES = (1.0, 3.0)\nSEQUENCES, SEQUENCE_TOKENS = 8, 64\nTOKENS, WINDOW = 256, 64"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return chat_model.make(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def place(converted, tmp_path):
    """A copy of the checkout's examples beside a model."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "qwen3-2bit").symlink_to(converted)
    return tmp_path


def printed(page: Path, words: str) -> str:
    """The one command of a page that has these words."""
    text = page.read_text().replace("\\\n", " ")
    (line,) = [line.strip() for line in re.findall(r"^ {4}(\S.*)$", text, re.M) if words in line]
    return line


def run(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a printed command with this interpreter."""
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    assert words[0] == "python", line
    command = [sys.executable, *words[1:]]
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def test_ten_lines(place):
    done = run(printed(place / "examples/README.md", "ten_lines.py"), place)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    text, figures = done.stdout.rstrip("\n").rsplit("\n", 1)
    assert len(text) > 50 and "'mode': 'resident'" in figures
    code = (place / "examples/ten_lines.py").read_text().split('"""')[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) == 10


@pytest.mark.slow
def test_a_terminal_is_recorded(place, converted):
    line = printed(place / "examples/README.md", "record_terminal.py").replace("--model demo", f"--model {converted}")
    done = run(f"{line} --max-tokens 12", place)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = (place / "docs/terminal.txt").read_text()
    assert not re.search(r"[\x1b\r]|Traceback|error", found), found
    first, second = found.split("$ python -m tiny_qmoe_mlx.")[1:]
    assert first.startswith("generate --model ") and second.startswith("chat --model ")
    for part in (first, second):
        assert re.search(
            r"prompt tokens at .* first after .* tokens at .* GB a token in decode; peak memory \d+ MB", part
        )
    assert second.count("\n> ") == 5 and "\n> /save chat.json\n4 messages written to chat.json\n" in second


# ---- the notebook


@pytest.mark.slow
def test_notebook(converted, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "rate_quality.ipynb", 4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = PARAMETERS.format(source=str(converted.parent / "hf"))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    client.NotebookClient(notebook, timeout=300).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.text for out in outputs if out.output_type == "stream").partition("perplexity\n")[2]
    low, high = ([float(w) for w in line.split() if re.fullmatch(r"[\d.]+", w)] for line in text.splitlines()[:2])
    assert 0.9 < low[0] <= 1 and 2.9 < high[0] <= 3  # small records have no room for the last percents
    assert low[1] < high[1] and low[2] > high[2] > 0 and low[3] < high[3]  # bytes, KL, same best token
    assert any("image/png" in out.get("data", {}) for out in outputs)


def test_the_stored_notebook_was_run_and_names_no_machine():
    cells = json.loads((EXAMPLES / "rate_quality.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [out["output_type"] for cell in code for out in cell["outputs"]]
    assert "error" not in kinds and {"stream", "display_data"} <= set(kinds)
    text = json.dumps([[c["source"], [o.get("text") for o in c.get("outputs", [])]] for c in cells])
    assert not re.search(r"/(home|root|tmp|Users|work|opt|usr)/", text)


# ---- the window


@pytest.fixture(scope="module")
def qt():
    """PySide6 and the application; the window's package can be imported."""
    try:
        import PySide6
        from PySide6.QtWidgets import QApplication
    except ImportError as error:  # also where libraries of the system that Qt needs are missing
        pytest.skip(str(error))
    if PySide6.__version__ == "6.12.0" and sys.version_info < (3, 12):
        pytest.skip("this PySide6 loses a reference to True with every signal")
    sys.path.insert(0, str(EXAMPLES / "chat_app"))
    yield QApplication.instance() or QApplication([])
    sys.path.remove(str(EXAMPLES / "chat_app"))


class Shown:
    """A window, and a way to wait for it."""

    def __init__(self, model, max_tokens=12):
        from tiny_qmoe_chat.window import Window
        from tiny_qmoe_chat.worker import Worker

        self.window = Window(Worker(str(model), "auto", 900, max_tokens))
        self.window.show()

    @property
    def text(self):
        return self.window.transcript.toPlainText()

    def until(self, signal, do=lambda: None):
        """Do something and let the window live until a signal comes; what came with it."""
        from PySide6.QtCore import QEventLoop, QObject, QTimer

        class Receiver(QObject):  # of this thread, so that it is told after the window
            def take(self, *values):
                came.append(values)
                loop.quit()

        loop, came, timer, receiver = QEventLoop(), [], QTimer(singleShot=True, interval=60_000), Receiver()
        signal.connect(receiver.take)
        timer.timeout.connect(loop.quit)
        timer.start()
        do()
        loop.exec()
        signal.disconnect(receiver.take)
        assert came, f"no signal within a minute; {self.window.state.text()}: {self.text}"
        return came[0]

    def ask(self, text):
        self.window.box.setPlainText(text)
        self.until(self.window.idle, self.window.send.click)


@pytest.fixture
def open_window(qt):
    opened = []

    def show(*options):
        opened.append(Shown(*options))
        return opened[-1]

    yield show
    for one in opened:
        one.window.close()


def test_a_question_is_answered_in_the_window(open_window, converted):
    shown = open_window(converted)
    assert not shown.window.send.isEnabled() and shown.window.state.text() == "loading"
    shown.until(shown.window.idle)
    assert shown.window.send.isEnabled() and not shown.window.stop.isEnabled()
    assert shown.window.state.text() == "experts resident" and shown.window.windowTitle() == "model - tiny-qmoe"
    shown.ask("why")
    assert shown.text.startswith("why\n") and len(shown.text) > len("why\n") + 3
    figures = r"[\d.]+ tokens/s   100\.0 % hits   0\.0000 GB a token   \d+ MB of \d+ MB"
    assert re.fullmatch(figures, shown.window.figures.text()), shown.window.figures.text()
    assert shown.window.state.text() == "cut at the most tokens" and shown.window.box.toPlainText() == ""
    shown.ask("and how")
    assert "\nand how\n" in shown.text
    assert [m["role"] for m in shown.window.worker._talk.messages] == ["user", "assistant"] * 2


def test_the_window_lives_while_an_answer_is_written_and_stops_it(open_window, converted):
    from PySide6.QtCore import QTimer

    shown, ticks = open_window(converted, 800), []
    shown.until(shown.window.idle)
    shown.window.box.setPlainText("why")
    shown.until(shown.window.worker.wrote, shown.window.send.click)
    assert not shown.window.send.isEnabled() and shown.window.stop.isEnabled()
    shown.window.box.setPlainText("not yet")
    shown.window.ask()
    assert shown.window.box.toPlainText() == "not yet"  # one at a time
    timer = QTimer(interval=5)

    def tick():
        ticks.append(0)
        if len(ticks) >= 5 and shown.text.strip() != "why":  # some of the answer is there
            shown.window.stop.click()

    timer.timeout.connect(tick)
    timer.start()
    assert shown.until(shown.window.worker.answered) == ("stopped",)
    timer.stop()
    assert len(ticks) >= 5 and shown.window.state.text() == "stopped" and shown.window.send.isEnabled()
    assert 0 < len(shown.window.worker._talk.messages[1]["content"]) < 800


@pytest.mark.slow
def test_a_new_conversation_ends_the_answer_of_the_old_one(open_window, converted):
    shown = open_window(converted, 800)
    shown.until(shown.window.idle)
    shown.window.box.setPlainText("why")
    shown.until(shown.window.worker.wrote, shown.window.send.click)
    shown.until(shown.window.idle, shown.window._new)
    assert shown.text == ""
    shown.ask("how")
    assert shown.text.startswith("how\n") and shown.window.worker._talk.messages[0]["content"] == "how"


def test_keys(open_window, converted):
    from PySide6.QtCore import Qt
    from PySide6.QtTest import QTest

    shown = open_window(converted)
    shown.until(shown.window.idle)
    box = shown.window.box
    QTest.keyClicks(box, "one")
    QTest.keyClick(box, Qt.Key.Key_Return, Qt.KeyboardModifier.ShiftModifier)
    QTest.keyClicks(box, "two")
    assert box.toPlainText() == "one\ntwo"
    shown.until(shown.window.idle, lambda: QTest.keyClick(box, Qt.Key.Key_Return))
    assert shown.text.startswith("one\ntwo\n")


def test_conversations_are_saved_opened_and_begun_anew(open_window, converted, tmp_path, monkeypatch):
    from PySide6.QtWidgets import QFileDialog

    shown, file = open_window(converted), tmp_path / "chat.json"
    shown.until(shown.window.idle)
    shown.ask("why")
    before = shown.text
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(file), ""))
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: (str(file), ""))
    shown.window._save()
    shown.window._new()
    assert shown.text == ""
    shown.until(shown.window.worker.replaced, shown.window._open)
    assert shown.text == before and len(json.loads(file.read_text())["messages"]) == 2
    file.write_text("nonsense")
    (sentence,) = shown.until(shown.window.worker.failed, shown.window._open)
    assert "should be a conversation that /save wrote" in sentence and sentence in shown.text
    assert shown.window.worker._talk.messages[0]["content"] == "why" and shown.window.send.isEnabled()


def test_what_cannot_be_opened_or_answered_is_a_sentence_in_the_window(open_window, converted, tmp_path):
    shown = open_window(tmp_path / "nowhere")
    shown.until(shown.window.idle)
    assert "should be a directory with config.json" in shown.text
    assert not shown.window.send.isEnabled()
    other = open_window(converted)
    other.until(other.window.idle)
    other.window.box.setPlainText("x" * 1000)
    assert other.until(other.window.worker.answered, other.window.send.click) == ("",)
    assert "the context of 900 tokens is full" in other.text and other.window.send.isEnabled()


def test_closing_ends_an_answer_and_the_thread(open_window, converted):
    shown = open_window(converted, 800)
    shown.until(shown.window.idle)
    shown.window.box.setPlainText("why")
    shown.until(shown.window.worker.wrote, shown.window.send.click)
    shown.window.close()
    assert shown.window._thread.isFinished() and shown.window.worker._model is None


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--memory 2GB", "--screenshot"])
def test_the_window_as_its_readme_starts_it(qt, place, converted, words):
    line = printed(place / "examples/chat_app/README.md", words).replace("--model demo", f"--model {converted}")
    line = re.sub("--max-tokens 200", "--max-tokens 12", line)
    if words != "--screenshot":  # or it would stay open
        line += " --ask hello --max-tokens 12 --screenshot ../../docs/images/app-window.png"
    done = run(line, place / "examples/chat_app", QT_QPA_PLATFORM="offscreen")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    from PySide6.QtGui import QImage

    image = QImage(str(place / "docs/images/app-window.png"))
    assert (image.width(), image.height()) == (720, 640)
    colours = {image.pixel(x, y) for x in range(0, 720, 3) for y in range(0, 640, 3)}
    assert len(colours) > 8  # letters were drawn


# ---- the Swift client: what goes over the wire


def fields(source: str, name: str) -> set[str]:
    """The stored properties of a struct in Client.swift, as JSON names them."""
    body = re.search(rf"^( *)struct {name}: \w+ \{{\n(.*?)\n\1\}}", source, re.M | re.S)[2]
    own = re.sub(r"^( *)struct .*?\n\1\}", "", body, flags=re.M | re.S)  # without those inside it
    names = re.findall(r"^ *let (\w+):", own, re.M)
    return {re.sub("[A-Z]", lambda c: f"_{c[0].lower()}", n) for n in names}


def test_the_server_takes_what_swift_sends_and_sends_what_it_reads(converted):
    source = (EXAMPLES / "swift_client/Sources/TinyQmoeClient/Client.swift").read_text()
    question = {"role": "user", "content": "why"}
    body = {"messages": [question], "max_tokens": 8, "temperature": 0.0, "stream": True}
    assert fields(source, "Body") == set(body) and set(question) == {"role", "content"}
    with serving(converted) as server:
        *found, done = events(server.open(CHAT, body))
        assert done == "[DONE]" and len(found) > 1
        for event in found:
            assert fields(source, "Event") <= set(event)
            for choice in event["choices"]:
                assert fields(source, "Choice") <= set(choice)
                assert isinstance(choice["delta"].get("content"), str | None)
        assert fields(source, "Delta") == {"content"} and "".join(
            e["choices"][0]["delta"].get("content") or "" for e in found if e["choices"]
        )
        status, error = server.refused(CHAT, {**body, "max_tokens": -1})
        assert status == 400 and fields(source, "Refusal") == {"error"} and fields(source, "Reason") <= set(error)
