"""What the stages of one run keep in memory: tokenizers, and one model, as long as they are as they were loaded."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sparc3_lightning.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class _Kept:
    made_of: tuple[str, torch.dtype] | None = None
    model: "PreTrainedModel | None" = None
    state: list[object] = field(default_factory=list)
    tokenizers: dict[Checkpoint, tuple["PreTrainedTokenizerBase", str]] = field(default_factory=dict)


_KEPT: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def keeping() -> Iterator[None]:
    """Keep tokenizers and the last model for the length of a ``with`` block, for stages that run one after another."""
    token = _KEPT.set(_Kept())
    try:
        yield
    finally:
        _KEPT.reset(token)


def load_kept(checkpoint: Checkpoint, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a model, or hand out the one that was kept if it is of this checkpoint and dtype, and as it was loaded.

    Whoever calls this has the model to himself until the next call. Any other one that was kept is let go before the
    model is loaded, so that memory never holds two.
    """
    kept = _KEPT.get()
    if kept is None:
        return checkpoint.load(dtype)
    made_of = (checkpoint.fingerprint, dtype)
    if kept.model is not None and kept.made_of == made_of and state_of(kept.model) == kept.state:
        return kept.model
    kept.model = None
    gc.collect()  # a stage that has ended holds its model in cycles
    model = checkpoint.load(dtype)
    kept.model, kept.made_of, kept.state = model, made_of, state_of(model)
    return model


def load_kept_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerBase":
    """Load a tokenizer, or hand out the one that was kept if its special tokens and sides are as they were loaded."""
    kept = _KEPT.get()
    if kept is None:
        return checkpoint.tokenizer()
    found = kept.tokenizers.get(checkpoint)
    if found is None or repr(found[0]) != found[1]:
        tokenizer = checkpoint.tokenizer()
        found = kept.tokenizers[checkpoint] = tokenizer, repr(tokenizer)
    return found[0]


def state_of(model: "PreTrainedModel") -> list[object]:
    """Return what tells a model that something was done to from one that was just loaded.

    These are its config; the modules with their modes, hooks and attributes, such as a forward of their own; and of
    each tensor its place, whether it takes gradients, and two sums over its numbers: the exclusive or of their bits, in
    which no single change is lost, and the plain one, in which like changes of many do not cancel.
    """
    state: list[object] = [repr(model.config), repr(model.generation_config)]
    for name, module in model.named_modules():
        attributes = vars(module)
        hooks = [len(found) for key, found in attributes.items() if key.endswith("_hooks") and found is not None]
        state.append((name, type(module), module.training, sorted(attributes), hooks))
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            numbers = torch.hash_tensor(tensor.detach()).item(), tensor.detach().sum(dtype=torch.float32).item()
            state.append((name, tensor.dtype, tensor.device, tensor.requires_grad, tensor.grad is None, numbers))
    return state
