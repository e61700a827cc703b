"""Which single weights serve a behaviour most: from indexes of scores of weights, with one layer in memory at a time.

Shape letters: I inputs and O outputs of one linear layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparc3_lightning.attribution.scores import check_match, load_index
from sparc3_lightning.errors import OptionError
from sparc3_lightning.selection.criteria import lowest_of_modules
from sparc3_lightning.selection.lowest import Lowest
from sparc3_lightning.selection.neuron_list import NUM_BINS, Selected


class Layer(NamedTuple):
    """The scores of the weights of one layer, float32 of shape ``[out_features, in_features]``.

    Args:
        name: Fully qualified name.
        general_OI: Mean over the general files.
        difference_OI: Differential relevance: that less the behaviour's.
    """

    name: str
    general_OI: Tensor
    difference_OI: Tensor


class DifferentialWeights:
    """The layers of several indexes that belong together, read anew each time they are iterated over.

    Args:
        general: Indexes of scores on general reference samples, one per seed; each weighs the same.
        behavior: Index of scores on reference samples of the behaviour.

    Raises:
        FileNotFoundError, ValueError: If one is missing, damaged, not of weights, or does not match the others.
    """

    def __init__(self, general: Sequence[Path], behavior: Path) -> None:
        self.general = [load_index(path, "general") for path in general]
        self.behavior = load_index(behavior, "behavior")
        check_match([*self.general, self.behavior])

    def __iter__(self) -> Iterator[Layer]:
        for (name, behavior_OI), *of_seeds in zip(self.behavior, *self.general, strict=True):
            general_OI = torch.stack([score_OI for _, score_OI in of_seeds]).mean(dim=0)
            yield Layer(name, general_OI, general_OI - behavior_OI)


def select_weights(layers: Iterable[Layer], num_weights: int, num_ranked: int) -> Selected:
    """Select the weights with the most negative differential relevance over all layers, exactly.

    The first pass over the layers finds them; the second one bins all weights between the lowest and the highest, and
    finds the least relevant ones of the layers that weights were selected in.

    Args:
        layers: Gone through twice.
        num_weights: How many to select.
        num_ranked: How many to list, those that are selected and those that come next.

    Raises:
        ValueError: If there are fewer weights than are to be selected.
    """
    found, per_layer = Lowest(max(num_weights, num_ranked), "weight"), {}
    low, high, num_negative, of_general, of_difference = torch.inf, -torch.inf, 0, 0.0, 0.0
    for name, general_OI, difference_OI in layers:
        found.add(name, difference_OI)
        per_layer[name] = difference_OI.numel()
        low, high = min(low, difference_OI.min().item()), max(high, difference_OI.max().item())
        num_negative += int((difference_OI < 0).sum())
        of_general += float(general_OI.double().sum())
        of_difference += float(difference_OI.double().sum())
    num_candidates = sum(per_layer.values())
    if num_weights > num_candidates:
        raise OptionError(
            "num_neurons",
            f"must be between 1 and {num_candidates:,} (all weights that were scored), got {num_weights}.",
        )
    listed = found.components
    chosen, least_relevant = listed[:num_weights], []
    counts, edges = torch.zeros(NUM_BINS, dtype=torch.float64), torch.empty(0)
    for name, general_OI, difference_OI in layers:
        of_layer, edges = torch.histogram(difference_OI.double(), NUM_BINS, range=(low, high))
        counts += of_layer
        least_relevant += lowest_of_modules([n for n in chosen if n.module == name], [(name, general_OI.abs())])
    return Selected(
        chosen,
        listed[num_weights:],
        least_relevant,
        modules=list(per_layer),
        num_candidates=num_candidates,
        granularity="weight",
        num_negative=num_negative,
        histogram={"edges": edges.tolist(), "counts": counts.tolist()},
        differential_strength=100 * of_difference / of_general if of_general else float("nan"),
    )
