"""The score files that a selection compares: none twice, and each on its side."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.attribution.scores import Provenance, ScoreFile, WeightScores
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
    for i, (option, file) in enumerate(sides):
        for other_option, other in sides[:i]:
            if are_of_same_samples(file.provenance, other.provenance):
                raise OptionError(
                    option,
                    f"{other.path} (--.{other_option}) and {file.path} (--.{option}) are scores of one kind of the "
                    "same samples, so that they are no two seeds or sides: leave one out, or attribute on others.",
                )
    of_behavior = behavior.provenance.data
    for option, file in sides:
        if option != "behavior":
            check_not_swapped(option, file.provenance.data, of_behavior, str(file.path), str(behavior.path))


def are_of_same_samples(one: Provenance, other: Provenance) -> bool:
    """Tell whether two score files hold the same scores of the same samples."""
    # The seed of the run is in nothing but random scores.
    is_other = one.spec.method == "random" and one.seed != other.seed
    return one.data_fingerprint == other.data_fingerprint and one.shared() == other.shared() and not is_other


def check_not_swapped(option: str, theirs: Mapping[str, object], behavior: Mapping[str, object], *names: str) -> None:
    """Raise ValueError if the samples of one side are toxic and the behaviour's are not; warn where it only seems so.

    Args:
        option: Of the other side.
        theirs: Class and options of its samples.
        behavior: Class and options of the behaviour's samples.
        names: What to call the two in the error.
    """
    if chosen_by(theirs) != "toxicity":
        return
    one, other = names
    if chosen_by(behavior) == "nothing":
        raise OptionError(
            option,
            f"{one} is of toxic prompts and {other} is of others, so that --.{option} and --.behavior are swapped: "
            "exchange them.",
        )
    if chosen_by(behavior) is None:
        rank_zero_warn(
            f"{one} is of toxic prompts, but is given as --model.{option}: it may be swapped with --model.behavior "
            f"({other})."
        )


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
