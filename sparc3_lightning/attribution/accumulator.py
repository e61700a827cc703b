"""The accumulator: hooks in, over a stream of samples, and one score per neuron or per weight out."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from sparc3_lightning.attribution.activations import mean_activations
from sparc3_lightning.attribution.relevance import (
    Relevance,
    absolute_relevance,
    fisher_information,
    head_relevance,
    magnitude_relevance,
    signed_relevance,
    squared_norms,
    squared_relevance,
    wanda_score,
    weight_relevance,
)
from sparc3_lightning.attribution.spec import Nonfinite, Score, check_granularity
from sparc3_lightning.attribution.unfolding import Unfolding, tokens_seen
from sparc3_lightning.distributed import gather_rows, num_ranks
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import Linear, shape_of, weight_of, whole_weights
from sparc3_lightning.models.components import Granularity, Scored, kind_of
from sparc3_lightning.models.experts import ExpertLinear
from sparc3_lightning.models.heads import sum_heads

# How relevance is formed: from the weight of a layer, its input and its gradient, and the inputs of each head; or from
# its output and its gradient alone. That of weights is added up row by row.
_OF_HEADS: dict[str, Callable[..., Tensor]] = {form: partial(head_relevance, form=form) for form in get_args(Relevance)}
OF_INPUT: dict[Granularity, dict[str, Callable[..., Tensor]]] = {
    "neuron": {"magnitude": magnitude_relevance},
    "head": _OF_HEADS,
    "channel": _OF_HEADS,
}
OF_OUTPUT = {"signed": signed_relevance, "absolute": absolute_relevance, "squared": squared_relevance}
# Batches between two looks at whether all was finite, on an accelerator: the host waits for it then.
CHECK_EVERY = 16
_TOKENS = "tokens/"  # before the name of a module of experts whose sum is the tokens that each of them saw
_ODD = "odd/"  # before the name of a module whose sum is of every second sample


class NonfiniteRelevanceError(OptionError):
    """A relevance is NaN or infinite."""


@dataclass(frozen=True)
class Costs:
    """What costs need beside the samples of a batch.

    Args:
        chunk: Tokens of a chunk, over which relevance is summed before it is squared.
        num_tokens: Tokens of all samples, which the sums are divided by.
        odd: Names of every second sample, whose sums are kept apart: how alike the halves are says how noisy costs are.
    """

    chunk: int
    num_tokens: int
    odd: Collection[str] = ()


class ScoreAccumulator:
    """Collects the scores of linear layers over a stream of samples.

    For relevance, run the model inside ``with lrp(model), accumulator.recording(...)`` and call ``backward`` there:
    each layer's score is formed as its gradient arrives, so that neither gradients nor activations are kept. For Wanda
    and activations a forward pass suffices. Nothing makes the host wait for an accelerator, but for ``check`` at times.

    Scores of weights are summed in float32 on the device. Of several ranks each keeps the sums of its own rows.

    Args:
        modules: The target layers by their fully qualified name; for ``activation`` and ``fisher`` by that name the
            layers whose inputs are the activations of the target's neurons.
        score: ``magnitude``, ``signed``, ``absolute`` or ``squared`` relevance, ``fisher`` (a cost), ``wanda`` or
            ``activation``.
        nonfinite: On NaN or infinity ``error`` names the module and the sample and stops; ``zero`` puts 0 in place of
            the value and counts it in ``num_nonfinite``.
        granularity: One score for each ``neuron``, summed over its incoming weights; for each attention ``head`` or
            ``channel``, summed over its outgoing weights; for each neuron and channel; or for each ``weight``.
        head_dims: Of each module, the inputs that belong to one head, or to one channel, 1; for these.
        parts: Of each module, which rows are those of its neurons; for neurons, by default all.
        twins: Layers that have the weight of a module too. The scores of all uses of a weight are added up.
        costs: For ``fisher``.

    Raises:
        ValueError: If the score is not defined for weights, as squared and absolute relevance are not; if a module
            with heads is not the last layer of an attention.
    """

    def __init__(
        self,
        modules: Mapping[str, Linear],
        score: Score,
        nonfinite: Nonfinite = "error",
        granularity: Scored = "neuron",
        head_dims: Mapping[str, int] | None = None,
        parts: Mapping[str, slice] | None = None,
        twins: Mapping[Linear, Sequence[Linear]] | None = None,
        costs: Costs | None = None,
    ) -> None:
        check_granularity(granularity, score, modules)
        assert (score == "fisher") == (costs is not None)
        self.modules = dict(modules)
        self.score = score
        self.nonfinite = nonfinite
        self.granularity = granularity
        self.head_dims = head_dims or {}
        self.parts = parts or {}
        self.twins = twins or {}
        self.costs = costs
        self.sums: dict[str, Tensor] = {}
        self.num_samples = 0
        self._nonfinite: int | Tensor = 0
        self._unchecked: list[tuple[Tensor, list[str]]] = []
        self._batch: dict[str, Tensor] = {}
        self._called: set[str] = set()
        self._experts = {
            name.rsplit(".", 2)[0]: module.experts
            for name, module in self.modules.items()
            if isinstance(module, ExpertLinear)
        }
        self._routed: dict[str, Tensor] = {}

    @property
    def num_nonfinite(self) -> int:
        """How many values were NaN or infinite and count as 0."""
        return int(self._nonfinite)

    @num_nonfinite.setter
    def num_nonfinite(self, number: int) -> None:
        self._nonfinite = number

    @property
    def sums_weights(self) -> bool:
        """Whether there is a sum for each weight. Wanda's scores of weights need sums for the inputs alone."""
        return self.granularity == "weight" and self.score != "wanda"

    @contextmanager
    def recording(
        self, mask_BT: Tensor | None, sample_ids: list[str], weights: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Record one batch, and add it to the sums on leaving the block: all of it or, on an error, nothing.

        Args:
            mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.
            sample_ids: Names of the samples, for errors.
            weights: 1 for a sample, 0 for one that only fills the batch; by default all 1.

        Raises:
            OptionError: If a module gets no score.
            NonfiniteRelevanceError: If a score is NaN or infinite and ``nonfinite`` is ``error``: on a CPU at once,
                and nothing of the batch is added to the sums of neurons; on an accelerator at the next ``check``.
        """
        self._batch, self._called, self._routed = {}, set(), {}
        real = [i for i, weight in enumerate(weights) if weight] if weights is not None else range(len(sample_ids))
        layers = [
            (name, layer) for name, module in self.modules.items() for layer in (module, *self.twins.get(module, ()))
        ]
        if self.costs is not None:
            hook = partial(self._cost_hook, self.costs.chunk, mask_BT, len(sample_ids))
            handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
        else:
            handles = [
                layer.register_forward_hook(self._hook(name, mask_BT, real, len(sample_ids)), prepend=True)
                for name, layer in layers
            ]
        handles += [
            experts.register_forward_hook(self._counter(name, mask_BT, real, len(sample_ids)))
            for name, experts in self._experts.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.costs is not None:
            self._batch = {name: fisher_information(S_GI, len(sample_ids)) for name, S_GI in self._batch.items()}
        self._batch |= self._unseen(len(sample_ids))
        missing = self.modules.keys() - self._batch.keys()
        if missing:
            raise OptionError("layers", self._without_score(missing))
        if len(real) < len(sample_ids):  # the last batch, if any
            kept = torch.tensor(real, dtype=torch.long)
            self._batch = {name: score[kept.to(score.device)] for name, score in self._batch.items()}
            sample_ids = [sample_ids[i] for i in real]
        num_nonfinite = self._replace_nonfinite()
        added = {f"{_TOKENS}{name}": count for name, count in self._routed.items()}
        # In double: the order of batches and ranks leaves no trace.
        if self.costs is not None:
            for half, is_odd in (("", False), (_ODD, True)):
                places = [i for i, name in enumerate(sample_ids) if (name in self.costs.odd) is is_odd]
                rows = torch.tensor(places, dtype=torch.long)
                for name, score in self._batch.items():
                    added[f"{half}{name}"] = _sum(score[rows.to(score.device)])
        elif not self.sums_weights:
            added |= {name: _sum(score) for name, score in self._batch.items()}
        totals = {name: self.sums[name] + number if name in self.sums else number for name, number in added.items()}
        self._watch(sample_ids)
        # Memory may have run out anywhere above, and the batch come again: nothing of it was added yet.
        self.sums.update(totals)
        self._nonfinite = num_nonfinite
        self.num_samples += len(real)
        self._batch = {}

    def _without_score(self, missing: Collection[str]) -> str:
        """Return a sentence on modules to which no score arrived, with the names of the others."""
        ends, others = ({name.rpartition(".")[2] for name in names} for names in (missing, self._batch))
        way = f"'[{', '.join(sorted(others - ends))}]'" if others - ends else "others"
        return (
            f"No score arrived for {len(missing)} module(s), e.g. {sorted(missing)[0]}, since the model does not call "
            f"them as layers or no gradient reaches them: give --.layers {way}."
        )

    def check(self) -> None:
        """Look whether all scores since the last look were finite.

        Raises:
            NonfiniteRelevanceError: If one was not; the first module and sample are named.
        """
        for finite, sample_ids in self._unchecked:
            bad = (~finite).nonzero().tolist()
            if bad:
                module, sample = bad[0]
                self._unchecked = []
                raise NonfiniteRelevanceError(
                    "nonfinite",
                    f"The score of {list(self.modules)[module]} for sample {sample_ids[sample]!r} is NaN or infinite "
                    f"(and {len(bad) - 1} more module-sample pairs of this batch). Try --.dtype float32; or put 0 "
                    "in place of such values and count them, with --.nonfinite zero.",
                )
        self._unchecked = []

    def reduce_(self) -> None:
        """Add up the sums of all ranks. Only sums cross ranks, never means or weights."""
        self.check()
        if num_ranks() == 1:
            return
        device = next(iter(self.sums.values())).device
        counts = torch.tensor([self.num_samples, self.num_nonfinite], device=device)
        torch.distributed.all_reduce(counts)
        self.num_samples, self.num_nonfinite = counts.tolist()
        if not self.sums_weights:  # those are of all ranks already
            names = sorted(self.sums)
            flat = torch.cat([self.sums[name] for name in names])
            torch.distributed.all_reduce(flat)
            sizes = [len(self.sums[name]) for name in names]
            self.sums = dict(zip(names, flat.split(sizes), strict=True))

    @property
    def expert_tokens(self) -> dict[str, Tensor]:
        """How many tokens each expert saw, shape ``[experts]``, by the name of the module of experts."""
        return {name: self.sums[f"{_TOKENS}{name}"] for name in self._experts}

    def compute(self) -> dict[str, Tensor]:
        """Return all scores, see ``each``."""
        return dict(self.each())

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each module and its scores, float32 on the CPU; all ranks must ask together.

        Relevance and activations are the mean over the samples; Wanda's norm is over all tokens of all samples, and
        costs are the mean over these.

        Yields:
            Name, and scores of shape ``[neurons]``, ``[heads]``, ``[channels]`` or, of weights, ``[out_features,
            in_features]``.

        Raises:
            ValueError: If no sample was recorded.
            NonfiniteRelevanceError: As ``check``.
        """
        self.check()
        if not self.num_samples:
            raise ValueError("No sample was recorded, so there is no score.")
        if self.score == "wanda":
            for name, weight in whole_weights(self.modules):
                kind = kind_of(self.granularity, name)
                score = wanda_score(weight[self._part(name)], self.sums[name], kind == "neuron")
                if kind in ("head", "channel"):
                    score = sum_heads(score.sum(dim=0), self.head_dims[name])
                yield name, score.float().cpu()
            return
        if self.costs is not None:
            for name in self.modules:
                total = self.sums[name] + self.sums[f"{_ODD}{name}"]
                yield name, (total / self.costs.num_tokens).float().cpu()
            return
        for name, module in self.modules.items():
            # Of an expert that saw no token no weight has a sum.
            total = self.sums[name] if name in self.sums else torch.zeros(shape_of(module))
            rows = gather_rows(total, shape_of(module)[0]) if self.sums_weights else total
            yield name, (rows / self.num_samples).float().cpu()

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """The sums of costs over every second sample, and over those between, shape ``[components of all modules]``."""
        even, odd = (torch.cat([self.sums[f"{half}{name}"] for name in self.modules]).cpu() for half in ("", _ODD))
        return even, odd

    def _part(self, name: str) -> slice:
        """Return which rows of a module are scored."""
        return self.parts.get(name, slice(None))

    def _hook(
        self, name: str, mask_BT: Tensor | None, real: Sequence[int], num_samples: int
    ) -> Callable[[Linear, tuple[Tensor], Tensor], None]:
        def record(module: Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            self._called.add(name)
            unfold = Unfolding(module, mask_BT, num_samples)
            A_BTI = unfold(inputs[0])
            if self.score == "wanda":
                self._set(name, squared_norms(A_BTI, unfold.mask_BT))
                return
            if self.score == "activation":
                self._set(name, mean_activations(A_BTI.abs(), unfold.mask_BT, unfold.num_tokens))
                return
            # All weights are frozen: the graph begins here, at the first target, and not at the embeddings.
            output.requires_grad_()

            part = self._part(name)

            def weight() -> Tensor:  # asked for in the backward pass, where that of a sharded model is whole
                return weight_of(module).detach()

            if self.sums_weights:
                output.register_hook(lambda G: self._add_weights(name, weight(), A_BTI, unfold(G), real))
            elif of_input := OF_INPUT[kind_of(self.granularity, name)].get(self.score):
                dims = [self.head_dims[name]] if name in self.head_dims else []
                output.register_hook(
                    lambda G: self._set(name, of_input(weight()[part], A_BTI, unfold(G)[..., part], *dims))
                )
            else:
                Z_BTO = unfold(output if module.bias is None else output.detach() - module.bias.detach())[..., part]
                of_output = OF_OUTPUT[self.score]
                output.register_hook(lambda G: self._set(name, of_output(Z_BTO, unfold(G)[..., part])))

        return record

    def _cost_hook(
        self, chunk: int, mask_BT: Tensor | None, num_samples: int, name: str
    ) -> Callable[[Linear, tuple[Tensor]], tuple[Tensor]]:
        def record(module: Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
            self._called.add(name)
            unfold = Unfolding(module, mask_BT, num_samples, chunk)
            # A tensor of this layer alone, whose gradient is that through the layer. All weights are frozen: the graph
            # begins here, at the first of the layers.
            A = inputs[0].view_as(inputs[0]).requires_grad_()
            values = A.detach()

            def take(G: Tensor) -> None:
                S_GI = signed_relevance(unfold(values), unfold(G))
                self._set(name, sum_heads(S_GI, self.head_dims.get(name, 1)))

            A.register_hook(take)
            return (A,)

        return record

    def _counter(
        self, name: str, mask_BT: Tensor | None, real: Sequence[int], num_samples: int
    ) -> Callable[[nn.Module, object, Tensor], None]:
        def count(experts: nn.Module, inputs: object, output: Tensor) -> None:
            self._routed[name] = tokens_seen(experts, mask_BT, real, num_samples)
            if torch.is_grad_enabled():
                # Here the graph begins if no target of the block got a token: on every rank at the same block.
                output.requires_grad_()

        return count

    def _unseen(self, num_samples: int) -> dict[str, Tensor]:
        """Return the scores of layers of experts to which no token of the batch was routed: 0."""
        of_inputs = self.score in ("wanda", "activation", "fisher")
        return {
            name: counts.new_zeros(num_samples, module.in_features if of_inputs else module.out_features)
            for name, module in self.modules.items()
            if isinstance(module, ExpertLinear)
            and name not in self._called
            and (counts := self._routed.get(name.rsplit(".", 2)[0])) is not None
        }

    def _set(self, name: str, score: Tensor) -> None:
        """Take the score of a layer for the samples of the batch; of one that is used several times, of one use."""
        score = score.detach()
        self._batch[name] = self._batch[name] + score if name in self._batch else score

    def _add_weights(self, name: str, W_OI: Tensor, A_BTI: Tensor, G_BTO: Tensor, real: Sequence[int]) -> None:
        """Add the relevance of each weight to the sums; keep the sums over rows for the check of NaN and infinity."""
        ranks = num_ranks()
        if ranks > 1:
            padded = torch.zeros(-(-len(W_OI) // ranks) * ranks, W_OI.shape[1], device=W_OI.device)
            into = padded[: len(W_OI)]
        else:
            if name not in self.sums:  # not setdefault, which would form the zeros in every batch
                self.sums[name] = torch.zeros(W_OI.shape, device=W_OI.device)
            into = self.sums[name]
        score = torch.zeros(len(A_BTI), len(W_OI), device=W_OI.device)
        for i in real:
            for rows, R_OI in weight_relevance(W_OI, A_BTI[i], G_BTO[i]):
                if self.score == "magnitude":
                    R_OI.abs_()
                if self.nonfinite == "zero":
                    self._nonfinite = self._nonfinite + (~torch.isfinite(R_OI)).sum()
                    R_OI.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                score[i, rows] = R_OI.sum(dim=1, dtype=torch.float32)
                into[rows] += R_OI
        if ranks > 1:
            own = torch.empty_like(padded[: len(padded) // ranks])
            torch.distributed.reduce_scatter_tensor(own, padded)
            self.sums[name] = self.sums[name] + own if name in self.sums else own
        self._set(name, score)

    def _replace_nonfinite(self) -> int | Tensor:
        """Put 0 in place of NaN and infinity in the batch if that is asked for; return how many there are by now."""
        number = self._nonfinite
        if self.nonfinite == "zero":
            for name, score in self._batch.items():
                number = number + (~torch.isfinite(score)).sum()
                self._batch[name] = torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
        return number

    def _watch(self, sample_ids: list[str]) -> None:
        if self.nonfinite == "zero":
            return
        finite = torch.stack([torch.isfinite(self._batch[name]).all(dim=1) for name in self.modules])
        self._unchecked.append((finite, sample_ids))
        if finite.device.type == "cpu" or len(self._unchecked) >= CHECK_EVERY:
            self.check()


def _sum(score: Tensor) -> Tensor:
    """Add up the scores of samples, in float64."""
    return score.sum(dim=0, dtype=torch.float64)
