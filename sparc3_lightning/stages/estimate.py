"""What an experiment will take, before any of it runs: operations, memory, bytes and time of each stage.

The figures are those of the largest batch, by ``models/footprint.py``; only the config of the checkpoint is read.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparc3_lightning.attribution.accumulator import Costs
from sparc3_lightning.attribution.lexicon import Lexicon
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.data.base import WeightedBatch
from sparc3_lightning.data.wikitext2 import Window, disjoint_windows, sliding_windows
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.generation import ROWS, Sampling, SamplingOptions, continue_prompts
from sparc3_lightning.files import at_home
from sparc3_lightning.models.architectures import check_is_text, find_layers, is_recurrent, shape_of
from sparc3_lightning.models.batching import AUTO, MOST, fits_on_cpu, free_memory, largest_size
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype, resolve_dtype
from sparc3_lightning.models.components import KINDS
from sparc3_lightning.models.experts import is_expert
from sparc3_lightning.models.footprint import Cost, Layout, Meter, Run, cost_of, measured_rate
from sparc3_lightning.models.gguf import described
from sparc3_lightning.models.likelihood import Reference, last_hidden_state, score_windows
from sparc3_lightning.models.loading import CAUSAL_LM, build_skeleton, read_config
from sparc3_lightning.models.sharding import refused_auto
from sparc3_lightning.sources import resolve
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.plan import Config, StageRun

GB = 1e9
# What an estimate may be off by, and has to be left free: the allocator's rounding, and what libraries keep.
MARGIN = 0.1
TEXT_TOKENS = 300_000  # of a text without num_tokens: WikiText-2's test set has so many, more or less
# Lists that a budget measures: the number is doubled or told in advance, and then a straight line leads to it.
MEASURED = 8
COMPONENT_BYTES = 200  # of a component in neurons.json
ROW_BYTES = 1000  # of a continuation in completions.jsonl: texts, tokens and scores
LEXICON_TOKENS = 256  # that a scorer finds toxic, more or less
MOST_DEVICES = 64  # of what is advised
SHARDED = 16  # items of a batch of a sharded model where auto was asked for, if they fit
_VERDICTS = {None: "", True: "; fits", False: "; does not fit"}


@dataclass(frozen=True)
class EstimateOptions:
    """What is not known before a run; all of it can be left out.

    Args:
        tflops: Rate of a device, in 10^12 floating-point operations a second; None measures it on this machine, by
            products of large matrices for two seconds.
        memory: Memory of a device, in GB; None asks this machine: its accelerator, or what is free for a CPU.
        prompt_tokens: Tokens of a prompt, whose texts are not read.
    """

    tflops: float | None = None
    memory: float | None = None
    prompt_tokens: int = 32

    def check(self) -> None:
        """Raise OptionError unless all are above 0."""
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise OptionError(name, f"must be a number above 0, got {value}.", "estimate")


@dataclass(frozen=True)
class Machine:
    """Where a run is to be carried out.

    Args:
        device: Of the model.
        per_node: Devices of a node.
        num_nodes: Nodes.
        is_sharded: Whether the weights are sharded over all devices.
        memory: Of a device, in bytes; None if it is not known. Of a CPU it is that of a node.
        stated_rate: Floating-point operations a second of a device; None if it is to be measured here.
        libraries: Bytes that a process holds before it has a model, as this one does.
    """

    device: torch.device
    per_node: int
    num_nodes: int
    is_sharded: bool
    memory: float | None
    stated_rate: float | None
    libraries: int

    @classmethod
    def of(cls, trainer: Config, options: EstimateOptions) -> "Machine":
        """Return the machine that the options of a trainer speak of.

        Raises:
            OptionError: If nothing is known of the strategy, or the number of devices.
        """
        strategy, devices, accelerator = (trainer[name] for name in ("strategy", "devices", "accelerator"))
        has_gpu = torch.cuda.is_available()
        if accelerator not in ("auto", "cpu", "gpu", "cuda"):
            raise OptionError("accelerator", f"must be auto, cpu or gpu for an estimate, got {accelerator}.", "trainer")
        is_cpu = accelerator == "cpu" or (accelerator == "auto" and not has_gpu)
        device = torch.device("cpu" if is_cpu else "cuda")
        if strategy not in ("auto", "ddp", "fsdp2"):
            raise OptionError("strategy", f"must be auto, ddp or fsdp2 for an estimate, got {strategy}.", "trainer")
        if isinstance(devices, list) or "," in str(devices):
            number = len([one for one in str(devices).strip("[]").split(",") if one.strip()])
        elif str(devices) in ("auto", "-1"):
            number = 1 if is_cpu else torch.cuda.device_count()
        else:
            number = int(devices)
        if not number:
            what = f"{devices} counts those of this machine, which has none: give their number."
            raise OptionError("devices", what, "trainer")
        memory = options.memory and options.memory * GB
        if memory is None:
            memory = free_memory() if is_cpu else torch.cuda.get_device_properties(0).total_memory if has_gpu else None
        if options.tflops is None and not is_cpu and not has_gpu:
            raise OptionError("tflops", "cannot be measured, since this machine has no GPU: give it.", "estimate")
        rate = None if options.tflops is None else 1e12 * options.tflops
        return cls(device, number, trainer["num_nodes"], strategy == "fsdp2", memory, rate, _resident())

    def __str__(self) -> str:
        kind = "process" if self.is_cpu else "GPU"
        plural = "" if self.num_ranks == 1 else "es" if self.is_cpu else "s"
        nodes = f" of {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        sharded = ", the weights sharded over all" if self.is_sharded else ""
        memory = "" if self.memory is None else f", {_size(self.memory)} {'free' if self.is_cpu else 'each'}"
        return f"{self.num_ranks} {kind}{plural}{nodes}{sharded}{memory}"

    def rate(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations a second of a device, as stated or measured."""
        return self.stated_rate or measured_rate(self.device, dtype)

    @property
    def num_ranks(self) -> int:
        """Devices of all nodes."""
        return self.per_node * self.num_nodes

    @property
    def is_cpu(self) -> bool:
        """Whether memory is the host's."""
        return self.device.type == "cpu"

    def layout(self, gradient_checkpointing: bool = False) -> Layout:
        """Return how a model lies on it."""
        return Layout(self.num_ranks, self.is_sharded and self.num_ranks > 1, gradient_checkpointing)


