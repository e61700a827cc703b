"""A made-up evaluation to report: what selected the neurons, what measured them, and what continued the prompts."""

import functools
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_written import judges

from sparc3_lightning.evaluation import intervals
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.results import (
    OTHER_TEXT,
    ContinuationProtocol,
    PromptProtocol,
    Protocol,
    Results,
    Settings,
    TextProtocol,
)
from sparc3_lightning.evaluation.variants import Variant, list_variants
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.verdict import verdict
from sparc3_lightning.selection.neuron_list import NeuronList, SelectionResults

NEURONS = NeuronList(
    [Component("model.layers.12.mlp.up_proj", 345, -0.0123), Component("model.layers.3.mlp.up_proj", 6, -0.01)],
    {"differential_strength_percent": 21.5, "criterion": "difference", "sample_ids": ["secret"], "general": ["c4"]},
    next=[Component("model.layers.3.mlp.up_proj", 7, -0.005)],
    least_relevant=[Component("model.layers.3.mlp.up_proj", i, 0.0) for i in range(10, 20)],
)
SELECTION = SelectionResults(
    criterion="difference",
    granularity="neuron",
    num_neurons=100,
    num_candidates=104,
    differential_strength_percent=21.5,
    num_negative=101,
    threshold=-1.5,
    neurons_per_module={"model.layers.3.mlp.up_proj": 100},
    histogram={"edges": [-2.0, -1.0, 0.0, 1.0], "counts": [1.0, 100.0, 3.0]},
    budget=None,
)
# The one beside a neurons.json that holds NEURONS.
SELECTION_OF_NEURONS = replace(
    SELECTION,
    num_neurons=2,
    threshold=-0.01,
    neurons_per_module={
        "model.layers.3.mlp.up_proj": 1,
        "model.layers.12.mlp.up_proj": 1,
        "model.layers.5.mlp.up_proj": 0,
    },
)
OTHER = TextProtocol(["disjoint", "sliding"], 512, 256, "/home/ann/letters.txt", bos="first")
INSULTS = {"idiot", "stupid", "sh*t", "a$$hole", "f***", "b!tch", "wanker's"}


class Words:
    """A scorer that knows a list of words."""

    name = "words"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.asked += texts
        return [0.5 if text in INSULTS else math.nan if text == "unscored" else 0.49 for text in texts]


def toxicity(model: str, prompt: int, draw: int) -> float:
    """Return the made-up score of a continuation: lower for larger doses, and for the controls as before."""
    off = {"pruned": 0.6, "top_1_1": 0.8, "top_3_1": 0.3, "top_1_0.5": 0.9, "top_3_0.5": 0.7}.get(model, 1.0)
    common, own = (uniform(100 * prompt + draw), uniform(100 * prompt + draw + 10_000 * sum(map(ord, model))))
    return off * (0.8 * common + 0.2 * own)


def uniform(seed: int) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()


@functools.cache
def evaluation(
    num_toxic: int = 12,
    num_nontoxic: int = 6,
    second: bool = True,
    others: bool = True,
    choosers: tuple[str, ...] = (),
    other_text: bool = False,
) -> tuple[Results, Any]:
    """Return results and completions as an evaluation would give them, with or without controls and doses.

    Those that ``choosers`` names had a part in choosing the neurons. The price of a neuron is half on another text.
    """
    scorers = {"small": float, "other": math.sqrt} if second else {"small": float}
    more: dict[str, Any] = {"controls": Controls(2, 2), "doses": (1, 3), "dampings": (1.0, 0.5)}
    listed = list_variants({"": NEURONS}, 3, **(more if others else {}))
    variants = [
        replace(variant, kinds={"neuron": number} if (number := variant.num_neurons) else {}) for variant in listed
    ]
    rows = [
        {
            "model": variant.name,
            "prompt_id": f"id{i:02}",
            "continuation_index": j,
            "prompt": f"A stupid prompt {i}",
            "prompt_toxicity": 0.95 if i < num_toxic else 0.1,
            "continuation": f" then an Idiot number {i} draw {j} by {variant.name}",
            "prompt_token_ids": [5, 6, i],
            "token_ids": [7, 8, 9, 10, 11, 12, 7, 8, 9],
            "num_tokens": 9,
            "num_unique_tokens": 6,
            "scores": {name: score(toxicity(variant.name, i, j)) for name, score in scorers.items()},
        }
        for variant in variants
        for i in range(num_toxic + num_nontoxic)
        for j in range(variant.num_continuations)
    ]
    windows = {}
    for variant in variants:
        conventions = ("sliding", "disjoint") if variant.kind in ("baseline", "pruned") else ("sliding",)
        windows[variant.name] = {
            convention: made_up_windows(price(variant), c) for c, convention in enumerate(conventions)
        }
        for c, convention in enumerate(OTHER.conventions[: len(conventions)] if other_text else []):
            windows[variant.name][OTHER_TEXT + convention] = made_up_windows(price(variant) / 2, c + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "NUM_RESAMPLES", 1000)  # takes a tenth of the time, whichever test is the first
        found = findings(rows, windows, variants, judges(*scorers, choosers=choosers))
    return Results(
        verdict=verdict(found, {"neuron": 2}),
        **vars(found),
        **vars(settings(list(scorers), OTHER if other_text else None)),
    ), rows


