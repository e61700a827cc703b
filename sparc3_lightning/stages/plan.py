"""What is wrong with the options of an experiment's later stages, found before its first one has run for hours."""

from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from sparc3_lightning.attribution.targets import LEXICAL
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.variants import check_doses
from sparc3_lightning.models.checkpoints import fingerprint
from sparc3_lightning.scorers.classifiers import split_label
from sparc3_lightning.sources import is_local, sha256_of
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.prune import Pruning


def attribution_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of an attribution, as its own verb would parse them.

    Raises:
        ValueError: If there is no such option, or a value is of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Attribution, instantiate=False)
    try:
        return parser.parse_object(options).as_dict()
    except ArgumentError as error:
        raise OptionError("behavior_attribute", f": {error}") from None


def check_attributions(general: dict[str, Any], behavior: dict[str, Any]) -> None:
    """Raise ValueError if the attribution of general text, or that of the behaviour, would refuse its options."""
    _by_group("attribute", partial(Attribution, **general))
    try:
        _by_group("attribute", partial(Attribution, **behavior))
    except ValueError as error:
        raise OptionError("behavior_attribute", f"{error} (with --.behavior_attribute)") from None


def check_granularities(pruned: str, *attributed: str) -> None:
    """Raise ValueError unless what is attributed can be pruned; scores of weights are summed for those of neurons."""
    if pruned == "weight" and set(attributed) != {"weight"}:
        raise ValueError("--prune.granularity weight needs scores of weights: give --attribute.granularity weight too.")
    if "head" in attributed:
        raise ValueError("--attribute.granularity must be neuron or weight: no heads are pruned here.")


def check_pruning(options: dict[str, Any], has_text: bool) -> None:
    """Raise ValueError if the pruning would refuse its options, or needs a text and there is none.

    Args:
        options: Of the stage.
        has_text: Whether the experiment has the group ``budget_text``.
    """
    _construct("prune", Pruning, options)
    if options["budget"]["max_perplexity_increase"] is not None and not has_text:
        needs = "--prune.budget.max_perplexity_increase needs a text"
        raise ValueError(f"{needs}: add the group 'budget_text', as lexicon.yaml does.")


def check_evaluation(options: dict[str, Any], prune: dict[str, Any]) -> None:
    """Raise ValueError if the evaluation would refuse its options; its neurons need not be there yet.

    Args:
        options: Of the stage.
        prune: Of the pruning, which say how many neurons there will be for the doses.
    """
    doses, strengths = options["doses"], options["strengths"]
    has_budget = prune["budget"]["max_perplexity_increase"] is not None
    listed = prune["num_ranked"] if has_budget else max(prune["num_neurons"], prune["num_ranked"])
    if doses and max(doses) > listed:
        raise ValueError(
            f"--evaluate.doses asks for {max(doses)} {prune['granularity']}s, but the pruning lists at most {listed}: "
            f"give --prune.num_ranked {max(doses)}."
        )
    without = {**options, "neurons": None, "doses": [], "strengths": [1.0]}  # doses need the list of neurons
    _construct("evaluate", Evaluation, without)
    _by_group("evaluate", check_doses, doses, strengths)


def _construct(group: str, of: type, options: dict[str, Any]) -> None:
    """Make a stage's module, which checks its options and loads nothing."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(of, "stage")
    config = parser.parse_object({"stage": options})  # text becomes paths
    _by_group(group, parser.instantiate_classes, config)


def _by_group(group: str, check: Any, *arguments: Any) -> Any:
    """Call a check, whose error names an option as that stage's own verb does, and name it as ``run`` does."""
    try:
        return check(*arguments)
    except OptionError as error:
        raise error.of(group) from None


def screening(options: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the evaluation that lets the model continue the prompts, and measures nothing else.

    Args:
        options: Config of ``sparc3 run`` with the groups ``evaluate``, ``data`` and ``screen``.
        model: Checkpoint, dtype and revision.
    """
    alone: dict[str, Any] = {"neurons": None, "second_scorer": None, "doses": [], "strengths": [1.0]}
    alone |= {"controls": {"num_draws": 0}, "zero_shot": {"tasks": []}}
    text = options["data"]["text"]
    # An evaluation has a text for perplexity too: here its first window, which costs next to nothing.
    one_window = {"num_tokens": text["init_args"]["window"], "conventions": ["disjoint"]}
    return {
        "model": {**options["evaluate"], **model, **alone},
        "data": {
            "text": {**text, "init_args": {**text["init_args"], **one_window}},
            "prompts": options["screen"],
        },
    }


def wants_screening(data: dict[str, Any]) -> bool:
    """Whether prompts are to come from the stage ``screen``: by the model's own continuation, and from no file."""
    init = data.get("init_args", {})
    return init.get("by") == "continuation" and init.get("source") is None


def from_screening(data: dict[str, Any], completions: Path | None) -> dict[str, Any]:
    """Return the config of prompts with the stage's completions.jsonl as their source, if that is where they come from.

    Args:
        data: Class and options of a data module.
        completions: Of the stage; None if the experiment has none.

    Raises:
        ValueError: If the prompts need the stage, and there is none.
    """
    if not wants_screening(data):
        return data
    if completions is None:
        raise ValueError(
            f"{data['class_path']} chooses prompts by the model's own continuation and names no source: add the "
            "group 'screen', prompts to let the model continue first, or name a completions.jsonl of its own."
        )
    return {**data, "init_args": {**data["init_args"], "source": str(completions)}}


SCORERS = ("scorer", "second_scorer", "lexicon")


KEYS = ("checkpoint", "tokenizer", "source", "nontoxic_source", *SCORERS, "folder")


def digests_of(value: Any, made: Path | None) -> list[str]:
    """Identify the content of every local file or folder that a config reads: sources, checkpoints and scorers.

    Not that of the file that an earlier stage of the same experiment makes: its path tells what it will hold.
    """
    if not isinstance(value, dict):
        return []
    found = []
    for key in KEYS:
        path = value.get(key)
        if not isinstance(path, str) or (key == "lexicon" and value.get("target") not in LEXICAL):
            continue
        path = split_label(path)[0] if key in SCORERS else path
        if is_local(path) and path != str(made):
            found.append(fingerprint(path) if key == "checkpoint" else _content(Path(path).expanduser(), key))
    return found + [digest for item in value.values() for digest in digests_of(item, made)]


def _content(path: Path, key: str) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    if key == "tokenizer" and path.is_dir():  # that of a checkpoint, whose weights may be large and are not read
        files = [file for file in files if file.suffix != ".safetensors"]
    return "".join(sha256_of(file) for file in files)