@dataclass(frozen=True)
class Estimate:
    """What a stage takes.

    Args:
        name: Of the stage, with its verb.
        operations: Of one device.
        device_bytes: At its peak.
        host_bytes: Of a node, at its peak.
        written: Bytes of its files.
        seconds: At the rate of the machine.
        fits: None if the memory of a device is not known.
        items: What a device works on, and how many of them.
        way_out: Options with which it fits.
    """

    name: str
    operations: float
    device_bytes: float
    host_bytes: float
    written: float
    seconds: float
    fits: bool | None
    items: tuple[str, int] | None = None
    way_out: str = ""

    def __str__(self) -> str:
        if not self.operations:
            return f"{self.name}: no pass through the model, {_size(self.written)} written"
        each = "" if self.items is None else f"{_time(self.seconds / self.items[1])} a {self.items[0]}, "
        return (
            f"{self.name}: {_size(self.device_bytes)} a device, {_size(self.host_bytes)} of host memory a node, "
            f"{self.operations:.2e} operations a device, {each}{_time(self.seconds)}, {_size(self.written)} written"
            f"{_VERDICTS[self.fits]}{self.way_out}"
        )


def estimate(stages: Sequence[StageRun], options: EstimateOptions, dtype: ForwardDtype, checkpoint: Checkpoint) -> str:
    """Return a line for each stage of an experiment, and one for all of them.

    Args:
        stages: Of its plan.
        options: What is asked.
        dtype: Of the weights, as the option has it.
        checkpoint: Of the model.

    Raises:
        OSError: If the config of the checkpoint cannot be had.
        ValueError: If it cannot be estimated.
    """
    options.check()
    machine = Machine.of(stages[0].config["trainer"], options)
    of_stages = Estimator(
        checkpoint.name, config_of(checkpoint), "auto" if dtype == "fast" else dtype, machine, options
    )
    kept: dict[str, Estimate] = {}
    found = []
    for stage in stages:
        # Samples of another seed take as long.
        same = repr(
            [stage.config["model"], stage.config.get("data", {}).get("class_path"), {**_data(stage), "seed": 0}]
        )
        kept[same] = kept.get(same) or of_stages.advised(stage, _drawn(stages))
        found.append(replace(kept[same], name=f"{stage.verb} {stage.name}"))
    dtypes = dict.fromkeys(of_stages.dtype_of(stage) for stage in stages)
    rates = [f"{machine.rate(of) / 1e12:.3g} Tflop/s in {str(of).removeprefix('torch.')}" for of in dtypes]
    fits = [one.fits for one in found if one.operations]
    peak, written = max(one.device_bytes for one in found), sum(one.written for one in found)
    skeleton = build_skeleton(checkpoint.name, of_stages.config, None, CAUSAL_LM, next(iter(dtypes)))
    said = " Experts are taken to get equally many tokens." if any(map(is_expert, skeleton.modules())) else ""
    if unknown := [stage.name for stage in stages if stage.verb == "evaluate" and _num_prompts(stage) is None]:
        said += (
            f" How many prompts there are is not known of {' and '.join(unknown)} (num_prompts null), so that their "
            "time and bytes are not in it."
        )
    return "\n".join(
        [
            str(machine),
            *map(str, found),
            f"All: {_size(peak)} a device at most, {sum(one.operations for one in found):.2e} operations a device, "
            f"{_time(sum(one.seconds for one in found))}, {_size(written)} written"
            f"{_VERDICTS[None if None in fits else all(fits)]}",
            f"Time is that of matrix products at {' and '.join(rates)}, so it is the least; scorers, zero-shot tasks, "
            "pairs of sentences, reading and communication are not in it. Memory is without scorers. Prompts are taken "
            f"to have {options.prompt_tokens} tokens.{said}",
        ]
    )


