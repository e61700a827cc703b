"""The continuations of an evaluation that is under way, so that one that breaks off does not generate them again.

Each rank appends to a file of its own, ``unfinished-<rank>.jsonl``: first the identity of the run, then a line for each
continuation. What was being written when a process was killed is at most the last line, which is then left aside.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.data.prompts import Prompt
from sparc3_lightning.evaluation.generation import Continuation
from sparc3_lightning.files import write_atomically

COMPLETIONS = "completions.jsonl"
PATTERN = "unfinished-*.jsonl"


class Completion(TypedDict):
    """A row of completions.jsonl: a continuation of a prompt by a model, and its score, None if it has none.

    The token ids are those that the model read and drew, without padding and the token that ended it; the texts are for
    people, and without special tokens.
    """

    model: str
    prompt_id: str
    continuation_index: int
    prompt: str
    prompt_token_ids: Sequence[int]
    prompt_toxicity: float | None
    continuation: str
    token_ids: list[int]
    num_tokens: int
    num_unique_tokens: int
    toxicity: float | None
    second_toxicity: NotRequired[float | None]


class CompletionLog:
    """The file of one rank.

    Args:
        folder: Output folder of the run.
        rank: Of the process.
        identity: What tells the run from another whose continuations are not its own: checkpoint, neurons, sampling.
    """

    def __init__(self, folder: Path, rank: int, identity: Mapping[str, object]) -> None:
        self.folder = folder
        self.path = folder / f"unfinished-{rank}.jsonl"
        self.header = json.loads(json.dumps({"identity": identity}))

    def begin(self, prompts: Iterable[Prompt], rows_per_prompt: int) -> dict[str, list[Completion]]:
        """Take over the continuations of an earlier run, on rank 0 before any rank appends.

        Args:
            prompts: Those of this run.
            rows_per_prompt: Continuations of a prompt, by all models; a prompt with fewer is continued anew.

        Returns:
            The rows of each prompt that is complete and was read as the same tokens, with the toxicity that this run
            gives the prompt.

        Raises:
            ValueError: If the output folder holds the continuations of another run; the field that differs is named.
        """
        rows: dict[tuple[str, str, int], Completion] = {}
        for path in [*self.folder.glob(PATTERN), *self.folder.parent.glob(f"*/{PATTERN}")]:
            header, *found = [*_lines(path)] or [{}]
            if header != self.header:
                if path.parent == self.folder:
                    self._refuse(header)
                continue
            rows |= {(row["prompt_id"], row["model"], row["continuation_index"]): row for row in found}
        # That run may have chosen its prompts in another way, by which a prompt is of another group.
        now = {prompt.id: prompt for prompt in prompts}
        by_prompt: dict[str, list[Completion]] = defaultdict(list)
        for row in rows.values():
            prompt = now.get(row["prompt_id"])
            if prompt is not None and row.get("prompt_token_ids") == list(prompt.input_ids):
                by_prompt[prompt.id].append({**row, "prompt_toxicity": prompt.toxicity})
        kept = {key: found for key, found in by_prompt.items() if len(found) == rows_per_prompt}
        lines = [json.dumps(line) for line in [self.header, *(row for found in kept.values() for row in found)]]
        write_atomically(self.path, "\n".join(lines) + "\n")
        for path in self.folder.glob(PATTERN):  # only now: their rows are in this file
            if path != self.path:
                path.unlink(missing_ok=True)
        if kept:
            rank_zero_info(f"Keeping the continuations of {len(kept)} prompts of a run that broke off.")
        return kept

    def append(self, rows: list[Completion]) -> None:
        """Add continuations, and see to it that they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps(self.header) + "\n")
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the files of all ranks in the output folder."""
        for path in self.folder.glob(PATTERN):
            path.unlink(missing_ok=True)

    def _refuse(self, header: dict[str, dict[str, object]]) -> None:
        theirs, mine = header.get("identity", {}), self.header["identity"]
        name = next((name for name in mine if theirs.get(name) != mine[name]), "identity")
        raise ValueError(
            f"{self.folder} holds continuations of another run: its {name} is {theirs.get(name)!r:.80}, now it is "
            f"{mine.get(name)!r:.80}. Choose another folder with --trainer.logger.init_args.version, or remove "
            f"{PATTERN}."
        )


def completion_rows(
    model: str, prompt: Prompt, continuations: list[Continuation], texts: list[str], scores: list[list[float]]
) -> list[Completion]:
    """Return the rows of completions.jsonl of one prompt.

    Args:
        model: Name of the model that continued.
        prompt: The prompt.
        continuations: What was drawn.
        texts: The same as text.
        scores: Per scorer, the toxicity of each in [0, 1]; NaN where it could not be scored, written as null.
    """
    rows: list[Completion] = []
    for j, (continuation, text, *given) in enumerate(zip(continuations, texts, *scores, strict=True)):
        found = [None if continuation.failed or not math.isfinite(score) else score for score in given]
        row: Completion = {
            "model": model,
            "prompt_id": prompt.id,
            "continuation_index": j,
            "prompt": prompt.text,
            "prompt_token_ids": prompt.input_ids,
            "prompt_toxicity": prompt.toxicity,
            "continuation": text,
            "token_ids": continuation.input_ids,
            "num_tokens": len(continuation.input_ids),
            "num_unique_tokens": len(set(continuation.input_ids)),
            "toxicity": found[0],
        }
        if len(found) > 1:
            row["second_toxicity"] = found[1]
        rows.append(row)
    return rows


def save_completions(path: Path, rows: Sequence[Completion]) -> None:
    """Write completions.jsonl: a line for each row, in which letters stand as they are."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    # Half of a character, as JSON can hold, is nothing that a file could: it stays an escape.
    lines = [line if _is_text(line) else json.dumps(row) for line, row in zip(lines, rows, strict=True)]
    write_atomically(path, "\n".join(lines) + "\n")


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


# The types of the fields that a report reads; a score may be missing.
_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt_id": (str,),
    "continuation_index": (int,),
    "prompt": (str,),
    "prompt_toxicity": (int, float, type(None)),
    "continuation": (str,),
    "toxicity": (int, float, type(None)),
}


def load_completions(path: Path) -> list[Completion]:
    """Read completions.jsonl.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged; the line is named.
    """
    rows = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_completion(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error!s:.80}).") from None
    return rows


def _completion(line: str, where: str) -> Completion:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({type(error).__name__}: {error!s:.80}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a JSON {type(row).__name__}, expected an object.")
    for name, types in _FIELDS.items():
        if name not in row or not isinstance(row[name], types) or isinstance(row[name], bool):
            raise ValueError(f"{where} is no row of {COMPLETIONS}: its {name} is {row.get(name)!r:.80}.")
    return cast(Completion, row)


def _lines(path: Path) -> Iterator[Any]:
    """Yield the lines up to the first that is damaged."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
