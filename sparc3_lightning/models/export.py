"""Writing a checkpoint: a copy of the original, file by file, in which the weights that were changed alone differ."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from sparc3_lightning.errors import OptionError, OptionFileExistsError
from sparc3_lightning.files import check_space, check_writable, temporary_folder
from sparc3_lightning.models.architectures import parameters_of
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype, resolve_dtype
from sparc3_lightning.models.components import KINDS, Component, Scored, check, kind_of, prune_
from sparc3_lightning.models.conversion import Source, Sources
from sparc3_lightning.models.neurons import add_biases_, check_have_biases
from sparc3_lightning.models.tensors import DTYPES, Added, TensorFile, rewrite
from sparc3_lightning.models.weight_files import INDEX, WHOLE, weight_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
# Files of weights. Those that the checkpoint is loaded from are copied; others do not come along. They are pickles, or
# they hold the weights as they were: a stale variant, an ONNX file or a GGUF file beside the pruned weights would be
# taken for the pruned model.
WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".h5"),
    *(".msgpack", ".ot", ".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".llamafile"),
)


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint, as an export sees them.

    Args:
        folder: Of the checkpoint.
        weights: The files that it is loaded from.
        others: All other files that come along.
        left_out: Files that do not, see ``WEIGHTS``.
    """

    folder: Path
    weights: list[TensorFile]
    others: list[Path]
    left_out: list[Path]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Files":
        """Find the files of a checkpoint.

        Raises:
            OSError: If it cannot be had, or a file of its weights is damaged.
        """
        folder = checkpoint.folder
        weights = weight_paths(folder)
        others: list[Path] = []
        left_out: list[Path] = []
        for path in sorted(folder.rglob("*")):
            *folders, name = path.relative_to(folder).parts
            # Folders such as .git and .cache belong to the tools that fetched the checkpoint.
            if any(part.startswith(".") for part in folders) or not path.is_file() or path in weights:
                continue
            is_index = path == folder / INDEX and weights != [folder / WHOLE]
            stays = name.lower().endswith(WEIGHTS) and not is_index
            (left_out if stays else others).append(path)
        return cls(folder, [TensorFile(path) for path in weights], others, left_out)

    def size(self, dtype: torch.dtype | None) -> int:
        """Return the size of the export in bytes, with weights of a dtype; None keeps theirs."""
        return sum(file.size(dtype) for file in self.weights) + sum(path.stat().st_size for path in self.others)


def check_export(
    checkpoint: Checkpoint,
    modules: Collection[str],
    granularity: Scored,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    with_means: bool = False,
    group: str = "model",
) -> None:
    """Raise, without loading weights, unless components can be pruned in an export, and there is a place for it.

    Args:
        checkpoint: To export.
        modules: Layers of the components, by their fully qualified names.
        granularity: What the components are, or were scored as.
        folder: Where to write.
        dtype: Of the weights written; None keeps the dtype of each.
        with_means: Whether neurons are to be held at their means.
        group: Of the option that names the folder.

    Raises:
        ValueError: If the weights of a layer are not made of tensors of the checkpoint's files, or could not be told
            from these again, or its architecture has no bias to put means in.
        OSError: If the folder exists, cannot be written, or has not enough space.
    """
    files, model = Files.of(checkpoint), checkpoint.skeleton()
    _check_folder(files, folder, dtype, group)
    if with_means:
        check_have_biases(model, modules)
    tensors = Tensors(checkpoint, model, files.weights)
    tensors.of(layer for module in modules for layer in KINDS[kind_of(granularity, module)].layers(model, module))


def _check_folder(files: Files, folder: Path, dtype: torch.dtype | None, group: str = "model") -> None:
    """Raise unless an export can be written to a folder, which must not exist yet."""
    if folder.exists():
        raise OptionFileExistsError("export", f": {folder} exists already; nothing was overwritten.")
    if folder.resolve().is_relative_to(files.folder.resolve()):
        raise OptionError("export", f"must lie outside of the checkpoint {files.folder}, got {folder}.")
    above = next(path for path in folder.absolute().parents if path.exists())
    check_writable(above, option=f"--{group}.export")
    check_space(above, files.size(dtype), option=f"--{group}.export")


