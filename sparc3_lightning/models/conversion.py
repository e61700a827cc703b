"""What the parameters of a model are made of: tensors of files, as transformers renames and converts them, and back.

transformers keeps the experts of a block in fused parameters, while most files hold a tensor for each expert and
matrix. Its own converters put these together, and take them apart again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A tensor of the files that a parameter is made of.

    Args:
        name: In the files.
        renamed: In the model's words, before it is converted.
        pattern: By which a converter knows it; None if the tensor is the parameter.
    """

    name: str
    renamed: str
    pattern: str | None


@dataclass(frozen=True)
class Source:
    """What a parameter is made of, or several parameters that are converted together.

    Args:
        parameters: Their fully qualified names.
        parts: The tensors, in the order in which they are put together.
        converter: That of transformers; None if the parameter is the one tensor.
    """

    parameters: tuple[str, ...]
    parts: tuple[Part, ...]
    converter: "WeightConverter | None"

    @property
    def name(self) -> str:
        """Name in the files, if the parameter is the one tensor."""
        return self.parts[0].name

    def convert(self, model: "PreTrainedModel", read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by their fully qualified names.

        Args:
            model: That they are of; one on the meta device suffices.
            read: Returns a tensor, by its name in the files.
        """
        (first, *_) = self.parameters
        if self.converter is None:
            return {first: read(self.name)}
        tensors = ((part.name, part.pattern, read(part.name)) for part in self.parts)
        return _converted(deepcopy(self.converter), first, tensors, model)

    def revert(self, model: "PreTrainedModel", parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that parameters are made of, by their names as in ``Part.renamed``.

        Args:
            model: That they are of; one on the meta device suffices.
            parameters: All of them, by their fully qualified names.

        Raises:
            Exception: Whatever transformers raises of a conversion that it cannot revert.
        """
        (first, *_) = self.parameters
        if self.converter is None:
            return {self.parts[0].renamed: parameters[first]}
        # A copy, since it writes into the one that it reverts.
        converter = cast("WeightConverter", deepcopy(self.converter).reverse_transform())
        tensors = ((name, converter.rename_source_key(name)[1], parameters[name]) for name in self.parameters)
        return _converted(converter, converter.rename_source_key(first)[0], tensors, model)

    def of_rows(self, rows: slice) -> "Source | None":
        """Return what some rows of a parameter are made of, if each row is made of tensors of its own, as an expert is.

        None if the whole parameter is needed.
        """
        from transformers.core_model_loading import Concatenate, MergeModulelist

        if self.converter is None:
            return None
        merge, *others = self.converter.operations
        beside = all(isinstance(other, Concatenate) and other.dim != 0 for other in others)
        if not (isinstance(merge, MergeModulelist) and merge.dim == 0 and beside):
            return None
        by_pattern: dict[str | None, list[Part]] = defaultdict(list)
        for part in self.parts:
            by_pattern[part.pattern].append(part)
        return replace(self, parts=tuple(part for parts in by_pattern.values() for part in parts[rows]))


class Differences(NamedTuple):
    """How tensors of files differ from what parameters are made of.

    Args:
        missing: Names of tensors that the files lack.
        unexpected: Names of tensors that have no place.
        mismatched: Tensors of other shapes, with both.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


class Sources:
    """What each parameter and each buffer of a model is made of.

    Args:
        model: One on the meta device suffices.
        shapes: Of the tensors of its files, by name.
    """

    def __init__(self, model: "PreTrainedModel", shapes: Mapping[str, Sequence[int]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_converters,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        self.model = model
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.wanted: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.found: dict[str, Source] = {}
        self.left: list[str] = []  # names of tensors that the model has no place for
        conversions = get_model_conversion_mapping(model)
        renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
        converters = [step for step in conversions if isinstance(step, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        parts: dict[str, list[Part]] = defaultdict(list)
        for name in sorted(self.shapes, key=dot_natural_key):  # as transformers loads them
            renamed = apply_renamings(name, renamings)
            converted, pattern = apply_converters(renamed, converters)
            target, _ = rename_source_key(converted, [], [], model.base_model_prefix, self.wanted)
            if target not in self.wanted and name in self.wanted:
                converted, pattern = name, None
                target, _ = rename_source_key(name, [], [], model.base_model_prefix, self.wanted)
            if target not in self.wanted:
                self.left.append(name)
                continue
            if pattern is None:
                renamed = target
            elif len(target) > len(converted):  # a checkpoint of the model without its head lacks the prefix
                renamed = target.removesuffix(converted) + renamed
            else:
                renamed = renamed.removeprefix(converted.removesuffix(target))
            parts[target].append(Part(name, renamed, pattern))
        for target, of_target in parts.items():
            pattern = of_target[0].pattern
            source = Source((target,), tuple(of_target), None if pattern is None else by_pattern[pattern])
            source = replace(source, parameters=self._parameters_of(source))
            for parameter in source.parameters:
                self.found.setdefault(parameter, source)

    def is_reversible(self, source: Source) -> bool:
        """Tell whether the tensors of a source, one of ``found``, could be made of its parameters again."""
        shapes = {part.renamed: self.shapes[part.name] for part in source.parts}
        return len(shapes) == len(source.parts) and self._reverted_shapes(source) == shapes

    def differences(self, source: Source) -> Differences:
        """Compare the tensors of a source, one of ``found``, with those that its parameters are made of."""
        wanted, misfits = self._reverted_shapes(source), self._misfits(source)
        if wanted is None:
            return Differences([], [], misfits)
        first: dict[str, Part] = {}
        for part in source.parts:
            first.setdefault(part.renamed, part)
        missing = [_as_in_files(name, source) for name in wanted if name not in first]
        unexpected = [part.name for part in source.parts if part.renamed not in wanted or first[part.renamed] != part]
        if misfits:
            found = {name: self.shapes[part.name] for name, part in first.items() if name in wanted}
            mismatched = [
                f"{first[name].name} {list(shape)} for {list(wanted[name])}"
                for name, shape in found.items()
                if shape != wanted[name]
            ]
            misfits = mismatched or (misfits if not missing and not unexpected else [])
        return Differences(missing, unexpected, misfits)

    def _reverted_shapes(self, source: Source) -> dict[str, Shape] | None:
        """Return the shapes of the tensors that parameters are made of, by ``Part.renamed``; None if it cannot be said.

        That is so where transformers cannot revert the conversion to names that it would convert again.
        """
        empty = {name: torch.empty(self.wanted[name], device="meta") for name in source.parameters}
        try:
            reverted = source.revert(self.model, empty)
        except Exception:  # whatever it raises of what it cannot revert
            return None
        if source.converter is not None and any(
            source.converter.rename_source_key(name)[0] != source.parameters[0] for name in reverted
        ):
            return None
        return {name: tuple(tensor.shape) for name, tensor in reverted.items()}

    def _misfits(self, source: Source) -> list[str]:
        """Return the parameters of a source that its tensors do not make up, with what they make up in their place."""
        try:
            made = source.convert(self.model, self._empty)
        except Exception:  # whatever it raises of what does not fit
            return [f"what {name} is made of" for name in source.parameters]
        shapes = {name: list(made[name].shape) if name in made else None for name in source.parameters}
        return [
            f"{name} {shape} for {list(self.wanted[name])}"
            for name, shape in shapes.items()
            if shape != list(self.wanted[name])
        ]

    def _parameters_of(self, source: Source) -> tuple[str, ...]:
        """Return all parameters that are made of the tensors of one of them."""
        converter = source.converter
        if converter is None or (len(converter.target_patterns) == 1 and "*" not in converter.target_patterns[0]):
            return source.parameters
        try:
            made = source.convert(self.model, self._empty)
        except Exception:  # whatever it raises of what does not fit
            return source.parameters
        return tuple(made) if made.keys() <= self.wanted.keys() else source.parameters

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def _converted(
    converter: "WeightConverter",
    first: str,
    tensors: Iterable[tuple[str, str | None, Tensor]],
    model: "PreTrainedModel",
) -> dict[str, Tensor]:
    """Return what a converter makes, by name.

    Args:
        converter: That of transformers.
        first: Name of the first tensor that it makes.
        tensors: Name, pattern and values of those that it makes it of; it lets go of them on the way.
        model: That they are of.
    """
    collect: Callable[..., None] = converter.add_tensor  # typed as if files were read by other threads only
    for name, pattern, tensor in tensors:
        collect(first, name, pattern, tensor)
    made = converter.convert(first, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _as_in_files(renamed: str, source: Source) -> str:
    """Return the name that a tensor has in the files, as the first one of its source has: they begin differently."""
    first = source.parts[0]
    letters = zip(reversed(first.name), reversed(first.renamed), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], letters))
    before = first.renamed[: len(first.renamed) - same]
    return first.name[: len(first.name) - same] + renamed.removeprefix(before)
