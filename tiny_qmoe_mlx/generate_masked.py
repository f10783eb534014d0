"""Text from an encoder-decoder: the encoder reads the prompt, the decoder writes from its start token on, by mlx-lm's
own loop. Where the prompt has sentinels, it writes what they stand for.
"""

import argparse
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import mlx.core as mx

from tiny_qmoe_mlx.masked_spans import known_sentinels

REFUSED = ("draft_model", "prompt_cache_file", "kv_bits", "max_kv_size", "system_prompt", "prefill_response")


def check_options(args: argparse.Namespace) -> None:
    """Refuse what a decoder alone can do.

    Raises:
        ValueError: names the option.
    """
    for name in REFUSED:
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"[options] --{flag} is not there for encoder-decoders as this model; leave it out.")


def stream(model: Any, tokenizer: Any, ids: list[int], **options: Any) -> Generator[Any, None, None]:
    """What mlx_lm.stream_generate yields, of the decoder; it ends after the last of the prompt's sentinels too.

    Args:
        model, tokenizer: from `load`.
        ids: the prompt's tokens, for the encoder.
        options: as mlx_lm.stream_generate takes them.

    Raises:
        ValueError: an option that a decoder alone can do.
    """
    from mlx_lm import stream_generate

    asked = [name for name in ("draft_model", "prompt_cache", "kv_bits", "max_kv_size") if options.pop(name, None)]
    if asked:
        raise ValueError(f"[options] {asked[0]} is not there for encoder-decoders as this model; leave it out.")
    cache, start = model.make_cache(mx.array(ids)[None]), model.args.decoder_start_token_id
    last = _after_last(ids, known_sentinels(tokenizer))
    for response in stream_generate(model, tokenizer, [start], prompt_cache=cache, **options):
        ends = response.token == last
        reason = "stop" if ends else response.finish_reason
        speed = response.prompt_tps * len(ids)  # of one token, to mlx-lm: the decoder's first
        yield replace(response, prompt_tokens=len(ids), prompt_tps=speed, finish_reason=reason)
        if ends:
            return


def _after_last(ids: list[int], marks: list[int]) -> int | None:
    """The sentinel that follows the last of a prompt's; None where it has none, or its last is the tokenizer's."""
    used = [marks.index(token) for token in ids if token in marks]
    return marks[max(used) + 1] if used and max(used) + 1 < len(marks) else None