def config_of(checkpoint: Checkpoint) -> Any:
    """Return the config of a checkpoint: a folder needs no more than that file, a GGUF file no more than its header."""
    folder = Path(at_home(checkpoint.name))
    if (folder / "config.json").is_file():
        config = read_config(checkpoint.name, str(folder), None, CAUSAL_LM)
    elif checkpoint.name.endswith(".gguf"):
        config = described(resolve(checkpoint.name))
    else:
        return checkpoint.config
    check_is_text(checkpoint.name, config)
    return config


@dataclass(frozen=True)
class Estimator:
    """Estimates stages of an experiment, see ``estimate``.

    Args:
        name: Of the checkpoint.
        config: Of the model.
        dtype: Of the weights, where a stage does not say it.
        machine: Where the stages are to run.
        options: What is asked.
    """

    name: str
    config: Any
    dtype: ForwardDtype
    machine: Machine
    options: EstimateOptions

    def advised(self, stage: StageRun, drawn: int) -> Estimate:
        """Return the estimate of a stage; where it does not fit, with the options that were found to make it fit.

        Args:
            stage: The stage.
            drawn: Tokens of a continuation.
        """
        if self.machine.is_sharded and stage.verb != "prune":
            for group, part in _parts(stage).items():
                if part.get("batch_size") == AUTO:
                    raise refused_auto(group)
        found = self.of(stage, drawn)
        if found.fits is not False:
            return found
        for said, changed, machine in self._ways(stage):
            if replace(self, machine=machine).of(changed, drawn).fits:
                return replace(found, way_out=f": give {said}, with which it fits")
        devices = "" if stage.verb == "prune" else " and the number of devices"
        return replace(found, way_out=f", whatever the batch size{devices}")

    def of(self, stage: StageRun, drawn: int) -> Estimate:
        """Return the estimate of a stage, see ``advised``."""
        if stage.verb == "attribute":
            return self._attribution(stage, drawn)
        return self._pruning(stage, drawn) if stage.verb == "prune" else self._evaluation(stage)

    def _ways(self, stage: StageRun) -> Iterator[tuple[str, StageRun, Machine]]:
        """Yield options that take less memory, one by one and then together, with what each changes."""
        machine, said = self.machine, ""
        steps: list[tuple[str, Config]] = []
        # On an accelerator auto goes down to 1 by itself.
        smallest = numbered = self._numbered(stage, MOST if machine.is_cpu else 1)[0]
        size = max([part["batch_size"] for part in _parts(numbered).values() if "batch_size" in part], default=1)
        while size > 1:
            size //= 2
            smallest, said = _in_smaller_batches(numbered, size)
            yield said, smallest, machine
        if stage.verb == "attribute" and not stage.config["model"]["gradient_checkpointing"]:
            steps.append(("--attribute.gradient_checkpointing true", {"gradient_checkpointing": True}))
        if stage.verb != "prune" and self.dtype_of(stage) == torch.float32:
            steps.append(("--model.dtype bfloat16", {"dtype": "bfloat16"}))
        together = smallest
        for option, change in steps:
            yield option, _with(stage, change), machine
            together, said = _with(together, change), f"{said} {option}".strip()
            if said != option:
                yield said, together, machine
        if stage.verb == "prune":  # one device
            return
        if machine.is_cpu:  # all of a node share one memory
            fewer = machine.per_node
            while fewer > 1:
                fewer //= 2
                option = f"--trainer.devices {fewer}"
                yield option, stage, replace(machine, per_node=fewer)
                yield f"{said} {option}".strip(), together, replace(machine, per_node=fewer)
            return
        for number in (2**i for i in range(1, MOST_DEVICES.bit_length())):
            if number > machine.num_ranks or (number == machine.num_ranks and not machine.is_sharded):
                per_node = min(number, max(8, machine.per_node))
                more = replace(machine, per_node=per_node, num_nodes=-(-number // per_node), is_sharded=True)
                option = f"--trainer.strategy fsdp2 --trainer.devices {per_node} --trainer.num_nodes {more.num_nodes}"
                for most in (SHARDED, 1):
                    changed, numbers = self._numbered(stage, most)
                    yield f"{numbers} {option}".strip(), changed, more
                    if not numbers:
                        break
                yield " ".join(filter(None, [said, numbers, option])), together, more

    def _numbered(self, stage: StageRun, most: int) -> tuple[StageRun, str]:
        """Return a stage with a number in the place of each batch size ``auto``, and the options that say so.

        Args:
            stage: The stage.
            most: Greatest number; a smaller one is where ``auto`` begins.
        """
        stage = replace(stage, config=deepcopy(stage.config))
        said = []
        for group, part in _parts(stage).items():
            if part.get("batch_size") == AUTO:
                longest = int(part.get("seq_len") or part.get("window") or self.options.prompt_tokens)
                part["batch_size"] = min(most, self._batch_size(AUTO, longest))
                said.append(f"--{group}.batch_size {part['batch_size']}")
        return stage, " ".join(said)

    def dtype_of(self, stage: StageRun) -> torch.dtype:
        """Return the dtype that a stage computes in."""
        return resolve_dtype(stage.config["model"].get("dtype", self.dtype), self.machine.device)

    def _batch_size(self, size: object, longest: int) -> int:
        """Return the size of a batch, for ``auto`` the one that it begins with."""
        if size != AUTO:
            assert isinstance(size, int)
            return size
        first = largest_size(longest, self.machine.device)
        vocab_size = self.config.get_text_config().vocab_size
        return min(first, fits_on_cpu(longest, vocab_size)) if self.machine.is_cpu else first

    def _batch(self, asked: object, size: int, cost: Callable[[int], Cost]) -> tuple[int, Cost]:
        """Return the size of a batch, and what it costs; an accelerator halves ``auto`` until it fits, as in the run.

        Args:
            asked: The option.
            size: To begin with.
            cost: Of a batch of a size.
        """
        found = cost(size)
        while asked == AUTO and size > 1 and not self.machine.is_cpu and self._fits(found) is False:
            size //= 2
            found = cost(size)
        return size, found

    def _attribution(self, stage: StageRun, drawn: int) -> Estimate:
        options, data = stage.config["model"], _data(stage)
        dtype, module = self.dtype_of(stage), Attribution(**options)
        skeleton = build_skeleton(self.name, self.config, None, CAUSAL_LM, dtype)
        module.settle(skeleton, dtype)
        spec, scored = module.spec, find_layers(skeleton, module.layers)
        written = sum(4 * math.prod(KINDS[spec.kind_of(name)].shape(skeleton, name)) for name in scored)
        if spec.is_static:
            return self._none(stage, written)
        num_samples, length = int(data["num_samples"]), self._length(data, drawn)
        if spec.activations:
            written += 4 * num_samples * sum(shape_of(layer)[0] for layer in scored.values())
        if spec.is_lexical:
            vocab_size = self.config.get_text_config().vocab_size
            module.lexicon = Lexicon.of_tokens(range(min(LEXICON_TOKENS, vocab_size)))
        share = -(-num_samples // self.machine.num_ranks)

        def cost(size: int) -> Cost:
            layout = self.machine.layout(options["gradient_checkpointing"])
            return cost_of(self.name, self.config, dtype, layout, attribution(module, size, length), rules_of(module))

        asked = data["batch_size"]
        size, found = self._batch(asked, min(self._batch_size(asked, length), share), cost)
        return self._estimate(stage, found, share * found.operations / size, written, ("sample", share))

    def _length(self, data: Config, drawn: int) -> int:
        """Return the tokens of a sample; a prompt may have its continuation behind it."""
        has_more = data.get("continuation_toxicity") is not None
        return int(data.get("seq_len") or self.options.prompt_tokens + (drawn if has_more else 0))

    def _pruning(self, stage: StageRun, drawn: int) -> Estimate:
        options, data = stage.config["model"], _data(stage)
        dtype = self.dtype_of(stage)
        one = replace(self, machine=replace(self.machine, per_node=1, num_nodes=1, is_sharded=False))
        written = float(COMPONENT_BYTES * options["num_ranked"])
        if options["export"] is not None:
            skeleton = build_skeleton(self.name, self.config, None, CAUSAL_LM, dtype)
            written += sum(parameter.nbytes for parameter in skeleton.parameters())
        if options["budget"]["max_perplexity_increase"] is None:
            return self._none(stage, written)
        length, number = self._length(data, drawn), int(data["num_samples"])
        size = min(one._batch_size(data["batch_size"], length), number)
        size, found = one._batch(
            data["batch_size"], size, lambda size: one._cost(dtype, texts(size, length, length - 1))
        )
        lists = 1 + MEASURED * len(options["dampings"]) * (1 + int(options["budget"]["refine"]))
        operations = lists * number / size * found.operations
        return one._estimate(stage, found, operations, written, ("list of neurons", lists))

    def _evaluation(self, stage: StageRun) -> Estimate:
        options, data = stage.config["model"], stage.config["data"]
        dtype, sampling = self.dtype_of(stage), SamplingOptions(**options["sampling"]).resolve()
        models, controls = _models(options)
        most = options["controls"].get("num_continuations") or sampling.num_continuations
        of_control = min(most, sampling.num_continuations)
        costs, operations = [], 0.0
        for name in ("text", "other_text"):
            if (text := data.get(name)) is None:
                continue
            text = text["init_args"]
            windows = _windows(text, f"data.{name}")
            length, scored = text["window"], sum(window.num_scored for window in windows) // len(windows)
            size = min(self._batch_size(text["batch_size"], length), len(windows))
            for is_compared, number in ((False, 1), (True, models + controls - 1)):
                if number:
                    run = partial(texts, length=length, scored=scored, is_compared=is_compared)
                    size, cost = self._batch(text["batch_size"], size, lambda size: self._cost(dtype, run(size)))  # noqa: B023
                    costs.append(cost)
                    operations += number * len(windows) / size * cost.operations
        prompts, num_prompts = data["prompts"]["init_args"], _num_prompts(stage)
        length = self.options.prompt_tokens
        size = self._batch_size(prompts["batch_size"], length)
        is_one_by_one = is_recurrent(build_skeleton(self.name, self.config, None, CAUSAL_LM, dtype))
        for each, number in ((sampling.num_continuations, models), (of_control, controls)):
            if number and num_prompts != 0:
                rows = 1 if is_one_by_one else max(1, ROWS // each)
                rows = min(size, rows, num_prompts or rows)
                run = partial(continuations, repeats=each, length=length, sampling=sampling)
                rows, cost = self._batch(prompts["batch_size"], rows, lambda rows: self._cost(dtype, run(rows)))  # noqa: B023
                costs.append(cost)
                operations += number * (num_prompts or 0) / rows * cost.operations
        drawn = (num_prompts or 0) * (models * sampling.num_continuations + controls * of_control)
        peak = max(costs, key=lambda cost: cost.peak)
        share = operations / self.machine.num_ranks
        return self._estimate(stage, peak, share, ROW_BYTES * drawn, ("model", models + controls))

    def _cost(self, dtype: torch.dtype, run: Run) -> Cost:
        return cost_of(self.name, self.config, dtype, self.machine.layout(), run)

    def _fits(self, cost: Cost) -> bool | None:
        machine = self.machine
        held = machine.per_node * (cost.peak + machine.libraries) if machine.is_cpu else cost.peak
        return None if machine.memory is None else (1 + MARGIN) * held <= machine.memory

    def _none(self, stage: StageRun, written: float) -> Estimate:
        return Estimate(stage.name, 0.0, 0.0, 0.0, written, 0.0, True)

    def _estimate(
        self, stage: StageRun, cost: Cost, operations: float, written: float, items: tuple[str, int]
    ) -> Estimate:
        machine = self.machine
        # The weights pass through the host on their way to an accelerator: whole, or a tensor at a time.
        on_host = cost.peak if machine.is_cpu else 0.0 if machine.is_sharded else cost.weights
        host = machine.per_node * (on_host + machine.libraries)
        seconds = operations / machine.rate(self.dtype_of(stage))
        return Estimate(stage.name, operations, cost.peak, host, written, seconds, self._fits(cost), items)


def rules_of(module: Attribution) -> Callable[[PreTrainedModel], None]:
    """Return what finds the activations of a model, for which the rules need numbers."""

    def find(model: PreTrainedModel) -> None:
        with nullcontext() if module.spec.rule is None else lrp(model, module.spec.rule):
            pass

    return find


def attribution(module: Attribution, size: int, length: int) -> Run:
    """Return what attributes one batch, as the stage does."""
    batch: WeightedBatch = {
        "input_ids": torch.zeros(size, length, dtype=torch.long),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "is_padded": False,
        "sample_ids": [str(i) for i in range(size)],
        "start": torch.zeros(size, dtype=torch.long),
        "contrast": torch.zeros(size, 2, dtype=torch.long),
        "weights": [1] * size,
    }

    def run(model: PreTrainedModel, meter: Meter) -> None:
        chunk = module.spec.chunk
        module.model = model
        module.begin_sums(None if chunk is None else Costs(chunk, size * length))
        module.score(batch)
        del module.model, module.accumulator, module.recorder

    return run


def texts(size: int, length: int, scored: int, is_compared: bool = False) -> Run:
    """Return what measures perplexity on a batch of texts, of a model by itself or against the original one."""
    spans = torch.tensor([[length - scored, length]] * size)

    @torch.no_grad()
    def run(model: PreTrainedModel, meter: Meter) -> float:
        input_ids = torch.zeros(size, length, dtype=torch.long)
        reference = Reference(last_hidden_state(model, input_ids)) if is_compared else None
        before = meter.operations
        score_windows(model, last_hidden_state(model, input_ids), input_ids, spans, reference)
        return meter.operations - before

    return run


class _Enough(Exception):
    """So many steps have been measured."""


def continuations(size: int, repeats: int, length: int, sampling: Sampling) -> Run:
    """Return what continues some prompts: each step takes more than the one before it by the same amount."""

    def run(model: PreTrainedModel, meter: Meter) -> float:
        after: list[float] = []

        def count(_: float) -> None:
            after.append(meter.operations)
            if len(after) == 3:
                raise _Enough

        input_ids = torch.zeros(size, length, dtype=torch.long)
        keys = [[0] * repeats] * size
        try:
            continue_prompts(model, input_ids, torch.ones_like(input_ids), keys, sampling, True, count)
        except _Enough:
            prompt, first, second = after
            steps = sampling.max_new_tokens - 1
            growth = (second - first) - (first - prompt)
            return prompt + steps * (first - prompt) + growth * steps * (steps - 1) / 2
        return meter.operations

    return run


def _data(stage: StageRun) -> Config:
    """Return the options of a stage's data."""
    data = stage.config.get("data", {})
    return data.get("init_args", data)


def _parts(stage: StageRun) -> dict[str, Config]:
    """Return the options of each part of a stage's data, by the group that they have in ``run``."""
    data = stage.config.get("data", {})
    if "class_path" in data:
        of_samples = "behavior" if stage.name.endswith("behavior") else "general"
        return {"budget_text" if stage.verb == "prune" else of_samples: data.get("init_args", {})}
    # The prompts of a screening are a group of their own.
    groups = {"prompts": "screen"} if stage.name == "screen" else {}
    return {groups.get(name, f"data.{name}"): part["init_args"] for name, part in data.items() if part is not None}


def _in_smaller_batches(stage: StageRun, size: int) -> tuple[StageRun, str]:
    """Return a stage with no larger batches than these, and the options that say so."""
    stage = replace(stage, config=deepcopy(stage.config))
    said = []
    for group, part in _parts(stage).items():
        if isinstance(part.get("batch_size"), int) and part["batch_size"] > size:
            part["batch_size"] = size
            said.append(f"--{group}.batch_size {size}")
    return stage, " ".join(said)


def _with(stage: StageRun, change: Config) -> StageRun:
    """Return a stage with other options of its model."""
    return replace(stage, config={**stage.config, "model": {**stage.config["model"], **change}})


def _drawn(stages: Sequence[StageRun]) -> int:
    """Return the tokens of a continuation at most."""
    sampling = stages[-1].config["model"]["sampling"]
    return SamplingOptions(**sampling).resolve().max_new_tokens


def _resident() -> int:
    """Return the bytes of memory that this process holds; 0 if the system does not say it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def _models(options: Config) -> tuple[int, int]:
    """Return how many models are measured as the first one is, and how many controls."""
    neurons = options["neurons"]
    lists = 0 if neurons is None else len(neurons) if isinstance(neurons, list | tuple) else 1
    doses = len(options["doses"]) * len(options["dampings"])
    return 1 + lists * (1 + doses), min(lists, 1) * len(CONTROLS) * options["controls"]["num_draws"]


def _num_prompts(stage: StageRun) -> int | None:
    """Return how many prompts an evaluation continues; None if all of a data set, whose rows are not counted here."""
    prompts = stage.config["data"]["prompts"]["init_args"]
    return None if prompts["num_prompts"] is None else prompts["num_prompts"] + prompts.get("num_nontoxic", 0)


def _windows(text: Config, group: str) -> list[Window]:
    number = text["num_tokens"] or TEXT_TOKENS
    if number < text["window"]:
        raise OptionError("num_tokens", f"must be at least --.window {text['window']}, got {number}.", group)
    found: list[Window] = []
    if "sliding" in text["conventions"]:
        found += sliding_windows(number, text["window"], text["stride"])
    if "disjoint" in text["conventions"]:
        found += disjoint_windows(number, text["window"])
    return found


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.{1 if number < 10 * size else 0}f} {unit}"
    return f"{number / 1e3:.0f} kB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
