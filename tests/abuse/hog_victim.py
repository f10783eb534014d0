"""A process of the hog's test: `python -m abuse.hog_victim JSON` generates without end and prints a line each round.

JSON: model, memory, tokens of a round, rest_s between rounds, and constants of `streaming.pressure` to set. With
`rounds` it ends after so many.
"""

import itertools
import json
import sys
import time
from typing import Any

import tiny_qmoe_mlx
from tiny_qmoe_mlx import models
from tiny_qmoe_mlx.serving.figures import resident_bytes
from tiny_qmoe_mlx.streaming import pressure

CONTEXT, PROMPT = 256, [5, 17, 101, 44, 9, 230, 61]


def main(words: dict[str, Any]) -> None:
    """Load and generate."""
    for name, value in words.get("pressure", {}).items():
        setattr(pressure, name, value)
    model, tokenizer = models.load(words["model"], words["memory"], CONTEXT)
    runtime = model.tiny_qmoe
    for _ in range(words["rounds"]) if "rounds" in words else itertools.count():
        responses = tiny_qmoe_mlx.stream_generate(model, tokenizer, PROMPT, max_tokens=words["tokens"])
        line = {
            "tokens": [response.token for response in responses],
            "pool_bytes": runtime.cache.pool_bytes,
            "resident_bytes": resident_bytes(),
            "mode": runtime.budget.mode,
            "shrinks": runtime._pressure.shrinks,
            "grows": runtime._pressure.grows,
        }
        print(json.dumps(line), flush=True)
        time.sleep(words["rest_s"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
