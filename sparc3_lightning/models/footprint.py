"""What passes through a model cost, in operations and memory: without weights, data or devices, by fake tensors.

The very code of a run is carried out, on tensors that have a shape and no numbers, and every operation of torch that it
comes to is counted. Ranks are simulated by torch's fake process group. The experts of a block are taken to get equally
many tokens of each sample, since where tokens are routed depends on the numbers. Blocks that are alike cost alike: two
shallow models are measured, and a straight line through both leads to the depth of the model.
"""

import copy
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import masking_utils

from sparc3_lightning.models import experts
from sparc3_lightning.models.architectures import blocks_of
from sparc3_lightning.models.loading import CAUSAL_LM, build_skeleton, in_short
from sparc3_lightning.models.sharding import checkpoint_blocks_, shard_blocks_

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

aten = torch.ops.aten
# Blocks of the two models that are measured. From the third on a block costs what the next one does: the first has less
# of a backward pass, and of sharded blocks the next one is gathered ahead.
DEPTHS = (3, 5)
# torch's counter knows the attention of an accelerator, and not that of a CPU.
OPERATIONS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, out_val=None, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, out_val=None, **__: sdpa_backward_flop_count(
            gradient.shape, query.shape, key.shape, value.shape
        )
    ),
}
RATE_SECONDS = 2.0


@dataclass(frozen=True)
class Cost:
    """What a device does and holds.

    Args:
        operations: Floating-point operations; a product and its sum are two.
        weights: Bytes of the weights and buffers that it holds all the time.
        peaks: Most bytes at a time, with those, in each phase: before the blocks, in their forward pass, behind them,
            and in their backward pass.
    """

    operations: float
    weights: float
    peaks: tuple[float, ...]

    @property
    def peak(self) -> float:
        """Most bytes at a time."""
        return max(self.peaks)

    def towards(self, other: "Cost", share: float) -> "Cost":
        """Return the cost on the straight line through both, 0 being this one and 1 the other.

        What is most of a shallow model, such as the embeddings that are gathered at the beginning, need not be most of
        a deep one: each phase has a line of its own.
        """

        def on(one: float, next_one: float) -> float:
            return one + share * (next_one - one)

        peaks = tuple(map(on, self.peaks, other.peaks))
        return Cost(on(self.operations, other.operations), on(self.weights, other.weights), peaks)


@dataclass(frozen=True)
class Layout:
    """How a model lies on devices, and how its backward pass is carried out.

    Args:
        num_ranks: Devices, each with samples of its own.
        is_sharded: Whether each holds its share of the weights (FSDP2), or all of them.
        gradient_checkpointing: Whether the activations of a block are computed again in the backward pass.
    """

    num_ranks: int = 1
    is_sharded: bool = False
    gradient_checkpointing: bool = False


class Meter(TorchDispatchMode):
    """Counts the operations of a ``with`` block, and the bytes of the tensors that live at a time.

    Where code asks for the numbers of a fake tensor it is told what holds in a run without errors: all is true, nothing
    is found, and nothing is larger.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0
        self.now = 0
        self.phase = 0
        self.peaks = [0, 0, 0, 0]
        self._bytes: dict[int, int] = {}

    def follow(self, blocks: Sequence[nn.Module]) -> None:
        """Note from here on in which phase a pass through a model is, see ``Cost``."""

        def enter(phase: int) -> None:
            self.phase = phase

        def leave(module: nn.Module, inputs: object, output: object) -> None:
            enter(2)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: enter(3))

        blocks[0].register_forward_pre_hook(lambda *_: enter(1))
        blocks[-1].register_forward_hook(leave)

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor, as long as its memory lives."""
        self._watch(tensor.untyped_storage())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._bytes:
            weakref.finalize(storage, self._forget, key)
        self.now += storage.nbytes() - self._bytes.get(key, 0)
        self._bytes[key] = storage.nbytes()
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._bytes.pop(key)

    def __enter__(self) -> Any:
        # FSDP2 gives memory back, and takes it again, in the storage of the same tensor.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if id(storage) in self._bytes:
                self._watch(storage)

        self._patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_fake = bool(args) and isinstance(args[0], FakeTensor)
        if is_fake and func is aten._local_scalar_dense.default:
            return getattr(args[0], "holds", False) if args[0].dtype == torch.bool else 1
        if is_fake and func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if is_fake and func is aten.bincount.default:
            return args[0].new_empty(args[2])
        if is_fake and func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        result = func(*args, **kwargs)
        if is_fake and func in (aten.all.default, aten.all.dim):
            result.holds = True
        if (formula := OPERATIONS.get(getattr(func, "_overloadpacket", None))) is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self.watch(tensor)
        return result


