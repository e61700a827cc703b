"""Attribution against the naive way and against the floor, in one process: `python tests/benchmarks/attribution.py`.

Naive: one sample at a time, a backward pass with the gradients of all weights, and |weight x gradient| of the target
layers, or of all linear layers as others did, copied to float32 on the host and summed there. Floor: a bare forward and
activation backward of the same batches, no rules and no scores. By classes: the magnitude with lxt's own patches of
classes in place of our rules of operations, which give the same. Ours: the magnitude and the signed relevance, and
Wanda's score, as `sparc3 attribute` computes them, and the magnitude of each weight of all linear layers. SmolLM2-135M,
one model in memory; every way takes the same tokens. Prints seconds per sample (the least of several turns, taken in
alternation), the peak of memory above the model, and ratios; --json writes the same.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, TEXT, parse, peak_memory, write

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import Checkpoint, load_model

sys.path.append(str(Path(__file__).parents[1]))
from lxt_oracle import lxt_lrp

SHAPES = ((8, 256), (31, 24), (4, 1024))


def naive(model: Any, input_ids: torch.Tensor, of: str = "up_proj") -> dict[str, torch.Tensor]:
    """Return the mean of |weight x gradient| per neuron of the target layers, float32 on the host."""
    layers = find_layers(model, [of])
    model.requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}
    try:
        for row in input_ids:
            with lrp(model, "attnlrp"):
                model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, -1].max().backward()
            for name, layer in layers.items():
                relevance = (layer.weight * layer.weight.grad).detach().abs().float().cpu()
                sums[name] = sums[name] + relevance if name in sums else relevance
            model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
    return {name: total.sum(dim=1) / len(input_ids) for name, total in sums.items()}


def floor(model: Any, input_ids: torch.Tensor) -> None:
    """Do a forward pass and the backward pass of the activations, and nothing else."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: output.requires_grad_())
    largest_logit(model, input_ids).sum().backward()
    handle.remove()


def ours(
    score: Any, layers: str = "up_proj", granularity: Any = "neuron", rules: Callable[..., Any] = lrp
) -> Callable[..., ScoreAccumulator]:
    """Return what accumulates a score as the predict loop does."""

    def attribute(model: Any, input_ids: torch.Tensor) -> ScoreAccumulator:
        accumulator = ScoreAccumulator(find_layers(model, [layers]), score, granularity=granularity)
        is_lrp = score != "wanda"
        names = [str(i) for i in range(len(input_ids))]
        with (
            torch.set_grad_enabled(is_lrp),
            rules(model, "attnlrp") if is_lrp else nullcontext(),
            accumulator.recording(None, names),
        ):
            if is_lrp:
                largest_logit(model, input_ids).sum().backward()
            else:
                model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return accumulator

    return attribute


def measure(model: Any, input_ids: torch.Tensor, turns: int) -> dict[str, dict[str, float]]:
    """Return seconds per sample and peak memory of each way; the scores of naive and ours must agree."""
    ways: dict[str, Callable[..., Any]] = {
        "floor": floor,
        "wanda": ours("wanda"),
        "signed": ours("signed"),
        "magnitude": ours("magnitude"),
        "magnitude, by classes": ours("magnitude", rules=lxt_lrp),
        "magnitude of all weights": ours("magnitude", "all", "weight"),
        "naive": naive,
        "naive, all linear layers": lambda *of: naive(*of, "all"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    scores: dict[str, Any] = {}
    floor(model, input_ids[:1])  # the weights are mapped, and read when they are first used
    for turn in range(turns + 1):
        for name, way in ways.items():
            # Watched in the first turn alone: to see the peak, what the allocator keeps must be given back before, and
            # asking the system for it again would cost the larger batches most.
            with peak_memory() if turn == 0 else nullcontext([]) as peak:
                start = time.perf_counter()
                scores[name] = way(model, input_ids)
                seconds[name].append(time.perf_counter() - start)
            if turn == 0:
                memory[name] = peak[0]
    magnitude = scores["magnitude"].compute()
    for name, score in scores["magnitude, by classes"].compute().items():
        torch.testing.assert_close(score, magnitude[name], rtol=2e-7, atol=0)
    for name, score in scores["naive"].items():
        torch.testing.assert_close(score, magnitude[name], rtol=2e-4, atol=1e-7)
    return {
        name: {"seconds_per_sample": min(of[1:]) / len(input_ids), "peak_mib": memory[name]}
        for name, of in seconds.items()
    }


def main() -> None:
    """Measure every shape, and print the tables."""
    options = parse(__doc__, turns={"type": int, "default": 3})
    model = load_model(CHECKPOINT, torch.float32)
    text = WikiText2(TEXT, 1024, 512, text_field="document", num_tokens=8192)
    text.setup_windows(Checkpoint(CHECKPOINT).tokenizer())
    found = {}
    for samples, tokens in SHAPES:
        figures = measure(model, text.input_ids[: samples * tokens].reshape(samples, tokens), options.turns)
        found[f"{samples} x {tokens}"] = figures
        print(f"\n{samples} samples of {tokens} tokens, up_proj, float32, {options.threads} threads\n")
        print("| | seconds a sample | of the floor | naive, of it | peak memory, MiB |\n|---|---|---|---|---|")
        for name, of in figures.items():
            own = of["seconds_per_sample"]
            least, slow = (figures[other]["seconds_per_sample"] for other in ("floor", "naive"))
            print(f"| {name} | {own:.3f} | {own / least:.2f} | {slow / own:.2f} | {of['peak_mib']:.0f} |")
    write(options, found)


if __name__ == "__main__":
    main()
