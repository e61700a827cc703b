"""Activations of neurons: their mean over each sample's tokens, kept beside the scores of the same pass."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparc3_lightning.attribution.tensor_file import load_tensors, save_tensors
from sparc3_lightning.attribution.unfolding import Unfolding
from sparc3_lightning.errors import OptionFileNotFoundError
from sparc3_lightning.files import Count, parse_json, read_as
from sparc3_lightning.models.architectures import Linear, stored
from sparc3_lightning.models.experts import ExpertLinear

ACTIVATIONS = "activations.safetensors"
FORMAT = "sparc3_lightning activations 2"


class ActivationRecorder:
    """Keeps, for each sample, the mean over its tokens of each neuron's activation.

    Args:
        columns: By the name of the module that is scored, the layer whose input is its neurons' activations.
        twins: Layers that have the weight of a column too. The mean is over all uses of a weight.
    """

    def __init__(self, columns: Mapping[str, Linear], twins: Mapping[Linear, Sequence[Linear]] | None = None) -> None:
        self.columns = dict(columns)
        self.twins = twins or {}
        self._rows: dict[str, list[Tensor]] = {name: [] for name in columns}

    @contextmanager
    def recording(self, mask_BT: Tensor | None, weights: Sequence[int]) -> Iterator[None]:
        """Record one batch.

        Args:
            mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.
            weights: 1 for a sample, 0 for one that only fills the batch.
        """
        batch: dict[str, list[Tensor]] = defaultdict(list)

        def recorder(name: str) -> Callable[[Linear, tuple[Tensor]], None]:
            def record(module: Linear, inputs: tuple[Tensor]) -> None:
                unfold = Unfolding(module, mask_BT, len(weights))
                means = mean_activations(unfold(inputs[0]), unfold.mask_BT, unfold.num_tokens)
                batch[name].append(means[[i for i, weight in enumerate(weights) if weight]])

            return record

        with ExitStack() as undo:
            for name, column in self.columns.items():
                for layer in (column, *self.twins.get(column, ())):
                    undo.callback(layer.register_forward_pre_hook(recorder(name)).remove)
            yield
        # Gradient checkpointing calls a layer a second time, in the backward pass: the mean remains what it is.
        kept = sum(map(bool, weights))
        for name, column in self.columns.items():
            if name in batch:
                self._rows[name].append(torch.stack(batch[name]).mean(dim=0))
            elif isinstance(column, ExpertLinear):  # no token of the batch was routed to the expert
                device = next(iter(batch.values()))[0].device if batch else None
                self._rows[name].append(torch.zeros(kept, column.in_features, device=device))

    def rows(self) -> dict[str, Tensor]:
        """Return per module a row for each sample so far, shape ``[samples, neurons]``, float32 on the CPU."""
        for name, rows in self._rows.items():
            self._rows[name] = [torch.cat(rows)] if rows else []
        return {name: rows[0].float().cpu() for name, rows in self._rows.items() if rows}

    def restore(self, rows: Mapping[str, Tensor]) -> None:
        """Put rows of samples that were recorded before in front."""
        for name, column in self.columns.items():
            if name in rows:
                self._rows[name] = [rows[name].to(stored(column).device)]


def mean_activations(A_BTI: Tensor, mask_BT: Tensor | None, num_tokens: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens, shape ``[samples, neurons]``, float32 or wider.

    Of a neuron of an expert it is over all tokens of the sample too: it is 0 at those that the expert did not see.

    Args:
        A_BTI: Activations, shape ``[samples, tokens, neurons]``.
        mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.
        num_tokens: Tokens of each sample, shape ``[samples, 1]``, if they are not all there.
    """
    wide = A_BTI.to(torch.promote_types(A_BTI.dtype, torch.float32))
    if mask_BT is None:
        return wide.mean(dim=1)
    return (wide * mask_BT.unsqueeze(-1)).sum(dim=1) / (
        mask_BT.sum(dim=1, keepdim=True) if num_tokens is None else num_tokens
    )


@dataclass(frozen=True)
class Activations:
    """The content of activations.safetensors.

    Args:
        rows: Per module, the mean activation of each neuron in each sample, shape ``[samples, neurons]``, float32.
        sample_ids: Of each row.
        num_tokens: Tokens of each sample.
    """

    rows: dict[str, Tensor]
    sample_ids: list[str]
    num_tokens: list[int]

    @classmethod
    def join(cls, parts: Sequence[tuple[list[str], dict[str, Tensor]]], lengths: Mapping[str, int]) -> "Activations":
        """Put the samples of all ranks together, in one order whatever the number of ranks.

        Args:
            parts: Of each rank the names of its samples, and its rows.
            lengths: Tokens of each sample, in the order that the samples get.

        Raises:
            ValueError: If a rank does not have one row for each of its samples.
        """
        for ids, rows in parts:
            for module, rows_SN in rows.items():
                if len(rows_SN) != len(ids):
                    raise ValueError(
                        f"{len(rows_SN)} rows of activations of {module} are there for {len(ids)} samples, so that "
                        "they cannot be told apart: remove the files state-*.safetensors, if any, and attribute again."
                    )
        place = {name: i for i, name in enumerate(lengths)}
        names = [name for ids, _ in parts for name in ids]
        order = sorted(range(len(names)), key=lambda i: place[names[i]])
        modules = next(rows for _, rows in parts if rows)
        rows = {module: torch.cat([part[module] for _, part in parts if part])[order] for module in modules}
        ids = [names[i] for i in order]
        return cls(rows, ids, [lengths[name] for name in ids])

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, and rename it."""
        metadata = {
            "format": FORMAT,
            "sample_ids": json.dumps(self.sample_ids),
            "num_tokens": json.dumps(self.num_tokens),
        }
        save_tensors(path, self.rows, metadata)

    @classmethod
    def load(cls, path: Path) -> "Activations":
        """Read the file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or not a file of activations.
        """
        if not path.is_file():
            raise OptionFileNotFoundError(
                "activations",
                f"{path} does not exist: run 'sparc3 attribute' with --.activations true, which writes it beside "
                "the scores.",
            )
        rows, metadata = load_tensors(path, FORMAT)
        try:
            ids = read_as(list[str], parse_json(metadata.get("sample_ids", "null")), "sample_ids")
            lengths = read_as(list[Count], parse_json(metadata.get("num_tokens", "null")), "num_tokens")
            shapes = {tuple(of_module.shape[:1]) for of_module in rows.values() if of_module.dim() == 2}
            if len(ids) != len(lengths) or shapes != {(len(ids),)}:
                raise ValueError("it does not hold one row and one length for each sample")
        except ValueError as error:
            raise ValueError(f"{path} is not a file of activations, or is damaged: {error}.") from None
        return cls(rows, ids, lengths)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean activation of each neuron over all tokens, per module, shape ``[neurons]``, float64."""
        weight = torch.tensor(self.num_tokens, dtype=torch.float64)
        return {name: weight @ rows.double() / weight.sum() for name, rows in self.rows.items()}
