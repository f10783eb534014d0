"""`python -m tiny_qmoe_chat --model DIR`: open the window. Without --model it asks for a directory."""

import argparse
import sys

from PySide6.QtWidgets import QApplication, QFileDialog

from tiny_qmoe_chat.window import Window
from tiny_qmoe_chat.worker import Worker


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tiny_qmoe_chat", description="A chat window for a converted model.")
    p.add_argument("--model", metavar="DIR|HUB_ID|demo", help="a converted model (without it a dialog asks)")
    p.add_argument("--memory", default="auto", metavar="6GB|60%|auto", help="budget of the process (default auto)")
    p.add_argument("--context", type=int, default=2048, help="tokens that a conversation may have (default 2048)")
    p.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default 512)")
    p.add_argument("--ask", metavar="TEXT", help="a first message")
    p.add_argument("--screenshot", metavar="FILE", help="write a picture once it is answered, and leave")
    return p


def main(argv: list[str]) -> int:
    """Run the window until it is closed."""
    app = QApplication(sys.argv[:1])
    args = parser().parse_args(argv)
    model = args.model or QFileDialog.getExistingDirectory(None, "Choose a converted model")
    if not model:
        return 0
    window = Window(Worker(model, args.memory, args.context, args.max_tokens))
    window.show()
    steps = iter([lambda: (window.box.setPlainText(args.ask), window.ask())] if args.ask else [])

    def next_step() -> None:
        step = next(steps, None)
        if step is not None and not window.busy:
            step()
        elif args.screenshot:
            window.grab().save(args.screenshot)
            window.close()

    window.idle.connect(next_step)
    return app.exec()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
