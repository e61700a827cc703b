"""What bfloat16 brings on this CPU: `python tests/benchmarks/dtype.py`.

The parts of an evaluation of SmolLM2-135M, in float32 and in bfloat16 in alternation: reading prompts, drawing one more
token of each, and windows of text. Prints the median of several turns.
"""

import statistics
import time
from collections import defaultdict

import torch
from common import CHECKPOINT, parse, write
from transformers import PreTrainedModel

from sparc3_lightning import load_model
from sparc3_lightning.models.checkpoints import multiplies_bfloat16

ROWS, PROMPT, STEPS, WINDOWS = 64, 16, 4, (8, 128)


@torch.inference_mode()
def measure(model: PreTrainedModel) -> dict[str, float]:
    """Return the seconds of each part."""
    vocabulary, found = model.config.vocab_size, {}
    prompts = torch.randint(5, vocabulary, (ROWS, PROMPT))
    start = time.perf_counter()
    output = model(prompts, use_cache=True, logits_to_keep=1)
    found[f"reading {ROWS} prompts of {PROMPT} tokens"] = time.perf_counter() - start
    name = "cache" if "cache" in output else "past_key_values"
    start = time.perf_counter()
    for _ in range(STEPS):
        output = model(prompts[:, :1], use_cache=True, logits_to_keep=1, **{name: output[name]})
    found[f"one token of {ROWS} continuations"] = (time.perf_counter() - start) / STEPS
    windows = torch.randint(5, vocabulary, WINDOWS)
    start = time.perf_counter()
    model(windows)
    found[f"{WINDOWS[0]} windows of {WINDOWS[1]} tokens"] = time.perf_counter() - start
    return found


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__, turns={"type": int, "default": 5})
    models = {dtype: load_model(CHECKPOINT, dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[str, dict[torch.dtype, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(options.turns + 1):  # the first one warms up
        for dtype, model in models.items():
            for part, value in measure(model).items():
                seconds[part][dtype] += [value] if turn else []
    print(f"This CPU has {'' if multiplies_bfloat16() else 'no '}instructions for matrices of bfloat16 (AMX).\n")
    print("| | float32, s | bfloat16, s | times as fast |\n|---|---|---|---|")
    found = {}
    for part, of in seconds.items():
        slow, fast = (statistics.median(of[dtype]) for dtype in models)
        found[part] = {"float32": slow, "bfloat16": fast}
        print(f"| {part} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} |")
    write(options, found)


if __name__ == "__main__":
    main()
