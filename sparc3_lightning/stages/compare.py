"""The overlap of circuits: which neurons several behaviours share, and which serve one alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from sparc3_lightning.attribution.scores import ScoreFile, average, check_match
from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import write_atomically
from sparc3_lightning.models.architectures import layer_of
from sparc3_lightning.models.components import Component, Key, counts_of
from sparc3_lightning.report.comparison import COMPARISON, ComparisonResults, Listed, neurons_csv, summary
from sparc3_lightning.report.drawing import draw_or_warn
from sparc3_lightning.selection.criteria import Scores, differential_relevance, normalized_difference
from sparc3_lightning.selection.neuron_list import SELECTION, NeuronList, ScoredIn, SelectionResults
from sparc3_lightning.selection.overlap import find_classes, find_correlations, find_overlaps, find_profiles
from sparc3_lightning.stages.base import Stage, paths_of
from sparc3_lightning.stages.folders import giving_back
from sparc3_lightning.stages.prune import NEURONS

MAX_LISTS = 10  # which have 1,023 combinations


class Sides(NamedTuple):
    """The score files of a behaviour."""

    general: list[ScoreFile]
    behavior: ScoreFile


class Comparison(Stage):
    """Compares the pruned neurons of several behaviours, and the differential relevance of all neurons.

    Of lists of single weights the pruned ones alone are compared.

    Args:
        neurons: The neurons.json of each behaviour, two or more, all of one checkpoint.
        names: Of the behaviours, in the same order; None names each after the folder of its neurons.json.
        general: Score files of general text, averaged, the same for every behaviour; None takes those that each
            neurons.json names.
        behaviors: Score file of each behaviour, in the order of ``neurons``; None takes the one that each neurons.json
            names. If those are gone, and none is given, the pruned neurons alone are compared.
        normalize: Divide each side by its own total before the subtraction, for sides that differ in method, target or
            length.
        num_candidates: Neurons that the pruned ones were chosen from; None takes the number in the score files, or
            else in the selection.json beside each neurons.json.
    """

    verb = "compare"
    OUTPUTS = (COMPARISON,)

    def __init__(
        self,
        neurons: tuple[Path, ...] | Path,
        names: Sequence[str] | None = None,
        general: tuple[Path, ...] | Path | None = None,
        behaviors: tuple[Path, ...] | Path | None = None,
        normalize: bool = False,
        num_candidates: int | None = None,
    ) -> None:
        super().__init__()
        self.paths = paths_of(neurons)
        self.general = None if general is None else paths_of(general)
        self.behaviors = None if behaviors is None else paths_of(behaviors)
        if not 2 <= len(self.paths) <= MAX_LISTS:
            raise OptionError(
                "neurons",
                f"must name from 2 to {MAX_LISTS} files, such as '[a/neurons.json, b/neurons.json]', "
                f"got {len(self.paths)}.",
            )
        for option, values in (("names", names), ("behaviors", self.behaviors)):
            if values is not None and len(values) != len(self.paths):
                raise OptionError(
                    option,
                    f"must have one entry for each of the {len(self.paths)} files of --.neurons, got {len(values)}.",
                )
        if self.general is not None and not self.general:
            raise OptionError("general", "must name at least one score file.")
        self.save_hyperparameters()
        self.names = _names_of(self.paths) if names is None else list(names)
        if len(set(self.names)) < len(self.names) or not all(self.names):
            raise OptionError("names", f"Each list needs a name of its own, got {self.names}: give --.names.")
        self.normalize = normalize
        self.num_candidates = num_candidates

    @giving_back()
    def compare(self, folder: Path) -> str:
        """Compare the lists, and write everything about it to a folder.

        Writes compare.json, overlap.csv and neurons.csv and, as pictures, overlap.png and layers.png; correlation.png
        too if there are score files.

        Args:
            folder: Where to write.

        Returns:
            The tables, as text for the terminal.

        Raises:
            FileNotFoundError, ValueError: If a file is missing, damaged, or of another checkpoint than the others; if
                the score files lack a neuron of a list; if the number of candidates is not known.
            FileExistsError: If the folder holds a compare.json.
        """
        self.begin(folder)
        lists = [NeuronList.load(path) for path in self.paths]
        self._check_same_model(lists)
        components = {n.key: n for n in sorted((n for pruned in lists for n in pruned.neurons), key=_place)}
        keys, kinds = list(components), counts_of(components.values())
        sides = None if "weight" in kinds else self._load_sides(lists)
        member_SN = torch.tensor([[key in held for key in keys] for held in map(_keys, lists)])
        sizes = {} if sides is None else {name: len(score) for name, score in sides[0].behavior.scores.items()}
        rows = _rows(keys, sizes) if sizes else None
        num_candidates = self._count_candidates(sizes, len(keys))
        self.keep_config()
        results = ComparisonResults(
            checkpoint=lists[0].origin.get("checkpoint"),
            checkpoint_fingerprint=lists[0].origin.get("checkpoint_fingerprint"),
            num_candidates=num_candidates,
            granularity=_scored(lists[0]) or "+".join(kinds),
            normalize=self.normalize,
            lists=[self._describe(i, pruned, sides) for i, pruned in enumerate(lists)],
            overlaps=find_overlaps(self.names, keys, member_SN, sizes, num_candidates),
            layers=find_profiles(self.names, keys, member_SN, sizes),
        )
        of_pruned = None
        if sides is not None:
            differential_SN, general_SN = self._differential(sides)
            of_pruned = differential_SN[:, rows]
            correlation = find_correlations(differential_SN, general_SN)
            by_kind = {"all": differential_SN, "pruned": of_pruned}
            classes = {name: find_classes(self.names, values_SN) for name, values_SN in by_kind.items()}
            results = replace(results, correlation=correlation, classes=classes)
        write_atomically(folder / "neurons.csv", neurons_csv(self.names, components, lists, of_pruned))
        results.save(self.output)
        draw_or_warn(folder)
        return f"\n{summary(results)}\n\nComparison: {self.output}"

    def _check_same_model(self, lists: Sequence[NeuronList]) -> None:
        """Raise ValueError if two lists differ in checkpoint, layers or granularity."""
        found = [pruned.origin for pruned in lists]
        shared: dict[str, Sequence[object]] = {
            "checkpoint_fingerprint": [origin.get("checkpoint_fingerprint") for origin in found],
            "layers": [_spec(pruned).get("layers") for pruned in lists],
            "granularity": [_scored(pruned) or pruned.granularity for pruned in lists],
        }
        for name, values in shared.items():
            for path, value in zip(self.paths, values, strict=True):
                if value != values[0]:
                    raise OptionError(
                        "neurons",
                        f": the lists cannot be compared: {name} is {values[0]!r} in "
                        f"{self.paths[0]} but {value!r} in {path}.",
                    )
        if any("weight" in pruned.granularity for pruned in lists):
            if self.general is not None or self.behaviors is not None:
                raise OptionError("general", "and --.behaviors are for neurons: weights are compared without scores.")
            rank_zero_warn("Lists of weights are compared without scores: there are no correlations and no classes.")

    def _load_sides(self, lists: Sequence[NeuronList]) -> list[Sides] | None:
        """Read the score files of each behaviour; None, with a warning, if none was asked for and one is gone."""
        paths = [self._score_paths(i, pruned) for i, pruned in enumerate(lists)]
        lacking = next((name for name, found in zip(self.names, paths, strict=True) if not all(found)), None)
        gone = next((path for found in paths for side in found for path in side if not path.is_file()), None)
        if lacking is not None or gone is not None:
            what = f"The score file {gone} does not exist" if gone else f"The neurons.json of {lacking!r} names none"
            what += ": give --.general and --.behaviors."
            if self.general is not None or self.behaviors is not None:
                raise OptionFileNotFoundError("general", what)
            warning = OptionError("general", f"Without score files there are no correlations and no classes. {what}")
            rank_zero_warn(str(warning))
            return None
        files = {path: ScoreFile.load(path) for found in paths for side in found for path in side}
        sides = [Sides([files[path] for path in general], files[behavior]) for general, (behavior,) in paths]
        for i, (pruned, side) in enumerate(zip(lists, sides, strict=True)):
            self._check_side(i, pruned, side)
        check_match([side.behavior for side in sides], of_one_kind=False)
        return sides

    def _score_paths(self, i: int, pruned: NeuronList) -> tuple[list[Path], list[Path]]:
        """Return the score files, general and of the behaviour, as given or else as neurons.json names them."""
        general = self.general or [Path(file["path"]) for file in pruned.origin.get("general", ())]
        if self.behaviors is not None:
            return general, [self.behaviors[i]]
        return general, [Path(file["path"]) for file in [pruned.origin.get("behavior")] if file]

    def _check_side(self, i: int, pruned: NeuronList, side: Sides) -> None:
        """Refuse score files that are not those a list was selected from, or that cannot be subtracted."""
        recorded: list[tuple[ScoreFile, ScoredIn | None]] = []
        recorded += [] if self.general else list(zip(side.general, pruned.origin["general"], strict=True))
        recorded += [] if self.behaviors else [(side.behavior, pruned.origin["behavior"])]
        for file, side_then in recorded:
            then: dict[str, object] = {} if side_then is None else {**side_then, **side_then.get("spec", {})}
            for name, now in {"data_fingerprint": file.provenance.data_fingerprint, **file.provenance.shared()}.items():
                if name in then and then[name] != now:
                    raise OptionError(
                        "general",
                        f"{file.path} is no longer the score file that {self.paths[i]} was selected from: {name} was "
                        f"{then[name]!r} and is {now!r}. Give --.general and --.behaviors, or prune "
                        "again.",
                    )
        fingerprint = pruned.origin.get("checkpoint_fingerprint")
        if fingerprint not in (None, side.behavior.provenance.checkpoint_fingerprint):
            raise ValueError(
                f"The score file {side.behavior.path} belongs to another checkpoint than {self.paths[i]}: "
                f"{side.behavior.provenance.checkpoint_fingerprint!r}, expected {fingerprint!r}."
            )
        check_match(side.general)
        check_match([side.general[0], side.behavior], of_one_kind=False)
        if not self.normalize:
            try:
                check_match([side.general[0], side.behavior])
            except ValueError as error:
                raise OptionError("normalize", f"{error} --.normalize true compares the shares of each side.") from None

    def _count_candidates(self, sizes: dict[str, int], num_pruned: int) -> int:
        """Return the number of neurons that the lists were chosen from."""
        number = sum(sizes.values()) if self.num_candidates is None else self.num_candidates
        if self.num_candidates is None and not sizes:
            beside = [path.parent / SELECTION for path in self.paths]
            found = {SelectionResults.load(path).num_candidates if path.is_file() else 0 for path in beside}
            number = max(found)
            if len(found) > 1 or not number:
                raise OptionError(
                    "num_candidates",
                    "The number of neurons that the lists were chosen from is not known, as there are neither score "
                    f"files nor a {SELECTION} beside each list that agree: give --.num_candidates, layers times "
                    "intermediate size.",
                )
        if number < num_pruned:
            raise OptionError("num_candidates", f"is {number:,}, but the lists hold {num_pruned:,} neurons.")
        return number

    def _describe(self, i: int, pruned: NeuronList, sides: Sequence[Sides] | None) -> Listed:
        return Listed(
            name=self.names[i],
            neurons=str(self.paths[i]),
            num_neurons=len(pruned.neurons),
            num_layers=len({layer_of(neuron.module) for neuron in pruned.neurons}),
            criterion=pruned.origin.get("criterion"),
            general=[str(file.path) for file in sides[i].general] if sides else None,
            behavior=str(sides[i].behavior.path) if sides else None,
        )

    def _differential(self, sides: Sequence[Sides]) -> tuple[Tensor, Tensor]:
        """Return the differential relevance and the general scores, each of shape ``[behaviours, neurons]``."""
        subtract = normalized_difference if self.normalize else differential_relevance
        general = [average(side.general) for side in sides]
        differential = [subtract(mean, side.behavior.scores) for mean, side in zip(general, sides, strict=True)]
        return _stack(differential), _stack(general)


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Name each list after its folder, with as many of the folders above as tell them apart."""
    places = [(path.parent if path.name == NEURONS else path.with_suffix("")).absolute() for path in paths]
    depth = max(len(place.parts) for place in places)
    names = [["/".join(place.parts[-number:]) for place in places] for number in range(1, depth + 1)]
    return next((found for found in names if len(set(found)) == len(found)), names[-1])


