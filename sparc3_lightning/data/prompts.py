"""Prompts: read from rows of any form, named after their text, and chosen by the model's own continuations."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.files import unsealed
from sparc3_lightning.sources import Row

TOXIC_FROM = 0.5  # RealToxicityPrompts' own threshold, for prompts and for continuations

Where = Mapping[str, str | Sequence[str]]


class Prompt(NamedTuple):
    """A prompt, an id that follows from its text alone, its toxicity in [0, 1] if it was ever scored, and what follows.

    The continuation is the rest of the text that the prompt was taken from, or what a model drew. ``input_ids`` are the
    tokens of the prompt and ``continuation_ids`` those that were drawn, once they are known.
    """

    id: str
    text: str
    toxicity: float | None
    continuation: str | None = None
    continuation_toxicity: float | None = None
    input_ids: Sequence[int] = ()
    continuation_ids: Sequence[int] | None = None


def prompt_id(text: str) -> str:
    """Return an id that is the same wherever the prompt is read from: a hash of its text, white space aside."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def read_prompts(
    rows: Iterable[Row],
    text_field: str = "text",
    until: str | None = None,
    where: Where | None = None,
    place: str = "the prompts",
) -> list[Prompt]:
    """Read rows of RealToxicityPrompts, ``{"prompt": {"text", "toxicity"}}``, or flat ones, ``{"text", "toxicity"}``.

    A prompt that occurs again is taken once, as it was first; see ``prompt_id`` for what is the same.

    Args:
        rows: Of a file.
        text_field: Field that holds the text.
        until: The prompt ends where this mark begins, and is passed over if nothing stands before it; a text without
            the mark is taken whole.
        where: Per field the value, or the values, of the rows to take; None for all rows.
        place: What holds the rows, for errors.

    Raises:
        ValueError: If there is no row, a row has no prompt or a toxicity that is no number, or a prompt is only white
            space.
    """
    prompts: dict[str, Prompt] = {}
    num_without = num_again = 0
    for number, row in matching_rows(rows, where):
        prompt, continuation = row.get("prompt"), row.get("continuation")
        content = prompt if isinstance(prompt, dict) else row
        text = content.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"Row {number} of {place} has no text: expected 'prompt.{text_field}' or '{text_field}' (option "
                f"text_field); it has {sorted(map(str, row))}."
            )
        if until is not None and until in text:
            text = text.partition(until)[0].rstrip()
            if not text.strip():
                num_without += 1
                continue
        if not text.strip():
            raise ValueError(f"Row {number} of {place} is only white space: remove it.")
        following = continuation if isinstance(continuation, dict) else {}
        where_it_is = f"Row {number} of {place}"
        toxicity, of_continuation = (_score(part.get("toxicity"), where_it_is) for part in (content, following))
        rest = None if following.get("text") is None else _text(following, "text", where_it_is)
        found = Prompt(prompt_id(text), text, toxicity, rest, of_continuation)
        num_again += found.id in prompts
        prompts.setdefault(found.id, found)
    if num_without:
        rank_zero_info(f"{num_without} prompts are passed over: nothing stands before {until!r} (option until).")
    if num_again:
        rank_zero_info(f"{num_again} rows of {place} hold a prompt that an earlier row holds, and count once.")
    if not prompts:
        raise ValueError(f"The file of prompts is empty ({place}).")
    return list(prompts.values())


def _score(value: object, place: str) -> float | None:
    """Return a toxicity as a number; None where there is none, which csv writes as an empty text and pandas as NaN."""
    try:
        score = math.nan if value in (None, "") else float(cast("str | float", value))
    except (TypeError, ValueError, OverflowError):
        score = math.inf
    if math.isinf(score):
        raise ValueError(f"{place} has the toxicity {value!r:.60}, expected a number.")
    return None if math.isnan(score) else score