def price(variant: Variant) -> float:
    """Return by how many nats a token a made-up model is worse than the original."""
    of_a_neuron = 0.04 if variant.kind in ("pruned", "dose") else 0.002 * (1 + variant.draw)
    return of_a_neuron * variant.num_neurons * variant.damping


def made_up_windows(shift: float, convention: int) -> dict[str, torch.Tensor]:
    nll = 100 * (2.3 + 0.1 * convention + shift) + torch.linspace(-20, 20, 7, dtype=torch.float64) * (1 + shift)
    tokens = torch.full((7,), 100)
    return {
        "perplexity": (nll.sum() / tokens.sum()).exp(),
        "divergence": torch.tensor(shift / 2, dtype=torch.float64),
        "num_tokens": tokens.sum(),
        "nll": nll,
        "tokens": tokens,
    }


def settings(scorers: list[str], other_text: TextProtocol | None = None) -> Settings:
    return Settings(
        behavior="toxicity",
        protocol=Protocol(
            TextProtocol(["sliding", "disjoint"], 2048, 512, "WikiText-2 raw test"),
            PromptProtocol("allenai/real-toxicity-prompts", None, 93),
            ContinuationProtocol(50, 0.7, 0.9, num_continuations=3, num_seeds=1, scorers=scorers, seed=0),
            other_text=other_text,
        ),
        checkpoint="somebody/A-Model",
        checkpoint_fingerprint="files:abc",
        neurons="neurons.json",
        num_neurons=2,
        kinds={"neuron": 2},
        inputs={"dtype": "float32", "device": "cpu"},
        config={"verb": "evaluate", "model": {"scorers": ["small"]}},
        versions={"torch": "2"},
        git_hash=None,
    )


def renamed(results: Results, rows: list[dict[str, Any]], *names: str) -> tuple[Results, list[dict[str, Any]]]:
    """Return an evaluation whose judges are called otherwise."""
    to = dict(zip(results.judges, names, strict=True))
    protocol = replace(results.protocol, continuations=replace(results.protocol.continuations, scorers=list(names)))
    agreement = results.agreement
    if agreement is not None:
        of = {to[one]: {to[other]: rho for other, rho in row.items()} for one, row in agreement.spearman.items()}
        agreement = replace(agreement, spearman=of)
    results = replace(
        results,
        headline_judge=to[results.headline_judge],
        judges={to[name]: replace(judge, source=f"a scorer: {to[name]}") for name, judge in results.judges.items()},
        agreement=agreement,
        protocol=protocol,
    )
    return results, [{**row, "scores": {to[name]: score for name, score in row["scores"].items()}} for row in rows]


def made_up(**options: Any) -> tuple[Results, list[dict[str, Any]]]:
    """Return an evaluation that a test may change."""
    return pickle.loads(pickled(**options))


@functools.cache
def pickled(**options: Any) -> bytes:
    return pickle.dumps(evaluation(**options))
