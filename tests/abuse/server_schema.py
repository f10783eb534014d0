"""The server against its own description: requests that fit /openapi.json and requests that do not, by schemathesis.

PYTHONPATH=tests python -m abuse.server_schema [--count N] [--seed N]
"""

import argparse
import copy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from server_process import Server, least, serving

from abuse import record, served_model

PROMISE = "No request makes the server fail; it takes what /openapi.json says, nothing else, and answers as it says."
CONTEXT = 1024
FEW = {"type": "integer", "minimum": 1, "maximum": 4}
NARROWED = {  # what this model alone knows, what would take long, and two fields that exclude each other
    "model": {"enum": ["default_model"]},
    "max_tokens": FEW,
    "max_completion_tokens": FEW,
    "num_draft_tokens": {"type": "integer", "minimum": 0, "maximum": 3},
    "top_k": {"type": "integer", "minimum": 0, "maximum": 200},
    "logit_bias": {
        "type": "object",
        "patternProperties": {"^[0-9]{1,2}$": {"type": "number", "minimum": -100, "maximum": 100}},
        "additionalProperties": False,
    },
    "response_format": {"enum": [{"type": "text"}, {"type": "json_object"}]},
    "tools": {"enum": [[]]},
}
FIT, MISFIT = "requests that fit", "requests that do not"


@dataclass
class Outcome:
    """What came back.

    asked: requests of each kind; statuses: how often each was answered; failures: what was not as described.
    """

    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, int | str]:
        shown = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        return {**self.asked, "answers by status": shown, "answers that are not as described": len(self.failures)}


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The description for this model: every request that fits it should be answered."""
    found = copy.deepcopy(description)
    for name in ("Completion", "Chat"):
        schema = found["components"]["schemas"][name]
        schema["properties"].update(NARROWED)
        schema["required"].append("max_tokens")
    found["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"] = {"enum": ["default_model"]}
    return found


def operations(description: dict[str, Any]) -> Iterator[Any]:
    """Each operation as schemathesis knows it."""
    import schemathesis

    for found in schemathesis.openapi.from_dict(description).get_all_operations():
        yield found.ok()


def attack(server: Server, count: int, seed: int) -> Outcome:
    """`count` requests that fit and as many that do not, for each operation that takes any."""
    from schemathesis.generation import GenerationMode

    outcome, whole = Outcome(), server.get("/openapi.json")
    modes = ((FIT, GenerationMode.POSITIVE, narrowed(whole)), (MISFIT, GenerationMode.NEGATIVE, whole))
    for kind, mode, description in modes:
        for operation in operations(description):
            if mode is GenerationMode.POSITIVE or operation.body:
                cases = operation.as_strategy(generation_mode=mode)
                run(cases, partial(ask, server, kind, outcome), count, seed)
    return outcome


def run(cases: Any, ask: Callable[[Any], None], count: int, seed: int) -> None:
    """Draw cases and ask each."""
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def one(case: Any) -> None:
        ask(case)

    hypothesis.seed(seed)(settings(hypothesis.given(cases)(one)))()


def ask(server: Server, kind: str, outcome: Outcome, case: Any) -> None:
    """One request; what schemathesis finds wrong with the answer is kept."""
    from schemathesis.core.failures import Failure, FailureGroup

    response = case.call(base_url=server.url, timeout=300)
    outcome.asked[kind] += 1
    outcome.statuses[response.status_code] += 1
    if "context_length_exceeded" in response.text:  # no schema can count tokens
        return
    try:
        case.validate_response(response)
    except (Failure, FailureGroup) as error:
        found = "; ".join(" ".join(str(e).split()) for e in getattr(error, "exceptions", [error]))
        outcome.failures.append(f"{case.method} {case.path}: {found}; {response.text[:300]}; asked {case.body!r:.600}")


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=PROMISE)
    parser.add_argument("--count", type=int, default=1000, help="requests of each kind for each operation")
    parser.add_argument("--seed", type=int, default=0)
    args, start = parser.parse_args(argv), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = served_model.make(Path(folder))
        with serving(model, "--context", CONTEXT, "--memory", least(model, CONTEXT)) as server:
            outcome = attack(server, args.count, args.seed)
            well = server.get("/health") == {"status": "ok"}
    for failure in outcome.failures[:20]:
        print(failure)
    broken = len(outcome.failures) + (not well)
    seconds = time.monotonic() - start
    record.keep(6, "server_schema", PROMISE, "abuse.server_schema", seconds, outcome.figures(), broken)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
