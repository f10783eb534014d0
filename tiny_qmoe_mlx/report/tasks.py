"""A fixed set of tasks that low-bit models fail first: replies that must be JSON of a given shape, and tool calls.

The tasks are made by this file from one seed, so that every report has the same ones and nothing is downloaded. Replies
are greedy. For models too small to do any of them, two more figures tell conversions apart: JSON that was begun for
the model, and how long its replies stay those of the original.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SEED = 5
TASKS_OF_A_KIND = 40
REPLY_TOKENS = 80  # the longest right reply takes about 70 with a vocabulary of 50000
ROWS = 16  # tasks answered at once
CONTEXT = 512 * ROWS  # tokens of KV cache that they take together; the longest prompts have about 400 tokens
AGREEMENT_TOKENS = 32
Progress = Callable[[str, int, int], None]

NAMES = "Maria Lopez;John Smith;Aiko Tanaka;Omar Haddad;Elena Petrova;David Cohen;Grace Okafor;Lars Berg".split(";")
CITIES = "Paris;Lisbon;Cairo;Toronto;Osaka;Nairobi;Lima;Helsinki".split(";")
JOBS = "teacher;nurse;carpenter;pilot;chemist;farmer;lawyer;cook".split(";")
THINGS = "lamp;desk;kettle;backpack;bicycle;umbrella;keyboard;blanket".split(";")
TOPICS = "volcanoes;chess openings;solar panels;jazz history;sourdough;black holes".split(";")


@dataclass(frozen=True)
class Task:
    """What is asked, and what is right: of JSON the object itself, of a tool call its arguments.

    tools: names of the tools that are offered; the first is the right one; none for JSON.
    """

    prompt: str
    expected: dict[str, Any]
    tools: tuple[str, ...] = ()
    offered: list[dict[str, Any]] = field(default_factory=list)


# ---- the tasks


def json_tasks(count: int = TASKS_OF_A_KIND) -> list[Task]:
    """Facts in a sentence or two, to be returned as an object with named keys of named types."""
    rng = random.Random(SEED)
    return [_json_task(*JSON_FORMS[i % len(JSON_FORMS)](rng)) for i in range(count)]


def _json_task(facts: str, expected: dict[str, Any]) -> Task:
    return Task(f"{facts}\n\nReturn only a JSON object with exactly these keys: {_keys(expected)}.", expected)


def _keys(expected: dict[str, Any]) -> str:
    return ", ".join(f"{key} ({_type_name(value)})" for key, value in expected.items())


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return f"list of {_type_name(value[0])}s"
    if isinstance(value, dict):
        return f"object with the keys {_keys(value)}"
    return {str: "string", bool: "boolean", int: "integer", float: "number"}[type(value)]


def _person(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, age, city, job = rng.choice(NAMES), rng.randint(19, 78), rng.choice(CITIES), rng.choice(JOBS)
    facts = f"{name} is {age} years old, lives in {city} and works as a {job}."
    return facts, {"name": name, "age": age, "city": city, "job": job}


def _product(rng: random.Random) -> tuple[str, dict[str, Any]]:
    thing, price, stock = rng.choice(THINGS), rng.randint(5, 90) + 0.5, rng.random() < 0.5
    facts = f"The {thing} costs {price:.2f} dollars and is {'in stock' if stock else 'sold out'}."
    return facts, {"product": thing, "price": price, "in_stock": stock}


def _event(rng: random.Random) -> tuple[str, dict[str, Any]]:
    people, topic, day = rng.sample(NAMES, 3), rng.choice(TOPICS), f"2024-0{rng.randint(1, 9)}-{rng.randint(10, 28)}"
    facts = f"On {day}, {people[0]}, {people[1]} and {people[2]} will meet to talk about {topic}."
    return facts, {"date": day, "topic": topic, "people": people}


def _route(rng: random.Random) -> tuple[str, dict[str, Any]]:
    start, end = rng.sample(CITIES, 2)
    hours, stops = rng.randint(2, 14), rng.randint(0, 3)
    facts = f"The flight from {start} to {end} takes {hours} hours with {stops} stops."
    return facts, {"from": start, "to": end, "hours": hours, "stops": stops}


def _order(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, thing, number, many = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1000, 9999), rng.randint(2, 9)
    facts = f"Order {number}: {name} bought {many} pieces of the article {thing!r}."
    return facts, {"order": number, "customer": name, "item": {"article": thing, "pieces": many}}


def _scores(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, points = rng.choice(NAMES), [rng.randint(1, 20) for _ in range(4)]
    facts = f"In four rounds {name} scored {points[0]}, {points[1]}, {points[2]} and {points[3]} points."
    return facts, {"player": name, "points": points, "total": sum(points)}


def _weather(rng: random.Random) -> tuple[str, dict[str, Any]]:
    city, degrees, rain = rng.choice(CITIES), rng.randint(-9, 38), rng.random() < 0.5
    facts = f"In {city} it is {degrees} degrees Celsius and it {'rains' if rain else 'is dry'}."
    return facts, {"city": city, "celsius": degrees, "rain": rain}


def _talk(rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = rng.sample(TOPICS, 2)
    minutes, public = 15 * rng.randint(1, 6), rng.random() < 0.5
    audience = "open to the public" if public else "for members only"
    facts = f"The talk covers {words[0]} and {words[1]}, lasts {minutes} minutes and is {audience}."
    return facts, {"topics": words, "minutes": minutes, "public": public}


JSON_FORMS = (_person, _product, _event, _route, _order, _scores, _weather, _talk)

TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Current weather of a city.", {"city": "string"}),
    "convert_currency": (
        "Convert an amount of money.",
        {"amount": "integer", "from_currency": "string", "to_currency": "string"},
    ),
    "set_timer": ("Set a timer.", {"minutes": "integer"}),
    "send_message": ("Send a text message to a person.", {"recipient": "string", "text": "string"}),
    "search_web": ("Search the web.", {"query": "string"}),
    "multiply": ("Multiply two integers.", {"a": "integer", "b": "integer"}),
    "book_table": ("Book a table in a restaurant of a city.", {"city": "string", "guests": "integer"}),
    "play_music": ("Play music of a genre.", {"genre": "string"}),
}


def tool_tasks(count: int = TASKS_OF_A_KIND) -> list[Task]:
    """Requests that one of three offered tools serves."""
    rng, found = random.Random(SEED + 1), dict[str, Task]()
    while len(found) < count:
        task = _tool_task(list(TOOLS)[len(found) % len(TOOLS)], rng)
        found.setdefault(task.prompt, task)  # of the same requests, the first
    return list(found.values())


def _tool_task(name: str, rng: random.Random) -> Task:
    a, b, city = rng.randint(2, 9), rng.randint(12, 99), rng.choice(CITIES)
    person, topic = rng.choice(NAMES), rng.choice(TOPICS)
    money = rng.sample(["USD", "EUR", "JPY", "GBP"], 2)
    genre = rng.choice(["jazz", "rock", "folk", "blues", "opera", "techno"])
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "get_weather": (f"What is the weather in {city}?", {"city": city}),
        "convert_currency": (
            f"Convert {b} {money[0]} to {money[1]}.",
            {"amount": b, "from_currency": money[0], "to_currency": money[1]},
        ),
        "set_timer": (f"Set a timer for {b} minutes.", {"minutes": b}),
        "send_message": (
            f'Send {person} the message "See you at {a}".',
            {"recipient": person, "text": f"See you at {a}"},
        ),
        "search_web": (f'Search the web for "{topic}".', {"query": topic}),
        "multiply": (f"Use a tool to multiply {a} by {b}.", {"a": a, "b": b}),
        "book_table": (f"Book a table in {city} for {a} guests.", {"city": city, "guests": a}),
        "play_music": (f"Play some {genre}.", {"genre": genre}),
    }
    prompt, expected = forms[name]
    others = rng.sample([n for n in TOOLS if n != name], 2)
    offered = [tool(n) for n in rng.sample([name, *others], 3)]
    return Task(prompt, expected, (name, *others), offered)


def tool(name: str) -> dict[str, Any]:
    """A tool as chat templates take it."""
    description, arguments = TOOLS[name]
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# ---- scores


def first_object(reply: str) -> Any:
    """The first JSON object in a reply, after what the model thought; None where there is none."""
    reply = reply.rpartition("</think>")[2]
    start = reply.find("{")
    try:
        return json.JSONDecoder().raw_decode(reply[start:])[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None


def is_valid(value: Any, expected: dict[str, Any]) -> bool:
    """Whether an object has the keys that were asked for, no others, and values of their types."""
    if type(value) is not dict or value.keys() != expected.keys():
        return False
    return all(_same_type(value[key], right) for key, right in expected.items())


def is_right(value: Any, expected: dict[str, Any]) -> bool:
    """Whether an object is valid and has the right values."""
    return is_valid(value, expected) and value == expected


def _same_type(value: Any, right: Any) -> bool:
    if type(right) is float:
        return type(value) in (int, float)
    if type(right) is list:
        return type(value) is list and all(_same_type(v, right[0]) for v in value)
    return is_valid(value, right) if type(right) is dict else type(value) is type(right)


def called_tool(reply: str, task: Task, tokenizer: Any) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of the first tool call in a reply, by the tokenizer's own parser or as JSON; None without."""
    call: Any = None
    start = getattr(tokenizer, "tool_call_start", None)
    if start and start in reply:
        text = reply.split(start, 1)[1]
        end = tokenizer.tool_call_end
        try:
            call = tokenizer.tool_parser(text.split(end, 1)[0] if end else text, task.offered)
        except Exception:  # the parsers raise what they like on a call that is none
            return None
    else:
        call = first_object(reply)
    call = call[0] if isinstance(call, list) and call else call
    if not isinstance(call, dict):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    return (call["name"], arguments) if type(call.get("name")) is str and type(arguments) is dict else None


