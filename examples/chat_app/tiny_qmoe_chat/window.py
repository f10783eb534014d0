"""The chat window: a transcript, a box to write in, Send and Stop, and figures in the status bar.

Nothing here waits for the model: questions go to the worker's thread by signals, and answers come back by signals.
"""

from PySide6.QtCore import Qt, QThread, Signal, Slot
from PySide6.QtGui import QAction, QCloseEvent, QKeyEvent, QKeySequence, QPalette, QTextBlockFormat, QTextCursor
from PySide6.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QTextEdit,
    QVBoxLayout,
    QWidget,
)

from tiny_qmoe_chat.worker import Worker

CHATS = "Conversations (*.json)"
REASONS = {"stopped": "stopped", "length": "cut at the most tokens"}
STACK_BYTES = 16 << 20  # macOS gives threads 512 KB, and imports and chat templates go deep
SHADE = 40  # of 255, behind what the person said: readable in light and dark


class Box(QPlainTextEdit):
    """Where a message is written. returned: emitted by Return, which with Shift begins a line."""

    returned = Signal()

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802 (Qt's name)
        """Return sends; every other key writes."""
        shift = event.modifiers() & Qt.KeyboardModifier.ShiftModifier
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and not shift:
            self.returned.emit()
        else:
            super().keyPressEvent(event)


class Window(QMainWindow):
    """A window that talks with one model. idle: emitted whenever an answer has ended, or could not be given."""

    idle = Signal()
    asked = Signal(str)
    forgot = Signal()
    save_asked = Signal(str)
    load_asked = Signal(str)
    leaving = Signal()

    def __init__(self, worker: Worker):
        super().__init__()
        self.setWindowTitle("tiny-qmoe")
        self.resize(720, 640)
        self._build()
        self._menu()
        self.worker, self._thread = worker, QThread(self)
        self._thread.setStackSize(STACK_BYTES)
        worker.moveToThread(self._thread)
        self._connect()
        self._dropped = False  # whether pieces still under way belong to a conversation that was left
        self._set_busy(True)
        self._thread.start()

    # ---- what is seen

    def _build(self) -> None:
        self.transcript = QTextEdit(readOnly=True, accessibleName="Conversation")
        self.transcript.document().setDocumentMargin(12)
        self.box = Box(placeholderText="Write a message", accessibleName="Message")
        self.box.setFixedHeight(72)
        self.box.setTabChangesFocus(True)
        self.box.returned.connect(self.ask)
        self.send = QPushButton("Send", clicked=self.ask)
        self.stop = QPushButton("Stop", clicked=self._stop, shortcut=Qt.Key.Key_Escape)
        buttons, row, column = QVBoxLayout(), QHBoxLayout(), QVBoxLayout()
        for button in (self.send, self.stop):
            buttons.addWidget(button)
        row.addWidget(self.box)
        row.addLayout(buttons)
        column.addWidget(self.transcript)
        column.addLayout(row)
        middle = QWidget()
        middle.setLayout(column)
        self.setCentralWidget(middle)
        self.state, self.figures, self.bar = QLabel("loading"), QLabel(), QProgressBar()
        self.bar.setMaximumWidth(180)
        self.bar.hide()
        self.statusBar().addWidget(self.state, 1)
        self.statusBar().addPermanentWidget(self.bar)
        self.statusBar().addPermanentWidget(self.figures)

    def _menu(self) -> None:
        menu = self.menuBar().addMenu("&Chat")
        for text, keys, do in (
            ("&New", QKeySequence.StandardKey.New, self._new),
            ("&Open…", QKeySequence.StandardKey.Open, self._open),
            ("&Save…", QKeySequence.StandardKey.Save, self._save),
            ("&Quit", QKeySequence.StandardKey.Quit, self.close),
        ):
            action = QAction(text, self, triggered=lambda checked=False, do=do: do())
            action.setShortcut(keys)
            menu.addAction(action)

    def _connect(self) -> None:
        worker = self.worker
        self._thread.started.connect(worker.open)
        for ours, theirs in (
            (self.asked, worker.ask),
            (self.forgot, worker.reset),
            (self.save_asked, worker.save),
            (self.load_asked, worker.load),
            (self.leaving, worker.close),
        ):
            ours.connect(theirs)
        for theirs, ours in (
            (worker.progressed, self._show_progress),
            (worker.opened, self._show_opened),
            (worker.wrote, self._write_piece),
            (worker.measured, self.figures.setText),
            (worker.answered, self._show_answered),
            (worker.replaced, self._show_messages),
            (worker.failed, self._show_failed),
        ):
            theirs.connect(ours)

    def _set_busy(self, busy: bool) -> None:
        self.busy = busy
        self.send.setEnabled(not busy)
        self.stop.setEnabled(busy)

    # ---- what a person does

    @Slot()
    def ask(self) -> None:
        """Send what the box holds; nothing while an answer is being written."""
        text = self.box.toPlainText().strip()
        if self.busy or not text:
            return
        self.box.clear()
        self._begin("user")
        self._write(text)
        self._begin("assistant")
        self._set_busy(True)
        self.state.setText("writing")
        self.worker.go()
        self.asked.emit(text)

    def _stop(self) -> None:
        self.state.setText("stopping")
        self.worker.stop()

    def _new(self) -> None:
        self._dropped = self.busy
        self.worker.stop()
        self.transcript.clear()
        self.forgot.emit()

    def _open(self) -> None:
        file, _ = QFileDialog.getOpenFileName(self, "Open a conversation", "", CHATS)
        if file:
            self.load_asked.emit(file)

    def _save(self) -> None:
        file, _ = QFileDialog.getSaveFileName(self, "Save the conversation", "chat.json", CHATS)
        if file:
            self.save_asked.emit(file)

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 (Qt's name)
        """Stop, and wait until the worker has freed the model and ended its thread."""
        self.worker.stop()
        self.leaving.emit()
        self._thread.wait()
        super().closeEvent(event)

    # ---- what the worker tells

    @Slot(str, int, int)
    def _show_progress(self, what: str, done: int, total: int) -> None:
        self.state.setText(what)
        self.bar.setVisible(done < total)
        self.bar.setMaximum(total)
        self.bar.setValue(done)

    @Slot(str, str)
    def _show_opened(self, name: str, mode: str) -> None:
        self.setWindowTitle(f"{name} - tiny-qmoe")
        self.state.setText(f"experts {mode}")
        self.bar.hide()
        self._set_busy(False)
        self.box.setFocus()
        self.idle.emit()

    @Slot(str)
    def _write_piece(self, text: str) -> None:
        if not self._dropped:
            self._write(text)

    @Slot(str)
    def _show_answered(self, reason: str) -> None:
        self.state.setText(REASONS.get(reason, "ready") if reason else self.state.text())
        self._dropped = False
        self._set_busy(False)
        self.box.setFocus()
        self.idle.emit()

    @Slot(str)
    def _show_failed(self, sentence: str) -> None:
        self._begin("error")
        self._write(sentence)
        self.state.setText("failed")
        self.idle.emit()

    @Slot(list)
    def _show_messages(self, messages: list[dict[str, str]]) -> None:
        self.transcript.clear()
        for message in messages:
            self._begin(message["role"])
            self._write(message["content"])

    # ---- the transcript

    def _begin(self, role: str) -> None:
        """A new paragraph; what the person said is shaded, and errors are in the palette's link colour."""
        cursor = self.transcript.textCursor()
        cursor.movePosition(QTextCursor.MoveOperation.End)
        shape = QTextBlockFormat()
        shape.setBottomMargin(8)
        palette = self.palette()
        if role == "user":
            shade = palette.color(QPalette.ColorRole.Highlight)
            shade.setAlpha(SHADE)
            shape.setBackground(shade)
        if self.transcript.document().isEmpty():
            cursor.setBlockFormat(shape)
        else:
            cursor.insertBlock(shape)
        self.transcript.setTextCursor(cursor)
        self.transcript.setTextColor(
            palette.color(QPalette.ColorRole.Link if role == "error" else QPalette.ColorRole.Text)
        )

    @Slot(str)
    def _write(self, text: str) -> None:
        """Add to the last paragraph, and stay at its end unless the person has scrolled up."""
        scroll = self.transcript.verticalScrollBar()
        at_end = scroll.value() >= scroll.maximum() - 4
        cursor = self.transcript.textCursor()
        cursor.movePosition(QTextCursor.MoveOperation.End)
        cursor.insertText(text, self.transcript.currentCharFormat())
        if at_end:
            scroll.setValue(scroll.maximum())
