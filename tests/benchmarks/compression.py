"""Perplexity of SmolLM2-135M at 30, 50 and 60 % sparsity: `python tests/benchmarks/compression.py [--json FILE]`.

Weights of all linear layers but the head, by their magnitude, by Wanda's score and by the magnitude of LRP's relevance,
on documents of C4, with a draw of documents for each seed; pruned row by row, the magnitude per layer too, as is usual.
Perplexity on the beginning of WikiText-2's test text in disjoint windows, the same for every model. Mean and standard
error over the seeds; the magnitude of a weight has none. Needs C4 as jsonl and WikiText-2 as text, by default from
shared/data beside the checkout.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import CHECKPOINT, DATA, parse, write
from torch import Tensor

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.targets import largest_logit, text_log_probability
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.likelihood import last_hidden_state, score_windows
from sparc3_lightning.selection.sparsity import prune_mask
from sparc3_lightning.stages.compress import zero_

SPARSITIES = (0.3, 0.5, 0.6)
Scores = dict[str, Tensor]


def lrp_scores(model: Any, documents: C4, target: Callable[..., Tensor], *kinds: Any) -> list[Scores]:
    """Return scores of each weight of all linear layers, of several kinds in one pass."""
    layers = find_layers(model, ["all"])
    accumulators = [ScoreAccumulator(layers, kind, granularity="weight") for kind in kinds]
    for sample in documents.samples:
        with lrp(model), ExitStack() as recording:
            for accumulator in accumulators:
                recording.enter_context(accumulator.recording(None, [sample.id]))
            target(model, torch.tensor([sample.input_ids])).sum().backward()
    return [accumulator.compute() for accumulator in accumulators]


def log_probability(model: Any, input_ids: Tensor) -> Tensor:
    """Return the mean log-probability of the tokens."""
    return text_log_probability(model, input_ids, None, torch.tensor([0]))


@torch.no_grad()
def perplexity(model: Any, text: WikiText2) -> float:
    """Return the perplexity over the windows."""
    nll, tokens = 0.0, 0
    for window in text.windows:
        input_ids = text.input_ids[window.start : window.end].unsqueeze(0)
        span = torch.tensor([[window.end - window.start - window.num_scored, window.end - window.start]])
        nll += score_windows(model, last_hidden_state(model, input_ids), input_ids, span)[0].item()
        tokens += window.num_scored
    return torch.tensor(nll / tokens).exp().item()


def main() -> None:
    """Measure, and print the table."""
    options = parse(
        __doc__,
        c4={"type": Path, "default": DATA / "c4" / "en.jsonl", "help": "jsonl with the documents"},
        wikitext={"type": Path, "default": DATA / "wikitext2" / "wiki.test.raw", "help": "the text for perplexity"},
        samples={"type": int, "default": 8, "help": "documents of a seed"},
        seq_len={"type": int, "default": 512, "help": "tokens of a document"},
        tokens={"type": int, "default": 4096, "help": "of the text for perplexity, in windows of 1024"},
        seeds={"type": int, "default": 3},
    )
    for option in ("c4", "wikitext"):
        if not getattr(options, option).is_file():
            sys.exit(f"--{option}: {getattr(options, option)} does not exist; give the path of a copy.")
    model = load_model(CHECKPOINT, torch.bfloat16)
    text = WikiText2(str(options.wikitext), 1024, 1024, ["disjoint"], options.tokens)
    text.setup_windows(Checkpoint(CHECKPOINT).tokenizer())
    whole = {name: layer.weight.clone() for name, layer in find_layers(model, ["all"]).items()}
    found: dict[str, dict[float, list[float]]] = {}

    def measure(name: str, scores: Scores, pattern: str = "row") -> None:
        for sparsity in SPARSITIES:

            def masks(sparsity: float = sparsity) -> Iterator[tuple[str, Tensor]]:
                return ((layer, prune_mask(score.abs(), sparsity, pattern)) for layer, score in scores.items())

            zero_(model, masks())
            found.setdefault(name, {}).setdefault(sparsity, []).append(perplexity(model, text))
            for layer, weight in whole.items():
                model.get_submodule(layer).weight.copy_(weight)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)

    dense = perplexity(model, text)
    magnitudes = {name: weight.float().abs() for name, weight in whole.items()}
    measure("magnitude, per layer", magnitudes, "layer")
    measure("magnitude", magnitudes)
    for seed in range(options.seeds):
        documents = C4(
            str(options.c4), num_samples=options.samples, seq_len=options.seq_len, seed=seed, tokenizer=CHECKPOINT
        )
        documents.setup("predict")
        wanda, by_logit = lrp_scores(model, documents, largest_logit, "wanda", "magnitude")
        (by_text,) = lrp_scores(model, documents, log_probability, "magnitude")
        measure("Wanda", wanda)
        measure("LRP of the largest logit", by_logit)
        measure("LRP of the text", by_text)
    print(
        f"{options.seeds} seeds x {options.samples} documents of {options.seq_len} tokens; bfloat16; perplexity over "
        f"{len(text.windows)} windows of 1024 tokens, {dense:.2f} of the dense model\n"
    )
    print(f"| pruned by | {' | '.join(f'{sparsity:.0%}' for sparsity in SPARSITIES)} |\n|---|---|---|---|")
    for name, by_sparsity in found.items():
        print(f"| {name} | {' | '.join(_cell(values) for values in by_sparsity.values())} |")
    write(options, {"dense": dense, **found})


def _cell(values: list[float]) -> str:
    """Write a mean with its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{error}"


if __name__ == "__main__":
    main()