def is_right_call(call: tuple[str, dict[str, Any]] | None, task: Task) -> bool:
    """Whether the right tool was called with the right arguments; texts may differ in case."""
    if call is None or call[0] != task.tools[0]:
        return False
    return _folded(call[1]) == _folded(task.expected)


def _folded(values: dict[str, Any]) -> dict[str, Any]:
    # a boolean equals a number in Python, and is none in JSON
    return {k: v.strip().casefold() if isinstance(v, str) else (type(v) is bool, v) for k, v in values.items()}


def agreement(reply: list[int], other: list[int]) -> float:
    """Share of a reply's first 32 tokens before it leaves another reply."""
    most = min(AGREEMENT_TOKENS, max(len(reply), len(other)))
    same = 0
    while same < most and reply[same : same + 1] == other[same : same + 1]:
        same += 1
    return same / most if most else 1.0


# ---- a model at work


def prompt_tokens(task: Task, tokenizer: Any, begun: str = "") -> list[int]:
    """A task as the model reads it: through the chat template, with the tools where the template takes them."""
    native = bool(task.tools) and bool(getattr(tokenizer, "has_tool_calling", False))
    text = task.prompt if not task.tools or native else _instruction(task)
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(f"{text}\n\nJSON: {begun}"))
    tools = task.offered if native else None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return list(tokenizer.encode(prompt + begun, add_special_tokens=False))


