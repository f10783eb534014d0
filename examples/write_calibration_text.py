"""Let the dense SmolLM2-135M-Instruct write the calibration text of the demo (tiny_qmoe_mlx/data/calibration.txt).

Answers, stories, articles, dialogues, lists and code, sampled at temperature 0.8 from templated prompts; documents that
repeat themselves or begin like an earlier one are dropped. A third of them keep the chat markup, because `generate`
sends its prompts with it. Documents are separated by a blank line.

Needs torch, transformers and `pip install tiny-qmoe-mlx[demo]`. About 10 minutes on 2 cores.

    python examples/write_calibration_text.py --out calibration.txt
"""

import argparse
import itertools
import random
import time
import zlib
from pathlib import Path

import dense_smollm2
import torch

TOPICS = """photosynthesis; gravity; the moon; volcanoes; the printing press; democracy; bread; bicycles; whales;
Rome; electricity; clouds; music; chess; honey bees; glaciers; the heart; computers; rivers; a lighthouse;
vaccines; tea; iron; dinosaurs; trains; poetry; soil; the Sun; magnets; money; birds; grammar;
earthquakes; algebra; the internet; sleep; salt; paper; glass; forests; oxygen; bridges; cats; memory;
friendship; time management; exercise; rice; gardening; letters; the Silk Road; black holes; coffee;
elections; spiders; painting; sailing; DNA; winter; insurance; the stock market; football; wheat; museums;
robots; mountains; fire; dreams; maps; clocks; sharks; the ocean; cheese; dogs; school; kindness; bread
ovens; ancient Egypt; the water cycle; probability; cotton; deserts; libraries; philosophy; the violin;
teeth; farming; windmills; storms; ants; the telephone; castles; cities; a village doctor; recycling;
aircraft; honesty; a lost key""".split(";")

ASKED = """What is a good way to explain {} to a child?
Why does {} matter? Give two reasons.
Tell me five facts about {}.
Write a short story in which {} plays a part.
Write the first two paragraphs of a magazine article about {}.
Write a dialogue between a teacher and a student about {}.
What are common mistakes that people make about {}?
Give me a list of questions that one could ask about {}.
Write a letter to a friend about {}.
Summarize the history of {} in one paragraph.
Compare {} with something that is quite different.
Write a short poem about {}.
Write a news report about {}.
Describe {} for an encyclopedia.
How would an expert on {} begin a lecture?
Give step by step instructions that have to do with {}.""".splitlines()

CODE = """Write a Python function that {}. Explain it briefly.
Write a short program in C that {}.
Show me a JavaScript function that {}, with an example of its use.""".splitlines()

TASKS = """reverses a list; counts the words in a text; finds the largest number; checks for a prime number; sorts
names; computes a factorial; merges two dictionaries; reads a file line by line; converts Celsius to
Fahrenheit; adds two matrices; finds duplicate items; prints a multiplication table; tests for a
palindrome; computes the mean and the median""".split(";")

BEGUN = [  # plain text that the model continues
    "The history of {} begins",
    "In recent years, {} has",
    "Once upon a time, near a place that was known for {},",
    "Many people believe that {}",
    "According to a new report about {},",
    "Chapter 1. On {}\n\nIt was",
]


def prompts(rng: random.Random) -> list[tuple[str, bool]]:
    """Every (prompt, is it a question) in random order."""
    topics, tasks = ([word.strip() for word in words] for words in (TOPICS, TASKS))
    asked = itertools.chain(itertools.product(ASKED, topics), itertools.product(CODE, tasks))
    begun = [(form.format(t), False) for form, t in itertools.product(BEGUN, topics)]
    out = [(form.format(topic), True) for form, topic in asked] + begun
    rng.shuffle(out)
    return out


def continue_batch(model, tokenizer, batch: list[tuple[str, bool]], tokens: int) -> list[str]:
    """What the model writes after each prompt; empty where it had not ended in time and holds no whole sentence."""
    texts = []
    for prompt, question in batch:
        if question:
            chat = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(prompt)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, pad_token_id=0
    )
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [finished(row, tokenizer) for row in new]


def finished(row: list[int], tokenizer) -> str:
    """The text of one answer, cut after its last whole sentence or line if it ran out of tokens."""
    end = tokenizer.eos_token_id
    if end in row:
        return tokenizer.decode(row[: row.index(end)], skip_special_tokens=True).strip()
    text = tokenizer.decode(row, skip_special_tokens=True)
    return text[: max(text.rfind(mark) for mark in (". ", ".\n", "\n\n")) + 1].strip()


def is_sound(text: str) -> bool:
    """Whether it is long enough and does not go in circles."""
    words = text.split()
    if len(words) < 40:
        return False
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    raw = text.encode()
    return len(set(fours)) >= 0.85 * len(fours) and len(zlib.compress(raw)) >= 0.36 * len(raw)


def as_document(prompt: str, question: bool, answer: str, rng: random.Random) -> str:
    """Prompt and answer as one document, with or without chat markup, or the answer alone."""
    if not question:
        return f"{prompt} {answer}"
    if rng.random() < 0.4:
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    return f"{prompt}\n\n{answer}" if rng.random() < 0.5 else answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("calibration.txt"))
    parser.add_argument("--bytes", type=int, default=300_000, help="stop when the text is this long (default 300000)")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=320, help="most tokens of one document (default 320)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    model, tokenizer = dense_smollm2.load()
    queue = prompts(rng)
    documents: dict[str, str] = {}  # by how the answer begins
    start = time.time()
    while queue and sum(len(text.encode()) + 2 for text in documents.values()) < args.bytes:
        batch, queue = queue[: args.batch], queue[args.batch :]
        answers = continue_batch(model, tokenizer, batch, args.tokens)
        for (prompt, question), answer in zip(batch, answers, strict=True):
            if is_sound(answer):
                documents.setdefault(" ".join(answer.split()[:6]).lower(), as_document(prompt, question, answer, rng))
        args.out.write_text("\n\n".join(documents.values()) + "\n", encoding="utf-8")
        print(f"{len(documents)} documents, {args.out.stat().st_size} bytes, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
