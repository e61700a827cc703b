"""What the tool does for each decoder architecture of transformers, measured on a tiny random model of it.

``python tests/support.py`` measures all of them and writes the table of ``configs/architectures.md``.
"""

import copy
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import transformers
from checkpoints import is_one_sentence
from decoders import EXAMPLES, EXPERT, HIDDEN, INNER, NOT_BUILT, architectures, build
from helpers import WORDS, tokenizer_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.lrp_check import check_lrp
from sparc3_lightning.attribution.relevance import Relevance
from sparc3_lightning.attribution.spec import Score
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.models.architectures import (
    Linear,
    find_layers,
    head_layers,
    is_recurrent,
    mlp_of,
    neuron_layers,
    parameters_of,
    twins_of,
)
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.experts import check_are_open, is_expert
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.neurons import columns_of, num_neurons, scored_rows

Scores = dict[str, Tensor]  # by the name of the layer, of shape [neurons]
DOCUMENT = Path(__file__).parents[1] / "configs" / "architectures.md"
SAMPLES = [[5, 17, 33, 8, 21, 40, 12], [9, 41, 6, 55, 30]]
# Sizes by which the matrices of an MLP are known from others. Those of BLOOM and others are four times as wide.
INNER_SIZES = {INNER, 2 * INNER, EXPERT, 2 * EXPERT, 4 * HIDDEN}
NO_MLP = (
    r"attn|attention|mixer|mamba|conv|router|lm_head|embed|temporal_block|norm|rotary|"
    r"(^|[._])hc_|_hc\.|hyper|ple\.|adapter"
)


@dataclass(frozen=True)
class Row:
    """What the tool does for one architecture.

    Args:
        architecture: Its ``model_type``.
        example: A well-known checkpoint of it.
        lrp: ``yes``, or why it is refused.
        conserved: Relevance of the tokens, as a part of the logit, and that which constants keep.
        dense: Number of neurons outside of experts, all of which are scored.
        in_experts: Number of neurons in experts, all of which are scored, and of experts.
        heads: Whether heads of attentions are scored.
        export: Whether a pruned model is written, and loaded by transformers.
    """

    architecture: str
    example: str
    lrp: str
    conserved: str
    dense: str
    in_experts: str
    heads: str
    export: str


class Support:
    """What is tried with an architecture, and the sentence by which the tool refuses it."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model_type = model_type
        self.folder = folder
        self.refusals: dict[str, str] = {}

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Note a refusal of what a ``with`` block does; whatever else it raises goes on."""
        try:
            yield
        except ValueError as error:
            message = str(error)
            named = any(name in message for name in ("--", self.model_type, str(self.folder)))
            assert is_one_sentence(message), f"no sentence: {message}"
            assert named, f"the sentence names neither the model nor an option: {message}"
            self.refusals[what] = message

    def reason(self, what: str) -> str:
        """Return the beginning of a refusal, which says what is wrong."""
        message = self.refusals[what].replace(repr(str(self.folder / "original")), "it")
        message = re.sub(r"^--[\w.]+:? | \([^)]*\)", "", message)
        return f"refused: {re.split(r'[:;,] ', message)[0].rstrip('.')}"

    def measure(self) -> Row:
        """Try everything, and return what came out.

        Raises:
            AssertionError: If something comes out wrong.
        """
        checkpoint = write_checkpoint(self.model_type, self.folder / "original")
        example = EXAMPLES.get(self.model_type, "")
        with self.trying("load"):
            model = checkpoint.load(torch.float32)
        if "load" in self.refusals:
            return Row(self.model_type, example, self.reason("load"), "", "", "", "no", "no")
        layers: dict[str, Linear] = {}
        with self.trying("neurons"):
            check_are_open(model)
            layers = find_layers(model, neuron_layers(model))
            check_nothing_is_left_out(model, layers)
            for score in ("wanda", "activation"):
                attributed(model, layers, score)
        scores: Scores = {}
        conserved = ""
        with self.trying("lrp"):
            if layers:
                found = check_lrp(model, "attnlrp", layers, torch.tensor(SAMPLES[:1]))
                assert found.logits_unchanged
                assert found.layers_reached == found.num_layers > 0
                conserved = f"{percent(found.conserved)} + {percent(found.kept)}"
                scores = attributed(model, layers, "magnitude")
        exported = "no"
        if layers:
            chosen = choose(model, layers, scores)
            with self.trying("export"):
                check_export_is_mask(checkpoint, model, chosen, self.folder / "pruned")
                exported = "yes"
        heads = "no"
        with self.trying("heads"):
            check_heads(model, head_layers(model))
            heads = "yes"
        refusal = next((self.reason(what) for what in ("neurons", "lrp") if what in self.refusals), "yes")
        of_experts = [name for name, layer in layers.items() if is_expert(layer)]
        in_experts = sum(num_neurons(model, name) for name in of_experts)
        dense = sum(num_neurons(model, name) for name in layers) - in_experts
        return Row(
            self.model_type,
            example,
            refusal,
            conserved,
            f"{dense}" if layers else "",
            f"{in_experts} in {len(of_experts)}" if of_experts else "",
            heads,
            exported,
        )