def _instruction(task: Task) -> str:
    listed = "\n".join(json.dumps(t["function"]) for t in task.offered)
    shape = '{"name": name of the tool, "arguments": {...}}'
    return f"You can call these tools:\n{listed}\n\nReply only with the call as JSON: {shape}\n\n{task.prompt}"


def begin(task: Task) -> str:
    """The start of a right reply to a JSON task."""
    return '{"' + next(iter(task.expected)) + '":'


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], progress: Callable[[int], None] = lambda done: None
) -> list[list[int]]:
    """Greedy replies, token ids without the end token."""
    import mlx.core as mx

    from tiny_qmoe_mlx.conversion import writer

    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # of about one length in a batch
    for start in range(0, len(order), ROWS):
        batch = order[start : start + ROWS]
        mine = [prompts[i] for i in batch]
        limits = [len(p) + REPLY_TOKENS for p in mine]
        rows = writer.write(model, mine, limits, lambda p: mx.argmax(p, axis=-1), tokenizer.eos_token_ids)
        for i, row in zip(batch, rows, strict=True):
            written = row[len(prompts[i]) :]
            replies[i] = written[:-1] if written and written[-1] in tokenizer.eos_token_ids else written
        progress(start + len(batch))
    return replies


def run(
    model: Any,
    tokenizer: Any,
    count: int = TASKS_OF_A_KIND,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, float], list[list[int]]]:
    """Answer all tasks and score them.

    Args:
        model, tokenizer: any that mlx-lm or `load` gives.
        count: tasks of a kind.

    Returns:
        Shares of the tasks: json_validity, json_correct (right values too), json_validity_begun (the reply's start was
        given), tool_call_pass; and the replies' tokens, for `agreement` with another model's.
    """
    asked, calls = json_tasks(count), tool_tasks(count)
    prompts = [prompt_tokens(t, tokenizer) for t in asked]
    prompts += [prompt_tokens(t, tokenizer, begin(t)) for t in asked]
    prompts += [prompt_tokens(t, tokenizer) for t in calls]
    replies = answer(model, tokenizer, prompts, lambda done: progress("answering tasks", done, len(prompts)))
    texts = [tokenizer.decode(r) for r in replies]
    plain, begun, called = texts[:count], texts[count : 2 * count], texts[2 * count :]
    objects = [first_object(text) for text in plain]
    given = [first_object(begin(t) + text) for t, text in zip(asked, begun, strict=True)]
    right = [is_right_call(called_tool(text, t, tokenizer), t) for t, text in zip(calls, called, strict=True)]
    scores = {
        "json_validity": _share(is_valid(o, t.expected) for o, t in zip(objects, asked, strict=True)),
        "json_correct": _share(is_right(o, t.expected) for o, t in zip(objects, asked, strict=True)),
        "json_validity_begun": _share(is_valid(o, t.expected) for o, t in zip(given, asked, strict=True)),
        "tool_call_pass": _share(right),
    }
    return scores, replies


def _share(flags: Any) -> float:
    flags = list(flags)
    return round(sum(flags) / len(flags), 4)
