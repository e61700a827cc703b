"""Sharding, in this file alone: FSDP2 over the blocks of a model; each rank reads its own rows of the weights."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint as activation_checkpoint

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import blocks_of
from sparc3_lightning.models.batching import Batching
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype, resolve_dtype
from sparc3_lightning.models.conversion import Source
from sparc3_lightning.models.keeping import load_kept
from sparc3_lightning.models.loading import (
    CAUSAL_LM,
    build_skeleton,
    check_are_weights,
    read_generation_config,
    sources_of,
    ties_of,
)
from sparc3_lightning.models.weight_files import Weight, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FSDP2(ModelParallelStrategy):
    """Shards the weights over all devices of all nodes (FSDP2, ``fully_shard``). Each rank has samples of its own."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Put all ranks into one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="Weights sharded over all devices (fully_shard)")


def load_for(
    module: L.LightningModule, checkpoint: Checkpoint, dtype: ForwardDtype, gradient_checkpointing: bool = False
) -> "PreTrainedModel":
    """Load a causal language model as the strategy of a module's trainer wants it: whole, or this rank's shard.

    Args:
        module: The module that is about to run.
        checkpoint: What to load.
        dtype: Of the weights.
        gradient_checkpointing: Compute the activations of a block again in the backward pass.
    """
    strategy = module.trainer.strategy
    device = strategy.root_device
    resolved = resolve_dtype(dtype, device)
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        if mesh.size() != strategy.world_size:
            raise ValueError(
                f"Weights are sharded over one dimension, but the mesh has {mesh.size()} data-parallel ranks of "
                f"{strategy.world_size}: use --trainer.strategy fsdp2, or set tensor_parallel_size to 1."
            )
        return load_sharded(checkpoint, resolved, mesh, device, gradient_checkpointing)
    if gradient_checkpointing:
        model = checkpoint.load(resolved)
        checkpoint_blocks_(model)
        return model
    return load_kept(checkpoint, resolved)


def is_sharded(module: L.LightningModule) -> bool:
    """Tell whether the ranks of a module's trainer hold shards of one model, and so must call it together."""
    return isinstance(module.trainer.strategy, ModelParallelStrategy)


def check_is_whole(module: L.LightningModule) -> None:
    """Raise ValueError if the model is sharded: single weights are taken out of a whole one only."""
    if is_sharded(module):
        raise ValueError("Single weights can be taken out of a whole model only: use --trainer.devices 1.")


def check_batch_size(module: L.LightningModule, batching: Batching) -> None:
    """Raise OptionError if the batch size is to be found by trying, and the model is sharded.

    A rank that is out of memory leaves the pass in which the others wait for its share of the weights.
    """
    if batching.is_auto and is_sharded(module):
        raise refused_auto(batching.group)


def refused_auto(group: str) -> OptionError:
    """Return the error of a batch size that is to be found by trying, where the model is sharded."""
    what = "auto cannot be had with --trainer.strategy fsdp2, whose ranks call the model together: give a number."
    return OptionError("batch_size", what, group)


def checkpoint_blocks_(model: nn.Module) -> None:
    """Keep only the input of each block for the backward pass, and compute the rest again there.

    transformers' own gradient checkpointing wants the training mode, in which LRP is not defined.
    """
    for block in blocks_of(model):
        block.forward = partial(
            activation_checkpoint.checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _ModesOfForward()),
        )


class _ModesOfForward:
    """Has the recomputation of a block run under the TorchFunctionModes of its forward pass, such as the LRP rules.

    The backward pass of an accelerator is on another thread, where none of them is.
    """

    def __init__(self) -> None:
        self.modes = _get_current_function_mode_stack()

    def __enter__(self) -> None:
        present = _get_current_function_mode_stack()
        self.entered = ExitStack()
        for mode in self.modes:
            if not any(mode is other for other in present):
                self.entered.enter_context(mode)

    def __exit__(self, *error: object) -> None:
        self.entered.close()