def percent(part: float) -> str:
    return f"{100 * part:.1f} %".replace("-0.0", "0.0")


def write_checkpoint(model_type: str, folder: Path) -> Checkpoint:
    """Write a tiny checkpoint of an architecture, as transformers writes it, with a tokenizer of words."""
    model = build(model_type)
    model.save_pretrained(folder)
    tokenizer_of(WORDS[: model.config.vocab_size - 4]).save_pretrained(folder)
    return Checkpoint(str(folder))


def check_nothing_is_left_out(model: PreTrainedModel, layers: dict[str, Linear]) -> None:
    """Compare the scored MLPs with the matrices that have the size of an MLP, by which nothing else is as large."""
    held = set()
    for name in layers:
        mlp = mlp_of(model, name)
        for part in (*(rows.layer for rows in mlp.rows), mlp.column):
            held |= set(parameters_of(model, part).values())
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and INNER_SIZES & set(parameter.shape) and not re.search(NO_MLP, name)
    ]
    assert not set(left_out) - held, f"neurons are left out: {sorted(set(left_out) - held)}"


def scores_of(model: PreTrainedModel, layers: dict[str, Linear], score: Score, *batches: list[list[int]]) -> Scores:
    """Return the scores of neurons over batches of samples, as ``Attribution`` forms them."""
    scored = columns_of(model, layers) if score == "activation" else layers
    parts = scored_rows(model, layers)
    accumulator = ScoreAccumulator(scored, score, parts=parts, twins=twins_of(model))
    for samples in batches:
        longest = max(map(len, samples))
        input_ids = torch.tensor([[*sample, *[0] * (longest - len(sample))] for sample in samples])
        attention_mask = torch.tensor([[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples])
        of_target = score in get_args(Relevance)
        with (
            torch.set_grad_enabled(of_target),
            lrp(model) if of_target else nullcontext(),
            accumulator.recording(attention_mask, [f"sample {i}" for i in range(len(samples))]),
        ):
            if of_target:
                largest_logit(model, input_ids, attention_mask).sum().backward()
            else:
                model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return accumulator.compute()


def attributed(model: PreTrainedModel, layers: dict[str, Linear], score: Score) -> Scores:
    """Return the scores over the samples: those of a padded batch, where that can be, are those of each alone."""
    alone = scores_of(model, layers, score, *([sample] for sample in SAMPLES))
    assert all(torch.isfinite(found).all() for found in alone.values())
    assert all(len(found) == num_neurons(model, name) for name, found in alone.items()), "not a score for each neuron"
    assert all(alone[name].any() for name, layer in layers.items() if not is_expert(layer)), "no score but 0"
    if not is_recurrent(model):
        largest = max(found.max().item() for found in alone.values())
        for name, found in scores_of(model, layers, score, SAMPLES).items():
            torch.testing.assert_close(
                found, alone[name], rtol=1e-3, atol=1e-5 * largest, msg=f"{score}: padding counts"
            )
    return alone


def choose(model: PreTrainedModel, layers: dict[str, Linear], scores: Scores) -> list[Component]:
    """Choose the most relevant neurons of three dense MLPs and of three experts; without scores their first ones."""
    kinds = [[name for name, layer in layers.items() if is_expert(layer) == expert] for expert in (False, True)]
    chosen = []
    for names in kinds:
        largest = sorted(names, key=lambda name: -scores[name].max().item() if scores else 0)[:3]
        for name in largest:
            best = scores[name].topk(2).indices.tolist() if scores else [0, num_neurons(model, name) - 1]
            chosen += [Component(name, index, -1.0) for index in best]
    return chosen


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return torch.cat([model(torch.tensor([sample]), use_cache=False).logits[0] for sample in SAMPLES]).float()


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of logits, as a part of the largest logit."""
    return ((one - other).abs().max() / other.abs().max()).item()


def check_export_is_mask(checkpoint: Checkpoint, model: PreTrainedModel, chosen: list[Component], folder: Path) -> None:
    with mask(model, chosen):
        masked = logits_of(model)
    assert difference(logits_of(model), masked) > 1e-4, "the mask changes nothing"
    export_pruned(checkpoint, chosen, folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert difference(logits_of(reloaded), masked) < 1e-5, "the export is not the masked model"


def check_heads(model: PreTrainedModel, names: list[str]) -> None:
    """Compare the mask of heads, and of channels, with their removal, in the first attention and in the last one."""
    layers = list(find_layers(model, names))
    for kind in ("head", "channel"):
        off = [Component(layers[0], 0, -1.0, granularity=kind), Component(layers[-1], 1, -1.0, granularity=kind)]
        with mask(model, off):
            masked = logits_of(model)
        assert difference(logits_of(model), masked) > 1e-4, f"the mask of {kind}s changes nothing"
        pruned = copy.deepcopy(model)
        prune_(pruned, off)
        assert difference(logits_of(pruned), masked) < 1e-5, f"a {kind} that is removed is not one that is masked"


def measure(model_type: str) -> Row:
    """Return what the tool does for an architecture; see ``Support.measure``."""
    with tempfile.TemporaryDirectory() as folder:
        return Support(model_type, Path(folder)).measure()


HEAD = f"""<!-- Written by `python tests/support.py`; tests/models/test_every_decoder.py compares it with the tool. -->
# Architectures

What this tool does for each decoder of transformers {transformers.__version__}, measured on a tiny random model of it.
A checkpoint of any size has the same layers. Whether LRP holds for yours is checked before its first sample.

- **LRP**: scores of neurons by LRP; those of a padded batch are the mean of those of its samples.
- **Conserved + kept**: the part of a logit that arrives at the tokens as relevance under CP attention, and the part
  that biases, learned positions and other constants keep. These are random here, and larger than in most checkpoints.
- **Neurons**: those of all MLPs of the tiny model, and of how many experts. All have scores. They can be switched off.
- **Heads**: whether `--model.granularity head` works, and so does `channel`.
- **Export**: a pruned checkpoint is one that a stock `AutoModelForCausalLM` loads, with the logits of the masked model.

"""
TITLES = ["Architecture", "Example", "LRP", "Conserved + kept", "Neurons", "In experts", "Heads", "Export"]


def line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def line_of_row(row: Row) -> str:
    architecture, *rest = astuple(row)
    return line_of([f"`{architecture}`", *rest])


def last_line(rows: list[Row]) -> str:
    with_lrp = [row for row in rows if row.lrp == "yes"]
    with_experts = [row for row in with_lrp if row.in_experts]
    return (
        f"{len(with_lrp)} architectures with LRP, {len(with_experts)} of them with experts; "
        f"{len(rows) - len(with_lrp)} refused; {len(NOT_BUILT)} not built."
    )


def document(rows: list[Row]) -> str:
    """Return the text of the document."""
    table = [line_of(TITLES), line_of(["---"] * len(TITLES)), *map(line_of_row, rows)]
    not_built = [
        f"- {reason}: {', '.join(f'`{name}`' for name, why in NOT_BUILT.items() if why == reason)}"
        for reason in dict.fromkeys(NOT_BUILT.values())
    ]
    return HEAD + "\n".join([*table, "", "Not built:", "", *not_built, "", last_line(rows), ""])


def read_rows(text: str) -> dict[str, Row]:
    """Return the rows of a document, by architecture."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {cells[0].strip("`"): Row(cells[0].strip("`"), *cells[1:]) for cells in rows}


def is_same(one: Row, other: Row) -> bool:
    """Compare two rows; the last digits of what is conserved, and those of a refusal, may differ."""
    ours, theirs = (
        [float(part) for part in row.conserved.replace("%", "").split(" + ") if part] for row in (one, other)
    )
    near = len(ours) == len(theirs) and all(abs(x - y) < 0.3 for x, y in zip(ours, theirs, strict=True))
    without_digits = [replace(row, conserved="", lrp=re.sub(r"\d", "", row.lrp)) for row in (one, other)]
    return near and without_digits[0] == without_digits[1]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    for name in sys.argv[1:] or [name for name in architectures() if name not in NOT_BUILT]:
        try:
            found.append(measure(name))
            print(line_of_row(found[-1]), flush=True)
        except Exception as error:  # all failures are shown, not the first one alone
            traceback.print_exc()
            print(f"{name} FAILED: {type(error).__name__}: {error}", flush=True)
    print(last_line(found))
    if not sys.argv[1:]:
        DOCUMENT.write_text(document(found), encoding="utf-8")
