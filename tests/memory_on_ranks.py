"""Attributes one batch by the real code on each rank, and writes the most memory that this takes beside the estimate.

As ``python tests/memory_on_ranks.py FILE SHAPE RANKS OPTIONS ...``, with the options of each attribution as JSON. The
model has one of the shapes below and weights that are drawn. Each attribution has processes of its own.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from sparc3_lightning.models.footprint import Layout, Meter, cost_of
from sparc3_lightning.models.loading import CAUSAL_LM, build_skeleton
from sparc3_lightning.models.sharding import checkpoint_blocks_, shard_blocks_
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.estimate import attribution, rules_of

CONFIGS: dict[str, PretrainedConfig] = {
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "mixture": MixtralConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
}
SAMPLES, TOKENS = 2, 128


def most_memory() -> int:
    """Return the bytes of memory that this process has had at most, since ``clear_refs`` was written to."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure(rank: int, file: str, shape: str, num_ranks: int, meeting: str, options: dict[str, Any]) -> None:
    """Attribute one batch on this rank; the first one writes what it took, in bytes above the weights."""
    torch.set_num_threads(1)
    if num_ranks > 1:
        torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=num_ranks)
    layout = Layout(num_ranks, num_ranks > 1, options.get("gradient_checkpointing", False))
    model = build_skeleton(shape, CONFIGS[shape], None, CAUSAL_LM, torch.float32).eval().requires_grad_(False)
    module = Attribution(shape, **options)
    module.settle(model, torch.float32)
    if layout.gradient_checkpointing:
        checkpoint_blocks_(model)
    if layout.is_sharded:
        shard_blocks_(model, init_device_mesh("cpu", (num_ranks,)))
    rules_of(module)(model)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        getattr(tensor, "_local_tensor", tensor).normal_(std=0.02)
    # Tokens that are alike would all be routed to the same experts.
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: torch.randint_like(ids[0], 8192))
    meter = Meter()  # counts nothing outside its block
    attribution(module, 1, 8)(model, meter)
    Path("/proc/self/clear_refs").write_text("5")
    before = most_memory()
    run = attribution(module, SAMPLES, TOKENS)
    run(model, meter)
    measured = most_memory() - before
    if num_ranks > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        found = cost_of(shape, CONFIGS[shape], torch.float32, layout, run, rules_of(module))
        row = {"shape": shape, "options": options, "measured": measured, "estimated": found.peak - found.weights}
        with Path(file).open("a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    file, shape, ranks, *cases = sys.argv[1:]
    for case in map(json.loads, cases):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (file, shape, int(ranks), f"{folder}/meeting", case)
            start_processes(measure, arguments, int(ranks), start_method="fork")
