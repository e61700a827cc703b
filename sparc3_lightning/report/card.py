"""The model card: what an evaluation found, for those who meet the pruned checkpoint, and for the hub to read."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sparc3_lightning.evaluation.intervals import FEW, Interval
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.components import by_layer, counts_of, in_words, plural
from sparc3_lightning.report.escaping import for_markdown, for_shell, for_terminal, public_name, told_apart
from sparc3_lightning.report.tables import (
    Table,
    agreement_of,
    behavior_table,
    chooser_judges,
    control_table,
    dose_table,
    evident_doses,
    few_windows,
    first_of_other_text,
    front_table,
    judge_table,
    other_table,
    texts_of,
)
from sparc3_lightning.report.verdict import by_position, zero_ablated_controls
from sparc3_lightning.selection.criteria import per_module
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.sparsity import SparsityResults

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MODEL_CARD = "model_card.md"
GROUPS = {"toxic": "toxic prompts", "nontoxic": "non-toxic prompts", "all": "prompts"}
README = "README.md"  # the card of an exported checkpoint
# In the card, with a hash of it: a README that has none, or was changed since, is somebody's own.
MARK = "<!-- Written by sparc3, and again by the next evaluation unless anything here is changed. {} -->"
NUM_NAMED = 1000  # neurons that a card names; a card is for people, and neurons.json has all


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was made of a list of neurons.

    Args:
        neurons: The list.
        checkpoint: The original, as a hub id or a path.
        folder: Name of the folder that it was written to.
        license: Of the original, as its card says it; None if that is not known.
    """

    neurons: NeuronList
    checkpoint: str
    folder: str
    license: str | None = None

    @property
    def command(self) -> str:
        """The command that makes it once more of the list and the original."""
        of = ["--model.neurons", "neurons.json", "--model.checkpoint", public_name(self.checkpoint)]
        return for_shell(["sparc3", "export", *of, "--model.export", self.folder])

    @property
    def num_named(self) -> int:
        """How many neurons a card names."""
        return min(len(self.neurons.neurons), NUM_NAMED)

    @property
    def named(self) -> dict[str, str]:
        """The places of the first ``num_named`` neurons, by layer, and by kind if there are several, in order."""
        several, named = "+" in self.neurons.granularity, {}
        for (kind, module), found in by_layer(self.neurons.neurons[:NUM_NAMED]).items():
            places = sorted((n.index,) if n.input is None else (n.index, n.input) for n in found)
            words = ", ".join(str(place[0]) if len(place) == 1 else str(list(place)) for place in places)
            named[f"{module}, {kind}s" if several else module] = words
        return named

    def is_of(self, results: Results) -> bool:
        """Tell whether results are of the neurons of this checkpoint, as far as results say which neurons they are."""
        neurons, shown = self.neurons.neurons, results.report
        return (
            shown is not None
            and results.checkpoint_fingerprint == self.neurons.origin.get("checkpoint_fingerprint")
            and results.num_neurons == len(neurons)
            and shown.neurons == neurons[: len(shown.neurons)]
            and shown.neurons_per_module == per_module(neurons)
            and shown.ablation == self.neurons.ablation
        )


def said_of(results: Results, named: Callable[[str], str] = str) -> dict[str, object]:
    """Return what page and model card say of results that a report is about, by the names in their templates.

    Args:
        results: With both models.
        named: What a judge is called.
    """
    neurons = results.report
    assert neurons is not None
    has_doses = len(results.doses) > 1
    return {
        "results": results,
        "behavior": results.behavior,
        "granularity": results.granularity,
        "components": plural(results.granularity),
        "counted": in_words(results.kinds),
        "neurons": neurons,
        "name": name_of(results.checkpoint),
        "group_names": GROUPS,
        "groups": [
            (GROUPS[group], measures.num_prompts, behavior_table(results, group, named))
            for group, measures in results.baseline.groups.items()
        ],
        "judges": judge_table(results, named),
        "agreement": agreement_of(results, named),
        "by_position": by_position(results.lengths, results.behavior) if results.lengths else "",
        "chooser_judges": chooser_judges(results, results.granularity),
        "controls": control_table(results) if results.controls else [],
        "zeroed": zero_ablated_controls(results, neurons.ablation, results.granularity),
        "others": other_table(results),
        "texts": texts_of(results),
        "with_other_text": ["perplexity", *(["other text"] if first_of_other_text(results) else [])],
        "few_windows": few_windows(results),
        "doses": dose_table(results.doses) if has_doses else [],
        "evident": evident_doses(results.doses),
        "few": FEW,
        "fronts": front_table(results) if has_doses and len(results.fronts) > 1 else [],
    }


def model_card(results: Results, exported: Exported | None = None) -> str:
    """Return the model card of neurons that were evaluated.

    Args:
        results: With both models.
        exported: The checkpoint that the card is for, if it has the neurons' list beside it.
    """
    neurons = results.report
    assert neurons is not None
    names = told_apart(results.judges)
    return _render(
        "model_card.md",
        **said_of(results, lambda name: names.get(name) or public_name(name)),
        **_made(results.num_neurons, neurons.ablation, neurons.provenance.get("criterion")),
        checkpoint=results.checkpoint,
        fingerprint=results.checkpoint_fingerprint,
        front_matter=_front_matter(results.checkpoint, results, exported),
        verdict=_without_paths(results.verdict, names),
        judge=names[results.headline_judge],
        exported=exported,
    )


