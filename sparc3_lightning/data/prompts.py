"""Prompts: read from rows of any form, named after their text, and chosen by the model's own continuations."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypedDict, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.files import Count, Share, read_as, unsealed
from sparc3_lightning.sources import Row

TOXIC_FROM = 0.5  # RealToxicityPrompts' own threshold, for prompts and for continuations

Where = Mapping[str, str | Sequence[str]]


class Prompt(NamedTuple):
    """A prompt, an id that follows from its text alone, its toxicity in [0, 1] if it was ever scored, and what follows.

    The continuation is the rest of the text that the prompt was taken from.
    """

    id: str
    text: str
    toxicity: float | None
    continuation: str | None = None
    continuation_toxicity: float | None = None


def prompt_id(text: str) -> str:
    """Return an id that is the same wherever the prompt is read from: a hash of its text, white space aside."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def read_prompts(
    rows: Iterable[Row], text_field: str = "text", until: str | None = None, where: Where | None = None
) -> list[Prompt]:
    """Read rows of RealToxicityPrompts, ``{"prompt": {"text", "toxicity"}}``, or flat ones, ``{"text", "toxicity"}``.

    A prompt that occurs again is taken once.

    Args:
        rows: Of a file.
        text_field: Field that holds the text.
        until: The prompt ends where this mark begins, and is passed over if nothing stands before it; a text without
            the mark is taken whole.
        where: Per field the value, or the values, of the rows to take; None for all rows.

    Raises:
        ValueError: If there is no row, a row has no prompt or a toxicity that is no number, or a prompt is only white
            space.
    """
    prompts: dict[str, Prompt] = {}
    num_without = 0
    for number, row in enumerate(matching_rows(rows, where), start=1):
        prompt, continuation = row.get("prompt"), row.get("continuation")
        content = prompt if isinstance(prompt, dict) else row
        text = content.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"Row {number} of the prompts has no text: expected 'prompt.{text_field}' or '{text_field}' (option "
                f"text_field); it has {sorted(map(str, row))}."
            )
        if until is not None and until in text:
            text = text.partition(until)[0].rstrip()
            if not text.strip():
                num_without += 1
                continue
        if not text.strip():
            raise ValueError(f"Row {number} of the prompts is only white space: remove it.")
        following = continuation if isinstance(continuation, dict) else {}
        toxicity, of_continuation = (_score(part.get("toxicity"), number) for part in (content, following))
        found = Prompt(prompt_id(text), text, toxicity, following.get("text"), of_continuation)
        prompts.setdefault(found.id, found)
    if num_without:
        rank_zero_info(f"{num_without} prompts are passed over: nothing stands before {until!r} (option until).")
    if not prompts:
        raise ValueError("The file of prompts is empty.")
    return list(prompts.values())


def _score(value: object, number: int) -> float | None:
    """Return a toxicity as a number; None where there is none, which csv writes as an empty text and pandas as NaN."""
    try:
        score = math.nan if value in (None, "") else float(cast("str | float", value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"Row {number} of the prompts has the toxicity {value!r:.60}, expected a number.") from None
    return None if math.isnan(score) else score


def matching_rows(rows: Iterable[Row], where: Where | None) -> Iterable[Row]:
    """Yield the rows whose fields have the given values.

    Raises:
        ValueError: If a row lacks a field, or no row has these values.
    """
    wanted = {field: {value} if isinstance(value, str) else set(value) for field, value in (where or {}).items()}
    seen: dict[str, set[str]] = {field: set() for field in wanted}
    any_kept = False
    for row in rows:
        for field in wanted:
            if field not in row:
                raise ValueError(
                    f"The option where names the field {field!r}, but a row has {sorted(map(str, row))}: name one of "
                    "these."
                )
            seen[field].add(str(row[field]))
        if all(str(row[field]) in values for field, values in wanted.items()):
            any_kept = True
            yield row
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


class _Scored(TypedDict):
    """What is read of a row of completions.jsonl."""

    prompt_id: str
    continuation_index: Count
    prompt: str
    prompt_toxicity: float | None
    continuation: str
    toxicity: Share


def worst_continued(rows: Iterable[Row], source: str | None) -> list[Prompt]:
    """Give each prompt of completions.jsonl the highest score of the original model's continuations of it.

    Args:
        rows: Of completions.jsonl.
        source: Its name, for the error.

    Raises:
        ValueError: If the rows are not rows of a completions.jsonl.
    """
    worst: dict[str, Prompt] = {}
    for row in _of_the_original(rows, source):
        before = worst.get(row["prompt_id"])
        if before is None or before.toxicity is None or row["toxicity"] > before.toxicity:
            worst[row["prompt_id"]] = Prompt(row["prompt_id"], row["prompt"], row["toxicity"])
    return list(worst.values())


def continued(rows: Iterable[Row], source: str | None) -> list[Prompt]:
    """Return every continuation of the original model in completions.jsonl, with its prompt.

    The first one of every prompt comes first, so that a few cover many prompts. The id of each is its prompt's id
    and its number, ``<prompt>/<continuation>``.

    Args:
        rows: Of completions.jsonl.
        source: Its name, for the error.

    Raises:
        ValueError: If the rows are not rows of a completions.jsonl.
    """
    return [
        Prompt(
            f"{row['prompt_id']}/{row['continuation_index']}",
            row["prompt"],
            row["prompt_toxicity"],
            row["continuation"],
            row["toxicity"],
        )
        for row in sorted(_of_the_original(rows, source), key=lambda row: row["continuation_index"])
    ]


def _of_the_original(rows: Iterable[Row], source: str | None) -> Iterable[_Scored]:
    """Yield the continuations of the original model that were scored."""
    for number, row in enumerate(rows, start=1):
        if not {"prompt_id", "prompt", "model", "toxicity"} <= row.keys():
            raise ValueError(f"{source} is not a completions.jsonl of 'sparc3 evaluate' (by=continuation).")
        try:
            unsealed(row)
            if row["model"] == "baseline" and row["toxicity"] is not None:
                yield cast("_Scored", read_as(_Scored, row))
        except ValueError as error:
            raise ValueError(f"{source}, row {number} cannot be used: {error}. Evaluate again.") from None


def worst_first(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Sort prompts by their score, the highest first; those that are alike by their id, so that the order is one."""
    return sorted(prompts, key=lambda prompt: (-(prompt.toxicity or 0.0), prompt.id))
