"""Single weights of tiny models, chosen and scored, and the same selection over all of them at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed
from torch import Tensor

from sparc3_lightning.attribution.scores import INDEX, Provenance, ShardWriter
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import select_neurons

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
FAMILIES = ["llama", "gpt2"]
OUT = Path("out")
both_families = pytest.mark.parametrize("family", FAMILIES)


def logits(model: Any, input_ids: Tensor = INPUT_IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def chosen_of(model: Any, per_layer: int = 3, dampings: tuple[float, ...] = (1.0,)) -> list[Component]:
    """Return weights of every linear layer but the head, among them its last one."""
    draw = torch.Generator().manual_seed(0)
    weights = []
    for name, layer in find_layers(model, ["all"]).items():
        rows, columns = weight_of(layer).shape
        places = [rows * columns - 1, *torch.randperm(rows * columns - 1, generator=draw)[: per_layer - 1].tolist()]
        for place in places:
            damping = dampings[len(weights) % len(dampings)]
            weights.append(
                Component(name, place // columns, -1.0, damping, granularity="weight", input=place % columns)
            )
    return weights


PROVENANCE = Provenance(
    "tiny",
    "files:abc",
    ScoreSpec("lrp", "attnlrp", "magnitude", layers=["up_proj"], dtype="float32", granularity="weight"),
    {},
    "c",
    1,
    2,
    3,
    0,
)
SHAPES = {name: (24, 16) for i in range(2) for name in [f"model.layers.{i}.mlp.up_proj"]}


def in_memory(scores: dict[str, Tensor], number: int) -> list[Component]:
    """Select over all weights at once, as neurons are selected."""
    found = select_neurons({name: score.flatten() for name, score in scores.items()}, number)
    columns = {name: score.shape[1] for name, score in scores.items()}
    return [
        Component(
            n.module, n.index // columns[n.module], n.score, granularity="weight", input=n.index % columns[n.module]
        )
        for n in found
    ]


def scores_of(seed: int, scale: float = 1.0, shapes: dict[str, Any] = SHAPES) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.rand(tuple(shape), generator=draw) for name, shape in shapes.items()}


def write(folder: str, scores: dict[str, Tensor], of: Provenance = PROVENANCE, **changes: Any) -> Path:
    writer = ShardWriter(Path(folder), {name: score.shape for name, score in scores.items()})
    for name, score in scores.items():
        writer.add(name, score)
    writer.close(changed(of, **{"data_fingerprint": folder, **changes}))
    return Path(folder) / INDEX