def unevaluated_card(exported: Exported) -> str:
    """Return the model card of an exported checkpoint of which nothing was measured."""
    neurons = exported.neurons
    return _render(
        "unevaluated_card.md",
        **_made(len(neurons.neurons), neurons.ablation, neurons.origin.get("criterion")),
        name=name_of(exported.checkpoint),
        granularity=neurons.granularity,
        counted=in_words(counts_of(neurons.neurons)),
        checkpoint=exported.checkpoint,
        fingerprint=neurons.origin.get("checkpoint_fingerprint"),
        front_matter=_front_matter(exported.checkpoint, None, exported),
        exported=exported,
    )


def sparse_card(sparsity: SparsityResults, checkpoint: str, folder: str, license: str | None) -> str:
    """Return the model card of a checkpoint in which a compression has set weights to zero; see ``Exported``."""
    how = ["--model.sparsity", sparsity.sparsity, "--model.pattern", sparsity.pattern]
    return _render(
        "sparse_card.md",
        name=name_of(checkpoint),
        sparsity=sparsity,
        methods=", ".join(sorted({ranked["spec"].method for ranked in sparsity.ranked_by})),
        checkpoint=checkpoint,
        front_matter=_front_matter(checkpoint, None, None, license),
        command=for_shell(["sparc3", "compress", "--model.general", "<scores>", *how, "--model.export", folder]),
    )


def name_of(checkpoint: str) -> str:
    """Return the last part of the name of a checkpoint."""
    return re.split(r"[/\\]", checkpoint.rstrip("/\\"))[-1]


def _made(num_neurons: int, ablation: str, criterion: object) -> dict[str, object]:
    """Return what a card says of how a checkpoint was made."""
    return {"num_neurons": num_neurons, "ablation": ablation, "criterion": criterion}


class Safe(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _render(template: str, **said: object) -> str:
    """Render a card: every value becomes one line of Markdown that shows it as it is."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("sparc3_lightning.report"),
        autoescape=False,
        finalize=lambda value: value if isinstance(value, Safe) else for_markdown(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"table": _markdown_table, "mark": Safe(MARK)}
    environment.filters |= {
        "public": public_name,
        "paragraph": lambda text: Safe(for_markdown(text, begins_line=True)),
        "command": lambda text: Safe(for_terminal(text)),
    }
    card = environment.get_template(template).render(**said)
    return card.replace(MARK, MARK.format(_hash(card)))


def _hash(card: str) -> str:
    """Return a hash of a card without one."""
    return hashlib.sha256(card.encode()).hexdigest()[:16]


def is_as_written(card: str) -> bool:
    """Tell whether a text is a card, and nobody has changed it since it was written."""
    before, _, after = MARK.partition("{}")
    found = re.search(f"{re.escape(before)}([0-9a-f]{{16}}){re.escape(after)}", card)
    return found is not None and _hash(card.replace(found[0], MARK)) == found[1]


def license_of(readme: Path) -> str | None:
    """Return the licence that the model card of a checkpoint names, if it has one that can be read."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except Exception:  # somebody's own text, if there is one at all
        return None
    return found if isinstance(found, str) else None


def _markdown_table(head: Iterable[str], rows: Table) -> Safe:
    lines = [[for_markdown(name) for name in head], *([for_markdown(cell) for cell in row] for row in rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    texts.insert(1, "|" + "---|" * len(lines[0]))
    return Safe("\n".join(texts) + "\n")


def _front_matter(
    checkpoint: str, results: Results | None, exported: Exported | None, license: str | None = None
) -> Safe:
    """Return what the hub reads of a card: the base model, and what was measured."""
    from huggingface_hub import ModelCardData

    found = list(_eval_results(results)) if results else []
    of_toxicity = results is not None and results.behavior == "toxicity"
    content = ModelCardData(
        base_model=public_name(checkpoint),
        library_name="transformers",
        license=exported.license if exported else license,
        pipeline_tag="text-generation",
        tags=["sparc3_lightning", "pruning", *(["detoxification"] if of_toxicity else [])],
        model_name=(exported.folder if exported else name_of(checkpoint)) if found else None,
        eval_results=found or None,
    ).to_dict()
    return Safe(f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)}---")


def _eval_results(results: Results) -> "Iterator[EvalResult]":
    """Yield the measures of the pruned model, each with that before and its interval; none that is not known."""
    from huggingface_hub import EvalResult

    pruned, prompts = results.pruned, public_name(results.protocol.prompts.source)
    assert pruned is not None
    for windows, perplexity in pruned.perplexity.items():
        before = results.baseline.perplexity[windows].value
        measured_on, convention = results.protocol.text_of(windows)
        text = public_name(measured_on.text)
        if math.isfinite(perplexity.value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=text,
                dataset_name=text,
                metric_type="perplexity",
                metric_name=f"Perplexity, {convention} windows",
                metric_value=perplexity.value,
                metric_args=_compared(before, results.perplexity_change.get(windows)),
            )
    for group, effects in results.effects.items():
        effect = effects.behavior_mean
        if effect is not None and math.isfinite(effect.after):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=prompts,
                dataset_name=prompts,
                dataset_config=GROUPS[group],
                metric_type=results.behavior,
                metric_name=f"Mean {results.behavior}",
                metric_value=effect.after,
                metric_args={**_compared(effect.before, effect.percent), "evidence": bool(effect.evidence)},
            )


def _compared(before: float, percent: Interval | None) -> dict[str, object]:
    """Return a value before the change, and the change in percent with its interval of 95 %; those that are known."""
    found = {"before": before}
    if percent is not None:
        found |= {
            "change_percent": percent.value,
            "change_percent_low": percent.low,
            "change_percent_high": percent.high,
        }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _without_paths(text: str, names: Mapping[str, str]) -> str:
    """Return a sentence in which scorers that are folders of this machine are called by other names."""
    changed = sorted((name for name, other in names.items() if name != other), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, changed)), lambda found: names[found[0]], text) if changed else text
