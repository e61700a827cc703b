"""The score files that a selection compares: none twice, each on its side, and costs and benefits where needed."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.attribution.scores import Provenance, ScoreFile, WeightScores
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.errors import OptionError

Scores = ScoreFile | WeightScores


def check_sides(general: Sequence[Scores], behavior: Scores, harmless: Scores | None = None) -> None:
    """Raise ValueError if two score files are the same scores of the same samples, or the sides are swapped.

    Args:
        general: Of general samples, one per seed.
        behavior: Of samples of the behaviour.
        harmless: Of samples without the behaviour.
    """
    sides = [("general", file) for file in general] + [("behavior", behavior)]
    sides += [] if harmless is None else [("harmless", harmless)]
    check_are_different(sides)
    for option, file in sides:
        swapped = option != "behavior" and are_swapped(file.provenance.data, behavior.provenance.data)
        if swapped:
            raise OptionError(
                option,
                f"{file.path} is of toxic prompts and {behavior.path} is of others, so that --.{option} and "
                "--.behavior are swapped: exchange them.",
            )
        if swapped is None:
            rank_zero_warn(
                f"{file.path} is of toxic prompts, but is given as --model.{option}: it may be swapped with "
                f"--model.behavior ({behavior.path})."
            )


def check_are_costs(general: ScoreSpec, behavior: ScoreSpec) -> None:
    """Raise OptionError unless one side is costs, and the other one benefits of the same components and model dtype.

    The magnitude of what a text's log-probability changes by is a cost, too, though in no unit of a budget.

    Args:
        general: Of the general scores.
        behavior: Of the behaviour's.
    """
    if not general.is_cost and not (general.target == "text" and general.relevance in ("absolute", "squared")):
        raise OptionError(
            "criterion",
            f"benefit_per_cost divides by what general text costs, and the general scores are no costs "
            f"({_kind(general)}): attribute general text with method gradient, target sampled, relevance fisher.",
        )
    if behavior.relevance != "signed":
        raise OptionError(
            "criterion",
            f"benefit_per_cost needs scores of the behaviour that tell a benefit from a harm, and these do not "
            f"({_kind(behavior)}): attribute the behaviour with method gradient, relevance signed.",
        )
    for name in ("granularity", "dtype"):
        one, other = getattr(general, name), getattr(behavior, name)
        if one != other:
            raise OptionError(
                "criterion",
                f"benefit_per_cost needs costs and benefits of one {name}, and the costs are of {one}, but the "
                f"benefits of {other}: attribute both alike.",
            )


def _kind(spec: ScoreSpec) -> str:
    """Return the method of scores, and what they are of, in words."""
    named = {"target": spec.target, "relevance": spec.relevance}
    return ", ".join([f"method {spec.method}", *(f"{name} {value}" for name, value in named.items() if value)])


def check_are_different(files: Sequence[tuple[str, Scores]]) -> None:
    """Raise ValueError if two score files are scores of one kind of the same samples.

    Args:
        files: Each with the option that names it.
    """
    for i, (option, file) in enumerate(files):
        for other_option, other in files[:i]:
            if are_of_same_samples(file.provenance, other.provenance):
                raise OptionError(
                    option,
                    f"{other.path} (--.{other_option}) and {file.path} (--.{option}) are scores of one kind of the "
                    "same samples, so that they are no two seeds or sides: leave one out, or attribute on others.",
                )


def are_of_same_samples(one: Provenance, other: Provenance) -> bool:
    """Tell whether two score files hold the same scores of the same samples."""
    # The seed of the run is in nothing but random scores.
    is_other = one.spec.method == "random" and one.seed != other.seed
    return one.data_fingerprint == other.data_fingerprint and one.shared() == other.shared() and not is_other


def are_swapped(theirs: Mapping[str, object], behavior: Mapping[str, object]) -> bool | None:
    """Tell whether the samples of another side are toxic prompts and the behaviour's are not; None if it only seems so.

    Args:
        theirs: Class and options of the data module of the other side.
        behavior: Of the behaviour.
    """
    if chosen_by(theirs) != "toxicity" or chosen_by(behavior) == "toxicity":
        return False
    return True if chosen_by(behavior) == "nothing" else None


def chosen_by(data: Mapping[str, object]) -> Literal["toxicity", "nothing"] | None:
    """Return what samples were chosen by: their toxicity, or nothing of the kind; None if it cannot be told.

    Args:
        data: Class and options of their data module.
    """
    if data.get("class") == "C4":  # a file of one's own may hold anything
        return "nothing" if data.get("source") is None else None
    if data.get("class") != "ToxicPrompts":
        return None
    least, greatest = data.get("min_toxicity"), data.get("max_toxicity", 1.0)
    if isinstance(greatest, int | float) and greatest < TOXIC_FROM:
        return "nothing"
    if isinstance(least, int | float):
        return "toxicity" if least >= TOXIC_FROM else None
    return "toxicity" if data.get("by") == "continuation" else None
