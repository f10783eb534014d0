"""Every public function as a program with types uses it; test_library.py has mypy check it, strictly. Not run."""

from pathlib import Path

from tiny_qmoe_mlx import __version__, batch_generate, convert, generate, load, plan, stream_generate


def report(what: str, done: int, total: int) -> None:
    """Progress by callback."""
    print(f"{__version__}: {what} {done}/{total}")


def use(source: str, target: Path) -> list[str]:
    """Convert, plan, load, and generate in each way."""
    converted: Path = convert(source, target, bits=2.0, progress=report)
    fits: bool = plan(converted, memory="6GB", probe=False)["fits"]
    with load(converted, memory="6GB", context=4096, progress=report)[0] as model:
        hits: int = model.tiny_qmoe.stats()["expert_hits"]
    model, tokenizer = load(converted)
    whole: str = generate(model, tokenizer, "Why is the sky blue?", max_tokens=100)
    pieces = [response.text for response in stream_generate(model, tokenizer, [1, 2, 3])]
    several: list[str] = batch_generate(model, tokenizer, ["a", [4, 5]], max_tokens=[10, 20]).texts
    model.close()
    return [whole, *pieces, *several, f"{fits} {hits}"]
