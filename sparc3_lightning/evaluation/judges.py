"""The judges of an evaluation: scorers of continuations, and which of them had a part in choosing the neurons."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.results import RESULTS, Judge, Results
from sparc3_lightning.scorers.registry import check_scorer, fingerprint_of, kind_of


def check_judges(names: Sequence[str]) -> None:
    """Raise unless names are those of different scorers; cheap, nothing is loaded.

    Raises:
        OptionError: If there is no name, one comes twice, or there is no scorer of that name.
    """
    if isinstance(names, str):
        raise OptionError("scorers", f"must be a list, such as [{names}], got {names!r}.")
    if not names:
        raise OptionError("scorers", "must name at least one scorer, got an empty list.")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise OptionError("scorers", f"names {name!r} twice: give each scorer once.")
        check_scorer(name, "scorers")


def judges_of(names: Iterable[str], choosers: Sequence[tuple[str, str | None]]) -> dict[str, Judge]:
    """Return the judges before anything is found by them; what they need is fetched.

    Args:
        names: Of scorers.
        choosers: The scorers that had a part in choosing the neurons, see ``NeuronList.choosers``.
    """
    found = {}
    for name in names:
        kind, fingerprint = kind_of(name, "scorers"), fingerprint_of(name)
        is_chooser = any(kind.is_same(name, fingerprint, *chooser) for chooser in choosers)
        found[name] = Judge(is_chooser, kind.source(name), kind.revision(name), fingerprint)
    return found


def headline_of(judges: Mapping[str, Judge]) -> str:
    """Return the judge of the headline: the first that had no part in choosing the neurons, or else the first."""
    return next((name for name, judge in judges.items() if not judge.is_chooser), next(iter(judges)))


def fingerprint_beside(completions: str | None, judge: str) -> str | None:
    """Return what tells a judge of a completions.jsonl from every other scorer.

    Args:
        completions: The file.
        judge: Its name there.

    Returns:
        What the results.json beside the file says; None if there is none, or it does not know the judge.
    """
    try:
        judges = Results.load(Path(completions or "").expanduser().parent / RESULTS).judges
    except (OSError, ValueError, RuntimeError):  # no home folder
        return None
    return judges[judge].fingerprint if judge in judges else None
