"""The ten lines: load a converted model, stream an answer, print the figures. `python examples/ten_lines.py DIR`"""

import sys

from tiny_qmoe_mlx import load, stream_generate

model, tokenizer = load(sys.argv[1], memory="auto")  # or "6GB", or "60%"
with model:
    messages = [{"role": "user", "content": "Why are trees important?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    for response in stream_generate(model, tokenizer, prompt, max_tokens=100):
        print(response.text, end="", flush=True)
    print()
    print(model.tiny_qmoe.stats())