def load_sharded(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    device: torch.device,
    gradient_checkpointing: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model, a shard on each rank, in evaluation mode, with frozen weights.

    The model is built on the meta device, sharded block by block, and then each rank reads its own rows of each weight,
    one weight at a time: its peak of host memory is its shard and one tensor. Of experts that transformers fuses it
    reads its own; the parts of any other weight that is converted it reads whole.

    Args:
        checkpoint: What to load.
        dtype: Of the weights.
        mesh: One-dimensional mesh to shard over.
        device: Of this rank.
        gradient_checkpointing: Compute the activations of a block again in the backward pass.

    Raises:
        OSError: If a file of the checkpoint is missing or damaged.
        ValueError: If the files hold other tensors than the model has.
    """
    config = checkpoint.config  # before anything else is fetched
    folder = checkpoint.folder
    weights = weights_of(folder)
    check_are_weights(checkpoint.name, weights)
    generation_config = read_generation_config(checkpoint.name, folder)
    model = build_skeleton(checkpoint.name, config, weights, CAUSAL_LM, dtype)
    sources = sources_of(checkpoint.name, model, weights, CAUSAL_LM)
    if _are_tied_apart(model, weights, sources):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
        model = build_skeleton(checkpoint.name, config, weights, CAUSAL_LM, dtype)
    model.eval().requires_grad_(False)
    if gradient_checkpointing:
        checkpoint_blocks_(model)
    shard_blocks_(model, mesh)
    model.to_empty(device=device)
    _compute_buffers_(model)
    if generation_config is not None:
        model.generation_config = generation_config
    _read_shards_(model, sources, weights)
    return model


def shard_blocks_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of a model, one block at a time, and then the rest."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _are_tied_apart(model: "PreTrainedModel", weights: Mapping[str, Weight], sources: Mapping[str, Source]) -> bool:
    """Tell whether the files hold two tensors that differ where the config ties them; transformers takes both then."""
    for one, other in ties_of(model):
        first, second = sources[one].name, sources[other].name
        if first != second:
            with (
                safe_open(weights[first].file, framework="pt") as file,
                safe_open(weights[second].file, framework="pt") as file_of_other,
            ):
                rows = (file.get_slice(first), file_of_other.get_slice(second))
                # A few rows at a time, since no rank holds a whole one.
                for start in range(0, weights[first].shape[0], 4096):
                    some, others = (part[start : start + 4096].to(model.dtype) for part in rows)
                    if not torch.equal(some, others):
                        return True
    return False


def _compute_buffers_(model: "PreTrainedModel") -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, Gemma's embedding scale)."""
    persistent = set(model.state_dict())
    with torch.no_grad():
        for name, module in model.named_modules():
            buffers = [f"{name}.{buffer}".lstrip(".") for buffer, _ in module.named_buffers(recurse=False)]
            if any(buffer not in persistent for buffer in buffers):
                # transformers' own initialisation; of a weight beside the buffer too, which is read afterwards.
                model._init_weights(module)


def _read_shards_(model: "PreTrainedModel", sources: Mapping[str, Source], weights: Mapping[str, Weight]) -> None:
    persistent = set(model.state_dict())
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            local, rows = _local_rows(tensor)
            if local.numel():
                _read_rows_(model, name, local, rows, sources[name], weights)


def _read_rows_(
    model: "PreTrainedModel",
    name: str,
    local: Tensor,
    rows: slice | EllipsisType,
    source: Source,
    weights: Mapping[str, Weight],
) -> None:
    """Read some rows of a parameter into this rank's part of it."""
    of_rows = source.of_rows(rows) if isinstance(rows, slice) else None
    paths = {weights[part.name].file for part in (of_rows or source).parts}
    with ExitStack() as stack:
        # Opened for one weight at a time: the pages of a file stay in memory as long as it is open.
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        if source.converter is None:
            local.copy_(files[weights[source.name].file].get_slice(source.name)[rows])
            return

        def read(tensor: str) -> Tensor:
            return files[weights[tensor].file].get_tensor(tensor).to(local.dtype)

        weight = (of_rows or source).convert(model, read)[name]
        local.copy_(weight if of_rows else weight[rows])


def _local_rows(parameter: Tensor) -> tuple[Tensor, slice | EllipsisType]:
    """Return this rank's part of a parameter, and which of its rows these are."""
    if not isinstance(parameter, DTensor):
        return parameter, ...
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + shape[0])