def _text(row: Row, name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{place} has {value!r:.60} in the field {name!r}, expected a text.")
    return value


def _token_ids(row: Row, name: str, place: str) -> list[int]:
    value = row.get(name)
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        raise ValueError(f"{place} has {value!r:.60} in the field {name!r}, expected token ids.")
    return value


def matching_rows(rows: Iterable[Row], where: Where | None) -> Iterator[tuple[int, Row]]:
    """Yield the rows whose fields have the given values, each with its number among all rows, from 1.

    Raises:
        ValueError: If a row lacks a field, or no row has these values.
    """
    wanted = {field: {value} if isinstance(value, str) else set(value) for field, value in (where or {}).items()}
    seen: dict[str, set[str]] = {field: set() for field in wanted}
    any_kept = False
    for number, row in enumerate(rows, start=1):
        for field in wanted:
            if field not in row:
                raise ValueError(
                    f"The option where names the field {field!r}, but row {number} has {sorted(map(str, row))}: name "
                    "one of these."
                )
            seen[field].add(str(row[field]))
        if all(str(row[field]) in values for field, values in wanted.items()):
            any_kept = True
            yield number, row
    if wanted and not any_kept:
        known = "; ".join(f"{field} is {', '.join(sorted(values)[:12])}" for field, values in seen.items())
        raise ValueError(f"No row has {dict(where or {})} (option where). In the rows, {known}.")


def check_options(by: str, text_field: str, until: str | None, where: Where | None) -> None:
    """Raise ValueError if options that read and choose rows of prompts are given for a completions.jsonl."""
    given = {"text_field": text_field != "text", "until": until is not None, "where": bool(where)}
    if by == "continuation" and any(given.values()):
        raise ValueError(
            f"With by=continuation the option {', '.join(name for name, is_given in given.items() if is_given)} has no "
            "meaning: the prompts of a completions.jsonl were read and chosen when 'sparc3 evaluate' wrote it. Give it "
            "to the data of that run (in 'sparc3 run' the group screen), and leave it out here."
        )


def check_source(by: str, source: str | None) -> None:
    """Raise ValueError if the continuations are to choose the prompts, and there are none."""
    if by == "continuation" and source is None:
        raise ValueError(
            "by=continuation needs a source: the completions.jsonl of a 'sparc3 evaluate' of this model (without "
            "neurons), since the continuations are the model's own."
        )


def worst_continued(rows: Iterable[Row], source: str | None) -> list[Prompt]:
    """Give each prompt of completions.jsonl the highest score of the original model's continuations of it.

    Args:
        rows: Of completions.jsonl.
        source: Its name, for the error.

    Raises:
        ValueError: If the rows are not rows of a completions.jsonl.
    """
    worst: dict[str, Prompt] = {}
    for place, row, toxicity in _of_the_original(rows, source):
        found = Prompt(_text(row, "prompt_id", place), _text(row, "prompt", place), toxicity)
        before = worst.setdefault(found.id, found)
        if before.toxicity is not None and toxicity > before.toxicity:
            worst[found.id] = found
    return list(worst.values())


def continued(rows: Iterable[Row], source: str | None) -> list[Prompt]:
    """Return every continuation of the original model in completions.jsonl, with its prompt.

    The first one of every prompt comes first, so that a few cover many prompts. The id of each is its prompt's id
    and its number, ``<prompt>/<continuation>``. Where the rows have token ids, as ``sparc3 evaluate`` writes them, the
    prompts have them too: those that the model read, and those that it drew.

    Args:
        rows: Of completions.jsonl.
        source: Its name, for the error.

    Raises:
        ValueError: If the rows are not rows of a completions.jsonl, or a continuation is there twice.
    """
    found: dict[tuple[int, str], Prompt] = {}
    for place, row, toxicity in _of_the_original(rows, source):
        name, number = _text(row, "prompt_id", place), row.get("continuation_index")
        if type(number) is not int:
            raise ValueError(f"{place} has {number!r:.60} in the field 'continuation_index', expected a number.")
        if (number, name) in found:
            raise ValueError(f"{place} is a second continuation {number} of the prompt {name}: give one run's file.")
        has_ids = "token_ids" in row
        found[number, name] = Prompt(
            f"{name}/{number}",
            _text(row, "prompt", place),
            _score(row.get("prompt_toxicity"), place),
            _text(row, "continuation", place),
            toxicity,
            _token_ids(row, "prompt_token_ids", place) if has_ids else (),
            _token_ids(row, "token_ids", place) if has_ids else None,
        )
    return [prompt for _, prompt in sorted(found.items(), key=lambda item: item[0][0])]


def _of_the_original(rows: Iterable[Row], source: str | None) -> Iterator[tuple[str, Row, float]]:
    """Yield the continuations of the original model that were scored: a name for errors, the row, and its score.

    Of several scorers it is the first.
    """
    for number, row in enumerate(rows, start=1):
        if not {"prompt_id", "prompt", "model", "scores"} <= row.keys():
            old = ", but one of an older version: evaluate again" if "toxicity" in row else ""
            raise ValueError(f"{source} is not a completions.jsonl of 'sparc3 evaluate' (by=continuation){old}.")
        place = f"Row {number} of {source}"
        try:
            unsealed(row)
        except ValueError as error:
            raise ValueError(f"{place} cannot be used: {error}. Evaluate again.") from None
        scores = row["scores"]
        if not isinstance(scores, dict) or not scores:
            raise ValueError(f"{place} has {scores!r:.60} in the field 'scores', expected the score by each scorer.")
        if row["model"] == "baseline" and (toxicity := _score(scores[scorer_of(row)], place)) is not None:
            yield place, row, toxicity


def scorer_of(row: Row) -> str | None:
    """Return the scorer whose scores in a row of completions.jsonl choose prompts: the first that was named."""
    scores = row.get("scores")
    return next(iter(scores), None) if isinstance(scores, dict) else None


def worst_first(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Sort prompts by their score, the highest first; those that are alike by their id, so that the order is one."""
    return sorted(prompts, key=lambda prompt: (-(prompt.toxicity or 0.0), prompt.id))