class Tensors:
    """Which tensors of its files each weight of a checkpoint's model is made of.

    Args:
        checkpoint: The checkpoint.
        model: Its skeleton.
        files: Files of its weights.
    """

    def __init__(self, checkpoint: Checkpoint, model: "PreTrainedModel", files: Iterable[TensorFile]) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.files = {name: file for file in files for name in file.entries}
        self.sources = Sources(model, {name: file.entries[name].shape for name, file in self.files.items()})
        self.checked: set[str] = set()

    def of(self, layers: Iterable[str]) -> list[Source]:
        """Return what the weights of layers are made of, each weight once, also if several layers are views of it.

        Args:
            layers: By their fully qualified names.

        Raises:
            ValueError: If a weight is no tensor of the files, and is not put together of several, or these could not be
                told from it again.
        """
        names = dict.fromkeys(name for layer in layers for name in parameters_of(self.model, layer).values())
        found = [self._source_of(name) for name in names]
        return list({source.parameters: source for source in found}.values())

    def at(self, parameter: str) -> str:
        """Return the tensor of a weight, by its fully qualified name, which must not be put together of others."""
        source = self._source_of(parameter)
        if source.converter is not None:
            raise self._refusal(parameter)
        return source.name

    def read(self, source: Source) -> dict[str, Tensor]:
        """Return weights by their fully qualified names.

        Raises:
            ValueError: If they were not the same tensors of the files when they were written again.
        """
        weights = source.convert(self.model, lambda name: self.files[name].read(name))
        if source.converter is not None and any(
            not self.files[name].holds(name, tensor) for name, tensor in self._reverted(source, weights)
        ):
            raise self._refusal(source.parameters[0])
        return weights

    def write(self, source: Source, weights: Mapping[str, Tensor]) -> None:
        """Put weights, by their fully qualified names, in the place of what they were; what is the same stays."""
        for name, tensor in self._reverted(source, weights):
            if not self.files[name].holds(name, tensor):
                self.files[name].write(name, tensor)

    def _reverted(self, source: Source, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        names = {part.renamed: part.name for part in source.parts}
        for renamed, tensor in source.revert(self.model, weights).items():
            yield names[renamed], tensor

    def _source_of(self, parameter: str) -> Source:
        source = self.sources.found.get(parameter)
        if source is None:
            raise self._refusal(parameter)
        if parameter not in self.checked:
            dtypes = [self.files[part.name].entries[part.name].dtype for part in source.parts]
            is_one_dtype = len({*dtypes}) == 1 and dtypes[0] in DTYPES
            if not is_one_dtype or not self.sources.is_reversible(source):
                raise self._refusal(parameter)
            self.checked.update(source.parameters)
        return source

    def _refusal(self, parameter: str) -> OptionError:
        source, shape = self.sources.found.get(parameter), self.sources.wanted.get(parameter)
        if source is None or source.converter is None:
            what = (
                f"its files hold no tensor that is {parameter!r} as it is, a matrix of floating-point numbers of shape "
                f"{list(shape or ())}; save it with the save_pretrained of transformers and attribute that"
            )
        else:
            what = (
                f"the {len(source.parts)} tensors of its files that {parameter!r} is made of cannot be told from it "
                "again; save it with save_pretrained(folder, save_original_format=False) of transformers and attribute "
                "that"
            )
        return OptionError("export", f"{self.checkpoint.name!r} cannot be exported: {what}, or leave out --.export.")


class Copy:
    """A copy of a checkpoint whose weights are changed layer by layer.

    Args:
        tensors: Of the copy.
        folder: Where it lies until it is complete.
    """

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self.tensors = tensors
        self.folder = folder
        self.model = tensors.model

    @contextmanager
    def holding(self, layers: Iterable[str]) -> Iterator[None]:
        """Hold the weights of layers in ``model`` for a ``with`` block, and write them when it ends.

        Args:
            layers: By their fully qualified names.
        """
        held: list[tuple[Source, dict[str, nn.Parameter]]] = []
        for source in self.tensors.of(layers):
            held.append((source, {name: self.model.get_parameter(name) for name in source.parameters}))
            for name, weight in self.tensors.read(source).items():
                self._set(name, nn.Parameter(weight, requires_grad=False))
        yield
        for source, empty in held:
            self.tensors.write(source, {name: self.model.get_parameter(name).data for name in empty})
            for name, parameter in empty.items():
                self._set(name, parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, key = name.rpartition(".")
        setattr(self.model.get_submodule(owner), key, parameter)


@contextmanager
def copied(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None = None, held_at_means: Collection[str] = ()
) -> Iterator[Copy]:
    """Copy a checkpoint; what a ``with`` block makes of the copy appears in the folder when the block ends.

    All files come along byte for byte but ``WEIGHTS`` in other formats; the files of the weights keep their names,
    metadata and tensors. No more of the weights is in memory than what the copy holds.

    Args:
        checkpoint: The original.
        folder: Where to write; must not exist yet. It appears when it is complete.
        dtype: Of all floating-point tensors written; None keeps the dtype of each.
        held_at_means: Layers of neurons whose means go into biases; where the architecture has these switched off,
            biases of 0 are added.

    Raises:
        OSError: If the folder exists, cannot be written, or has not enough space.
        ValueError: If the means have no place in the architecture.
    """
    files, model = Files.of(checkpoint), checkpoint.skeleton()
    _check_folder(files, folder, dtype)
    tensors = Tensors(checkpoint, model, files.weights)
    added = _add_biases(tensors, held_at_means)
    with temporary_folder(folder) as temporary:
        copies = []
        for source in files.weights:
            target = _make_place(source.path, files, temporary)
            if dtype is None and not added[source.path]:
                shutil.copyfile(source.path, target)
            else:
                rewrite(source, target, dtype, added[source.path])
            copies.append(TensorFile(target))
        for path in files.others:
            shutil.copyfile(path, _make_place(path, files, temporary))
        changes: dict[str, object] = {}
        if dtype is not None:
            changes["dtype"] = str(dtype).removeprefix("torch.")
        if any(added.values()):
            changes["mlp_bias"] = True
        if changes:
            _change_config(temporary / CONFIG, changes)
            _change_index(temporary / INDEX, copies, {name for of_file in added.values() for name in of_file})
        yield Copy(Tensors(checkpoint, model, copies), temporary)
        temporary.replace(folder)
    if files.left_out:
        names = ", ".join(str(path.relative_to(files.folder)) for path in files.left_out)
        rank_zero_info(f"Weights that the checkpoint is not loaded from were left out of {folder}: {names}")


def _make_place(path: Path, files: Files, folder: Path) -> Path:
    """Return the path that a file of the original has in a folder."""
    target = folder / path.relative_to(files.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _add_biases(tensors: Tensors, modules: Collection[str]) -> dict[Path, dict[str, Added]]:
    """Add biases to a model on the meta device if the columns of these layers have none.

    Returns:
        The tensors to add to each file: a bias lies beside its weight.
    """
    model, added = tensors.model, defaultdict[Path, dict[str, Added]](dict)
    if modules:
        before = set(model.state_dict())
        check_have_biases(model, modules)
        add_biases_(model, modules)
        for name in [name for name in model.state_dict() if name not in before]:
            weight = tensors.at(f"{name.removesuffix('bias')}weight")
            bias = Added(weight, list(model.get_parameter(name).shape))
            added[tensors.files[weight].path][f"{weight.removesuffix('weight')}bias"] = bias
    return added


def _change_config(path: Path, changes: dict[str, object]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if "torch_dtype" in config and "dtype" in changes:  # what older versions of transformers call it
        changes = {**changes, "torch_dtype": changes["dtype"]}
    path.write_text(json.dumps({**config, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _change_index(path: Path, files: Sequence[TensorFile], added: Collection[str]) -> None:
    """Correct the index of the weights, if there is one: what was added, and the total size."""
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    named = index["weight_map"].keys() | added
    entries = {name: (file.path.name, entry) for file in files for name, entry in file.entries.items() if name in named}
    index["weight_map"] |= {name: entries[name][0] for name in added}
    index["metadata"] = {
        **(index.get("metadata") or {}),
        "total_size": sum(entry.end - entry.begin for _, entry in entries.values()),
    }
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_dtype_of(option: Dtype) -> torch.dtype | None:
    """Return the dtype that an option asks for; None, for ``auto``, keeps the dtype of each weight."""
    return None if option == "auto" else resolve_dtype(option, torch.device("cpu"))


def export_pruned(
    checkpoint: Checkpoint,
    neurons: Collection[Component],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Write a copy of the checkpoint with the effect of ``mask`` in its weights, see ``copied`` and ``prune_``.

    Args:
        checkpoint: The original.
        neurons: What is pruned, of any kinds.
        folder: Where to write; must not exist yet.
        dtype: Of the weights written; None keeps the dtype of each.
        texts: Files of text to put beside the weights, by name, in the place of the original's of that name.
        note: Called with the fingerprint of the copy when it is complete, before it appears: by what was noted, a
            caller who died can tell whether the folder is this copy.

    Raises:
        OSError, ValueError: As ``copied``; or if the model has no such component.
    """
    model = checkpoint.skeleton()
    check(model, neurons)
    together: dict[str, list[Component]] = defaultdict(list)  # all that is done in one MLP, attention or set of experts
    for neuron in neurons:
        weight = next(iter(parameters_of(model, neuron.module).values()))
        together[weight.rsplit(".", 2)[0]].append(neuron)
    held_at_means = {neuron.module for neuron in neurons if neuron.mean}
    with copied(checkpoint, folder, dtype, held_at_means) as copy:
        for part in together.values():
            layers = [layer for neuron in part for layer in KINDS[neuron.granularity].layers(copy.model, neuron.module)]
            with copy.holding(dict.fromkeys(layers)):
                prune_(copy.model, part)
        for name, text in (texts or {}).items():
            (copy.folder / name).write_text(text, encoding="utf-8")
        if note is not None:
            note(Checkpoint(str(copy.folder.absolute())).fingerprint)
