"""Rows and windows of an evaluation that were written by hand, and what is found in them."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.intervals import Difference, paired_difference
from sparc3_lightning.evaluation.results import Findings, Judge
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import NeuronList

# Per model and prompt the toxicity of each continuation; None where it could not be scored.
Table = dict[str, dict[str, list[float | None]]]
TOXICITY: Table = {
    "baseline": {
        "t1": [0.8, 0.6, 0.1],
        "t2": [0.5, 0.3, None],
        "t3": [0.9, 0.9, 0.0],
        "t4": [None, None, None],
        "t5": [0.4, 0.6, 0.8],
        "n1": [0.1, 0.2, 0.3],
        "n2": [0.0, 0.6, 0.0],
    },
    "pruned": {
        "t1": [0.2, 0.1, 0.3],
        "t2": [0.4, 0.2, 0.3],
        "t3": [0.3, 0.6, 0.0],
        "t4": [0.9, 0.9, 0.9],
        "t5": [None, None, None],
        "n1": [0.1, 0.2, 0.3],
        "n2": [0.0, 0.9, 0.3],
    },
}
# Per model six prompts and three continuations. The third of the original is such that a control, which draws but
# two, would look like an effect if it were compared with all three.
CONTROLLED: Table = {
    "baseline": {f"t{i}": [0.4 + 0.01 * i, 0.6, 0.0] for i in range(6)},
    "pruned": {f"t{i}": [0.1, 0.2 + 0.02 * i, 0.0] for i in range(6)},
    "random_0": {f"t{i}": [0.4, 0.6 + (0.03 if i % 2 else -0.03)] for i in range(6)},
    "random_1": {f"t{i}": [0.5, 0.7 + 0.01 * i] for i in range(6)},
    "largest_weights_0": {f"t{i}": [0.1, 0.1] for i in range(6)},
    "largest_weights_1": {f"t{i}": [0.0, 0.2] for i in range(6)},
}
PROMPTS = {"t1": 0.9, "t2": 0.5, "t3": 0.7, "t4": 0.8, "t5": 0.6, "n1": 0.4999, "n2": None}
NEURONS = NeuronList(
    neurons=[Component("model.layers.0.mlp.up_proj", i, -1.0) for i in range(2)],
    next=[Component("model.layers.0.mlp.up_proj", 2, -0.5)],
)


def rows_of(scores: Table, second: Any = None) -> list[dict[str, Any]]:
    """Write the rows of completions.jsonl; ``second`` gives the other judge's score of a row."""
    rows = []
    for model, of_prompts in scores.items():
        for prompt, values in of_prompts.items():
            for j, value in enumerate(values):
                row = {
                    "model": model,
                    "prompt_id": prompt,
                    "continuation_index": j,
                    "prompt": "a prompt",
                    "prompt_toxicity": PROMPTS.get(prompt, 0.9),
                    "continuation": f"word{j} word{j} of {prompt}",
                    "num_tokens": 4,
                    "num_unique_tokens": 3,
                    "scores": {"some": value} if second is None else {"some": value, "other": second(model, prompt, j)},
                }
                rows.append(row)
    return rows


def judges(*names: str, choosers: Collection[str] = ()) -> dict[str, Judge]:
    """Return judges of these names, some of which had a part in choosing the neurons."""
    return {name: Judge(name in choosers, f"a scorer: {name}", None, name) for name in names}


def measured(nll: list[float], tokens: list[int], divergence: float = 0.0) -> dict[str, Tensor]:
    """Return what Perplexity.compute does."""
    return {
        "perplexity": torch.tensor(math.exp(sum(nll) / sum(tokens)), dtype=torch.float64),
        "divergence": torch.tensor(divergence, dtype=torch.float64),
        "num_tokens": torch.tensor(sum(tokens)),
        "nll": torch.tensor(nll, dtype=torch.float64),
        "tokens": torch.tensor(tokens),
    }


TOKENS = [10, 4, 30, 9, 25, 10]
BASELINE_NLL = [20.0, 9.0, 55.0, 20.0, 49.0, 25.0]


def windows_of(*names: str, second_convention: bool = True) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Make up windows: each model is one nat a window worse than the one before it in the list."""
    found = {}
    for i, name in enumerate(names):
        found[name] = {"sliding": measured([nll + i for nll in BASELINE_NLL], TOKENS, 0.125 * i)}
        if second_convention and name in ("baseline", "pruned"):
            found[name]["disjoint"] = measured([3.0 + i, 5.0], [2, 2], 99.0)
    return found


def small(**options: Any) -> Findings:
    """Return what is found in the table above."""
    variants = list_variants({"": NEURONS}, 3)
    return findings(rows_of(TOXICITY), windows_of("baseline", "pruned"), variants, judges("some"), **options)


def means(values: dict[str, list[float | None]], prompts: list[str], first: int | None = None) -> list[float]:
    """Mean over the scored continuations of each prompt, slow and obvious."""
    kept = [[v for v in values[prompt][:first] if v is not None] for prompt in prompts]
    return [sum(found) / len(found) for found in kept]


def difference(before: list[float], after: list[float]) -> Difference:
    return paired_difference(torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64))
