"""Let the dense SmolLM2-135M-Instruct write the calibration text of the demo (tiny_qmoe_mlx/data/calibration.txt).

Answers, stories, articles, dialogues, lists and code, sampled at temperature 0.8 from templated prompts; documents that
repeat themselves or begin like an earlier one are dropped. A third of them keep the chat markup, because `generate`
sends its prompts with it. Documents are separated by a blank line.

Needs torch, transformers and `pip install tiny-qmoe-mlx[demo]`. 23 minutes with one thread on a busy machine.

    python examples/write_calibration_text.py --out calibration.txt
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dense_smollm2
import torch
import torch.nn.functional as F

TOPICS = """photosynthesis; gravity; the moon; volcanoes; the printing press; democracy; bread; bicycles; whales;
Rome; electricity; clouds; music; chess; honey bees; glaciers; the heart; computers; rivers; a lighthouse;
vaccines; tea; iron; dinosaurs; trains; poetry; soil; the Sun; magnets; money; birds; grammar;
earthquakes; algebra; the internet; sleep; salt; paper; glass; forests; oxygen; bridges; cats; memory;
friendship; time management; exercise; rice; gardening; letters; the Silk Road; black holes; coffee;
elections; spiders; painting; sailing; DNA; winter; insurance; the stock market; football; wheat; museums;
robots; mountains; fire; dreams; maps; clocks; sharks; the ocean; cheese; dogs; school; kindness;
olive oil; ancient Egypt; the water cycle; probability; cotton; deserts; libraries; philosophy; the violin;
teeth; farming; windmills; storms; ants; the telephone; castles; cities; a village doctor; recycling;
aircraft; honesty; a lost key""".split(";")

ASKED = """What is a good way to explain {} to a child?
Give two reasons to care about {}.
Tell me five facts about {}.
Write a short story about {}.
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
    "In recent years, the study of {} has",
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


class Decoder:
    """The dense model as a loop over single tokens, many rows at once, each at its own position.

    A row reads its prompt a token at a time and then writes; when it ends, the next prompt takes its place at once, so
    no row waits for the longest. bfloat16, with a cache of fixed size.
    """

    def __init__(self, model, rows: int, length: int):
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.embedding, self.norm, self.layers = model.model.embed_tokens.weight, model.model.norm, model.model.layers
        shape = (len(self.layers), 2, rows, self.kv_heads, length, self.width)
        self.cache = torch.zeros(shape, dtype=torch.bfloat16)
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.width, 2) / self.width)
        angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotary embedding; x (rows, heads, width)."""
        left, right = x.chunk(2, -1)
        return x * self.cos[position, None] + torch.cat([-right, left], -1) * self.sin[position, None]

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) after one more token of every row; tokens and position int64 (rows,)."""
        rows, seen = torch.arange(len(tokens)), int(position.max()) + 1
        mask = (torch.arange(seen) <= position[:, None])[:, None, None]
        x = self.embedding[tokens]
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            h, attention = layer.input_layernorm(x), layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (project(h).unflatten(-1, (-1, self.width)) for project in projections)
            keys[rows, :, position], values[rows, :, position] = self.rotate(k, position), v
            mixed = F.scaled_dot_product_attention(
                self.rotate(q, position)[:, :, None], keys[:, :, :seen], values[:, :, :seen], mask, enable_gqa=True
            )
            x = x + attention.o_proj(mixed.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.norm(x), self.embedding).float()


def sample(logits: torch.Tensor, temperature: float = 0.8, top_k: int = 60, top_p: float = 0.95) -> torch.Tensor:
    """One token of every row, from the likeliest ones."""
    values, tokens = logits.topk(top_k, -1)
    p = (values / temperature).softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return tokens.gather(-1, p.multinomial(1))[:, 0]


@dataclass
class Row:
    """One row's document: prompt tokens to be read, then tokens that the model wrote."""

    prompt: str
    question: bool
    ids: list[int]
    read: int = 0  # tokens of ids that the model has seen
    begin: int = 0  # where the model's own tokens begin

    def take(self, token: int) -> None:
        """Go on by a token; the model's choice counts only after the prompt's last token."""
        self.read += 1
        if self.read == len(self.ids):
            self.ids.append(token)


def new_row(tokenizer, prompt: str, question: bool) -> Row:
    text = prompt
    if question:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Row(prompt, question, ids, begin=len(ids))


def write_all(model, tokenizer, queue: Iterator[tuple[str, bool]], rows: int, length: int) -> Iterator[tuple[Row, str]]:
    """Yields each document's row and what the model wrote, in the order in which they end."""
    decoder = Decoder(model, rows, length)
    work = [new_row(tokenizer, *next(queue)) for _ in range(rows)]
    while True:
        tokens = torch.tensor([row.ids[row.read] for row in work])
        chosen = sample(decoder.step(tokens, torch.tensor([row.read for row in work])))
        for i, (row, token) in enumerate(zip(work, chosen.tolist(), strict=True)):
            row.take(token)
            if len(row.ids) == length or (row.read >= row.begin and row.ids[-1] == tokenizer.eos_token_id):
                yield row, finished(row.ids[row.begin :], tokenizer)
                following = next(queue, None)
                if following is None:
                    return
                work[i] = new_row(tokenizer, *following)


def finished(row: list[int], tokenizer) -> str:
    """The text of one answer, cut after its last whole sentence or line if it ran out of tokens."""
    end = tokenizer.eos_token_id
    if end in row:
        return tokenizer.decode(row[: row.index(end)], skip_special_tokens=True).strip()
    text = tokenizer.decode(row, skip_special_tokens=True)
    return text[: max(text.rfind(mark) for mark in (". ", ".\n", "\n\n")) + 1].strip()


def is_sound(text: str) -> bool:
    """Whether it is long enough and does not go in circles: few threes of words repeat, and many words differ."""
    words = text.lower().split()
    if len(words) < 40:
        return False
    threes = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    # Vocabulary grows about as the 3/4 power of length; this model's middle is 2.0, its circles lie below 1.5.
    return len(threes) >= 0.9 * (len(words) - 2) and len(set(words)) >= 1.5 * len(words) ** 0.75


def as_document(prompt: str, question: bool, answer: str, rng: random.Random) -> str:
    """Prompt and answer as one document, with or without chat markup, or the answer alone."""
    if not question:
        return f"{prompt} {answer}"
    if rng.random() < 0.45:
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    return f"{prompt}\n\n{answer}" if rng.random() < 0.5 else answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("calibration.txt"))
    parser.add_argument("--bytes", type=int, default=300_000, help="stop when the text is this long (default 300000)")
    parser.add_argument("--rows", type=int, default=96, help="documents written at once (default 96)")
    parser.add_argument("--tokens", type=int, default=400, help="most tokens of prompt and answer (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    model, tokenizer = dense_smollm2.load(torch.bfloat16)
    documents: dict[str, str] = {}  # by how the answer begins
    size, start = 0, time.time()
    for row, answer in write_all(model, tokenizer, iter(prompts(rng)), args.rows, args.tokens):
        key = " ".join(answer.split()[:6]).lower()
        if not is_sound(answer) or key in documents:
            continue
        documents[key] = as_document(row.prompt, row.question, answer, rng)
        size += len(documents[key].encode()) + 2
        if len(documents) % 20 == 0 or size >= args.bytes:
            args.out.write_text("\n\n".join(documents.values()) + "\n", encoding="utf-8")
            print(f"{len(documents)} documents, {size} bytes, {time.time() - start:.0f} s", flush=True)
        if size >= args.bytes:
            break


if __name__ == "__main__":
    main()