def _places(index: Tensor | None) -> Iterator[Tensor | None]:
    """Yield what an index stands for: of a mask, of which nothing is true, no places along each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        yield index
    else:
        yield from (index.new_empty(0, dtype=torch.long) for _ in range(index.dim()))


Run = Callable[["PreTrainedModel", Meter], "float | None"]


def cost_of(
    name: str,
    config: "PretrainedConfig",
    dtype: torch.dtype,
    layout: Layout,
    run: Run,
    prepare: Callable[["PreTrainedModel"], None] = lambda model: None,
) -> Cost:
    """Return what code costs each device that runs it with a model.

    Args:
        name: Of the checkpoint, for errors.
        config: Of the model.
        dtype: Of its weights.
        layout: Of the model.
        run: The code. It is called with models whose weights have no numbers, and with what counts; it may return a
            number of operations, to take in place of those that were counted.
        prepare: Called with each model before its tensors are fake.

    Raises:
        ValueError: If the config describes no model that can be built, or one whose costs depend on the numbers.
    """
    skeleton = build_skeleton(name, config, None, CAUSAL_LM, dtype)
    depth = len(blocks_of(skeleton))
    found = []
    for shallow in DEPTHS if _are_alike(skeleton) and depth > DEPTHS[-1] else (depth,):
        try:
            found.append(_cost(name, _cut(config, shallow, depth), dtype, layout, run, prepare))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{name!r} cannot be estimated, since it carries out an operation whose cost depends on the numbers "
                f"({in_short(error)})."
            ) from error
    if len(found) == 1:
        return found[0]
    return found[0].towards(found[1], (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def _cost(
    name: str,
    config: "PretrainedConfig",
    dtype: torch.dtype,
    layout: Layout,
    run: Run,
    prepare: Callable[["PreTrainedModel"], None],
) -> Cost:
    model = build_skeleton(name, config, None, CAUSAL_LM, dtype).eval().requires_grad_(False)
    with ExitStack() as stack:
        if layout.num_ranks > 1:
            stack.enter_context(_ranks(layout.num_ranks))
        if layout.gradient_checkpointing:
            checkpoint_blocks_(model)
        if layout.is_sharded:
            shard_blocks_(model, torch.distributed.init_device_mesh("cpu", (layout.num_ranks,)))
        prepare(model)
        # Of fake tensors transformers asks no numbers, and forms every mask. The meter answers as without padding.
        stack.enter_context(patch.object(masking_utils, "is_tracing", lambda *_: False))
        stack.enter_context(_equal_shares(getattr(config.get_text_config(), "num_experts_per_tok", 1)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu")
        if not layout.is_sharded:  # a tensor on the meta device cannot become another one in place
            model.tie_weights()
        meter = stack.enter_context(Meter())
        for tensor in (*model.parameters(), *model.buffers()):
            meter.watch(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        weights = meter.now
        meter.follow(blocks_of(model))
        operations = run(model, meter)
        return Cost(meter.operations if operations is None else operations, weights, tuple(meter.peaks))


def _are_alike(skeleton: "PreTrainedModel") -> bool:
    """Tell whether all blocks of a model on the meta device have the same parts, and attend alike."""
    kinds = {
        (type(block), *((name, parameter.shape) for name, parameter in block.named_parameters()))
        for block in blocks_of(skeleton)
    }
    config = skeleton.config.get_text_config()
    attentions = set(getattr(config, "layer_types", None) or ())
    # Only of a model that has a block for each of these layers is it known which ones a smaller number leaves out.
    return len(kinds) == 1 and len(attentions) < 2 and config.num_hidden_layers == len(blocks_of(skeleton))


def _cut(config: "PretrainedConfig", depth: int, whole: int) -> "PretrainedConfig":
    """Return the config of a model with fewer blocks."""
    if depth == whole:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


@contextmanager
def _equal_shares(of_token: int) -> Iterator[None]:
    """Route as many tokens of each sample to each expert of a block.

    Args:
        of_token: Experts that a token is routed to, where all of them are given all tokens.
    """

    def rows_of(X_TH: Tensor, num_tokens: int) -> Tensor:
        return X_TH.new_empty(of_token * num_tokens, dtype=torch.long)

    def runs_of(numbers: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
        share, more = divmod(len(numbers), num_experts)
        counts = [share + (expert < more) for expert in range(num_experts)]
        return list(range(num_experts if share else more)), [count for count in counts if count]

    def most_rows(ends: Tensor, num_rows: int) -> int:
        return -(-num_rows // (len(ends) - 1))

    with patch.multiple(experts, rows_of=rows_of, runs_of=runs_of, most_rows=most_rows):
        yield


@contextmanager
def _ranks(number: int) -> Iterator[None]:
    """Make this process the first of so many ranks, of which there are no others: no collective changes a number."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend known

    torch.distributed.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@functools.cache
def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of large matrix products, the best of those in two seconds."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        (left @ right)[0, 0].item()  # the host waits for the device
        return time.perf_counter() - began

    seconds()
    end = time.perf_counter() + RATE_SECONDS
    best = seconds()
    while time.perf_counter() < end:
        best = min(best, seconds())
    return 2 * size**3 / best
