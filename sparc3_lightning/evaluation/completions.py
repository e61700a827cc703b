"""completions.jsonl, and the continuations of an evaluation under way, so that none is generated a second time.

Each rank appends to a file of its own, ``unfinished-<rank>.jsonl``: first the identity of the run, then a line for each
continuation. Every line has its checksum. What was being written when a process was killed is at most the last line,
which is then left aside.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.data.prompts import Prompt
from sparc3_lightning.evaluation.generation import Continuation
from sparc3_lightning.files import Count, Share, parse_json, read_as, sealed, unsealed, write_atomically
from sparc3_lightning.provenance import differences

COMPLETIONS = "completions.jsonl"
PATTERN = "unfinished-*.jsonl"
FORMAT = "sparc3_lightning unfinished 2"
# Of an identity, what is no option, and changes without being asked to.
CONTENTS = {"checkpoint_fingerprint", "tokenizer", "scorers", "dtype", "versions"}


class Completion(TypedDict):
    """A row of completions.jsonl: a continuation of a prompt by a model, and its score by each judge; None without one.

    The judges are in the order in which they were named. The token ids are those that the model read and drew, without
    padding and the token that ended it; the texts are for people, and without special tokens.
    """

    model: str
    prompt_id: str
    continuation_index: Count
    prompt: str
    prompt_token_ids: list[int]
    prompt_toxicity: float | None
    continuation: str
    token_ids: list[int]
    num_tokens: Count
    num_unique_tokens: Count
    scores: dict[str, Share | None]


class _Header(TypedDict):
    """The first line of a file of continuations that are under way."""

    format: str
    identity: dict[str, object]


class CompletionLog:
    """The file of one rank.

    Args:
        folder: Output folder of the run.
        rank: Of the process.
        identity: What tells the run from another whose continuations are not its own: checkpoint, neurons, sampling.
        judges: What this run calls the scorers, of which the identity holds the contents.
    """

    def __init__(self, folder: Path, rank: int, identity: Mapping[str, object], judges: Sequence[str]) -> None:
        self.folder = folder
        self.judges = judges
        self.path = folder / f"unfinished-{rank}.jsonl"
        self.identity: dict[str, object] = json.loads(json.dumps(identity))
        self.header = {"format": FORMAT, "identity": self.identity}

    def begin(self, prompts: Iterable[Prompt], rows_per_prompt: int) -> dict[str, list[Completion]]:
        """Take over the continuations of an earlier run, on rank 0 before any rank appends.

        Args:
            prompts: Those of this run.
            rows_per_prompt: Continuations of a prompt, by all models; a prompt with fewer is continued anew.

        Returns:
            The rows of each prompt that is complete and was read as the same tokens, with the toxicity that this run
            gives the prompt, and the names that it gives the judges.

        Raises:
            ValueError: If the output folder holds the continuations of another run; the field that differs is named. Or
                if a file of it was changed; the line is named.
        """
        rows: dict[tuple[str, str, int], Completion] = {}
        for path in dict.fromkeys([*self.folder.glob(PATTERN), *self.folder.parent.glob(f"*/{PATTERN}")]):
            rows |= {
                (row["prompt_id"], row["model"], row["continuation_index"]): row
                for row in (self._read(path) if path.parent == self.folder else self._read_other(path))
            }
        # That run may have chosen its prompts in another way, by which a prompt is of another group.
        now = {prompt.id: prompt for prompt in prompts}
        by_prompt: dict[str, list[Completion]] = defaultdict(list)
        for row in rows.values():
            prompt = now.get(row["prompt_id"])
            if prompt is None or len(row["scores"]) != len(self.judges):
                continue
            if row["prompt_token_ids"] == list(prompt.input_ids):
                scores = dict(zip(self.judges, row["scores"].values(), strict=True))
                by_prompt[prompt.id].append({**row, "prompt_toxicity": prompt.toxicity, "scores": scores})
        kept = {key: found for key, found in by_prompt.items() if len(found) == rows_per_prompt}
        lines = [self.header, *(row for found in kept.values() for row in found)]
        write_atomically(self.path, "".join(map(_line, lines)))
        for path in self.folder.glob(PATTERN):  # only now: their rows are in this file
            if path != self.path:
                path.unlink(missing_ok=True)
        if kept:
            rank_zero_info(f"Keeping the continuations of {len(kept)} prompts of a run that broke off.")
        return kept

    def _read(self, path: Path) -> list[Completion]:
        """Return the rows of a file in the output folder; none if a rank was killed before it wrote its first line."""
        identity, rows = read_unfinished(path)
        for name in [] if identity is None else differences(identity, self.identity)[:1]:
            theirs = (identity or {}).get(name)
            raise ValueError(
                f"{self.folder} holds continuations of another run: its {name} is {theirs!r:.80}, now it is "
                f"{self.identity.get(name)!r:.80}. Choose another folder with --trainer.logger.init_args.version, or "
                f"remove {PATTERN}."
            )
        return rows

    def _read_other(self, path: Path) -> list[Completion]:
        """Return the rows of a file in a folder beside, if it is of the same run."""
        try:
            identity, rows = read_unfinished(path)
        except (OSError, ValueError) as error:  # it need not be this run's concern
            rank_zero_info(f"Continuations of an earlier run were not used: {error}")
            return []
        changed = [] if identity is None else differences(identity, self.identity)
        if changed and set(changed) <= CONTENTS:
            what = " and the ".join(changed)
            rank_zero_info(f"Continuations of an earlier run in {path.parent} were not used: the {what} changed.")
        return [] if changed else rows

    def append(self, rows: list[Completion]) -> None:
        """Add continuations, and see to it that they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(_line(self.header))
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the files of all ranks in the output folder."""
        for path in self.folder.glob(PATTERN):
            path.unlink(missing_ok=True)


def read_unfinished(path: Path) -> tuple[dict[str, object] | None, list[Completion]]:
    """Return the identity of the run that wrote a file of continuations under way, and what it wrote.

    A last line that was broken off is left aside. If it is the first one too, there is no identity yet.

    Raises:
        ValueError: If a line was changed, or is of an older version.
    """
    *lines, last = path.read_bytes().split(b"\n")
    try:
        last = last if unsealed(parse_json(last)) else b""
    except ValueError:
        last = b""
    rows = _rows(path, [*lines, last] if last else lines, f"Choose another folder, or remove {path}.")
    if not rows:
        return None, []
    try:
        header: _Header = read_as(_Header, rows[0])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r:.80}, expected {FORMAT!r}")
        return header["identity"], [read_as(Completion, row, f"line {i}") for i, row in enumerate(rows[1:], start=2)]
    except ValueError as error:
        raise ValueError(f"{path} holds no continuations of this version: {error}. Remove it.") from None


def save_completions(path: Path, rows: Iterable[Completion]) -> None:
    """Write completions.jsonl: a row a line, with its checksum."""
    found = [sealed(row) for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    # Half of a character, as JSON can hold, is nothing that a file could: it stays an escape.
    lines = [line if _is_text(line) else json.dumps(row) for line, row in zip(lines, found, strict=True)]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_completions(path: Path) -> list[Completion]:
    """Read completions.jsonl.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line was changed, or is no row; the line is named.
    """
    *lines, last = path.read_bytes().split(b"\n")
    rows = _rows(path, [*lines, last] if last else lines, "Evaluate again.")
    try:
        return [read_as(Completion, row, f"line {i}") for i, row in enumerate(rows, start=1)]
    except ValueError as error:
        raise ValueError(f"{path} is not a completions.jsonl: {error}.") from None


def score_of(row: Completion, judge: str) -> float:
    """Return the score of a continuation by a judge; NaN if it has none."""
    score = row["scores"][judge]
    return math.nan if score is None else score


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(sealed(row)) + "\n"


def _rows(path: Path, lines: Sequence[bytes], way_out: str) -> list[dict[str, object]]:
    """Return the rows of lines of JSON.

    Raises:
        ValueError: If a line was changed; it is named.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(unsealed(parse_json(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} cannot be used: {error!s:.200}. {way_out}") from None
    return rows


def completion_rows(
    model: str,
    prompt: Prompt,
    continuations: list[Continuation],
    texts: list[str],
    scores: Mapping[str, Sequence[float]],
) -> list[Completion]:
    """Return the rows of completions.jsonl of one prompt.

    Args:
        model: Name of the model that continued.
        prompt: The prompt.
        continuations: What was drawn.
        texts: The same as text.
        scores: Per judge, the score of each in [0, 1]; NaN where it could not be scored, written as null.
    """
    rows: list[Completion] = []
    for j, (continuation, text, *given) in enumerate(zip(continuations, texts, *scores.values(), strict=True)):
        found = [None if continuation.failed or not math.isfinite(score) else score for score in given]
        row: Completion = {
            "model": model,
            "prompt_id": prompt.id,
            "continuation_index": j,
            "prompt": prompt.text,
            "prompt_token_ids": list(prompt.input_ids),
            "prompt_toxicity": prompt.toxicity,
            "continuation": text,
            "token_ids": continuation.input_ids,
            "num_tokens": len(continuation.input_ids),
            "num_unique_tokens": len(set(continuation.input_ids)),
            "scores": dict(zip(scores, found, strict=True)),
        }
        rows.append(row)
    return rows