def _scored(pruned: NeuronList) -> str | None:
    """Return what was scored where a list says by which scores it was selected."""
    granularity = _spec(pruned).get("granularity")
    return None if granularity is None else str(granularity)


def _spec(pruned: NeuronList) -> dict[str, object]:
    """Return what was computed of the behaviour's samples, as far as a list says it."""
    behavior = pruned.origin.get("behavior")
    return {} if behavior is None else behavior.get("spec", {})


def _place(component: Component) -> tuple[object, ...]:
    """Return what a component comes by in tables: its layer, then its place there."""
    module, place = component.module, (component.index, -1 if component.input is None else component.input)
    return layer_of(module), module, *place, component.granularity


def _keys(pruned: NeuronList) -> set[Key]:
    return {neuron.key for neuron in pruned.neurons}


def _rows(keys: Sequence[Key], sizes: dict[str, int]) -> list[int]:
    """Return the place of each neuron when all modules are counted one after the other."""
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    for module, index, *_ in keys:
        if not 0 <= index < sizes.get(module, 0):
            raise OptionError("neurons", f"The score files hold no neuron {index} of {module}, which --.neurons names.")
    return [starts[module] + index for module, index, *_ in keys]


def _stack(of_behaviors: Sequence[Scores]) -> Tensor:
    """Return scores as float64, shape ``[behaviours, neurons]``."""
    return torch.stack([torch.cat([scores[name] for name in of_behaviors[0]]).double() for scores in of_behaviors])
