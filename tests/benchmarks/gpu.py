"""Attribution of an 8B model on one GPU: `python tests/benchmarks/gpu.py`.

LLaMA-3-8B's shape with random weights in bfloat16: no rate depends on their values. Prints seconds per sample of 2048
tokens (the least of several turns), the share of the rate that a large matrix product reaches on the same chip, and the
peak of memory, for the magnitude and the signed relevance of up_proj, with and without checkpointing, for the
magnitude of all weights, for the naive way (see attribution.py), and for 93 prompts of 20 tokens in one batch. On a
machine without a GPU it says so and ends, but for `--shape tiny`, which only shows that the script runs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from attribution import floor, naive, ours
from common import parse, write
from transformers import AutoModelForCausalLM, LlamaConfig

from sparc3_lightning.models.sharding import checkpoint_blocks_

SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def make_model(shape: str, device: torch.device) -> Any:
    """Return a model with random weights, frozen."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], Any], turns: int) -> dict[str, float]:
    """Return the least seconds of several turns after one that warms up, and the peak of memory in GiB."""
    run()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return {"seconds": min(seconds), "peak_gib": peak}


def matrix_rate(device: torch.device, size: int) -> float:
    """Return the floating-point operations a second of a large bfloat16 matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(device, lambda: left @ right, 20)["seconds"]


def operations(model: Any, tokens: int, is_magnitude: bool) -> float:
    """Return the operations of a sample: 4 a weight and token, attention, and 2 more a target weight for magnitude."""
    config = model.config
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    attention = 6 * tokens**2 * config.hidden_size * config.num_hidden_layers  # half of the scores are masked
    layers = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    return 4 * blocks * tokens + attention + (2 * layers * tokens if is_magnitude else 0)


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__, shape={"choices": SHAPES, "default": "8b"}, turns={"type": int, "default": 3})
    if options.shape != "tiny" and not torch.cuda.is_available():
        print("No GPU is here: nothing was measured.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length, turns = (2048, options.turns) if options.shape == "8b" else (64, 1)
    torch.manual_seed(0)
    model = make_model(options.shape, device)
    rate = matrix_rate(device, 8192 if options.shape == "8b" else 256)
    long = torch.randint(model.config.vocab_size, (1, length), device=device)
    short = torch.randint(model.config.vocab_size, (93, 20), device=device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, shape {options.shape}, {length} tokens; ", end="")
    print(f"matrix product {rate / 1e12:.0f} Tflop/s\n")
    ways: dict[str, tuple[Callable[..., Any], torch.Tensor, bool | None]] = {
        "floor": (floor, long, False),
        "signed": (ours("signed"), long, False),
        "magnitude": (ours("magnitude"), long, True),
        "magnitude of all weights": (ours("magnitude", "all", "weight"), long, None),
        "93 prompts of 20 tokens, magnitude": (ours("magnitude"), short, None),
        "naive": (naive, long, None),
    }
    found: dict[str, dict[str, float]] = {}
    for way, (run, input_ids, is_magnitude) in ways.items():
        found[way] = timed(device, lambda run=run, ids=input_ids: run(model, ids), 1 if way == "naive" else turns)
        if is_magnitude is not None:
            found[way]["share"] = operations(model, length, is_magnitude) / found[way]["seconds"] / rate
    checkpoint_blocks_(model)
    for way in ("signed", "magnitude"):
        found[f"{way}, checkpointing"] = timed(device, lambda way=way: ours(way)(model, long), turns)
    print("| | seconds | of the floor | share of the matrix rate | peak memory, GiB |\n|---|---|---|---|---|")
    for way, of in found.items():
        share = f"{of['share']:.0%}" if "share" in of else ""
        ratio = of["seconds"] / found["floor"]["seconds"]
        print(f"| {way} | {of['seconds']:.3f} | {ratio:.2f} | {share} | {of['peak_gib']:.1f} |")
    write(options, {"device": name, "rate": rate, **found})


if __name__ == "__main__":
    main()
