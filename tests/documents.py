"""The commands of README.md and of the cookbook as a shell takes them, and the options that make each of them tiny."""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helpers import WORDS, sentence, write_choice_task, write_jsonl

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "configs/README.md")
PROGRAMS = ("sparc3", "pip", "pytest", "python", "srun", "sbatch", "configs/slurm/pipeline.sh")
# Programs that arguments may come from; whatever else is neither of these is not found.
READERS = ("ls", "paste")
LARGEST = {
    "num_samples": 4,
    "num_prompts": 6,
    "num_nontoxic": 2,
    "num_pairs": 4,
    "seq_len": 16,
    "window": 32,
    "stride": 16,
    "num_tokens": 200,
    "num_continuations": 2,
    "max_new_tokens": 5,
    "num_draws": 1,
    "steps": 2,
    "num_neurons": 4,
}
ON_ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "enable_progress_bar": False}
TASK = "toy_choice"
TOYS = "def letters(texts):\n    return [text.count('e') / (1 + len(text)) for text in texts]\n"


class Step(NamedTuple):
    """A statement of a shell (``sh``), or a program (``python``)."""

    language: str
    text: str


def sections(text: str) -> dict[str, str]:
    """Divide a document at its headings of the second degree; what stands before the first has an empty name."""
    found = {"": ""}
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        heading, _, rest = part.partition("\n")
        found |= {heading.removeprefix("## "): rest} if part.startswith("## ") else {"": part}
    return found


def steps(text: str) -> Iterator[Step]:
    """Yield what a document lets a reader run: blocks that are indented or of sh or python, and commands in a line.

    Raises:
        ValueError: If a block is of another language than text, which is what a command printed, or is incomplete.
    """
    fence: str | None = None
    block: list[str] = []
    prose = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            yield from _steps_of(fence, block) if fence else _steps_in(prose)
            fence, block, prose = (None if fence else line.removeprefix("```") or "no language"), [], ""
        elif fence is not None:
            block.append(line)
        elif line.startswith("    ") and not prose:
            block.append(line.removeprefix("    "))
        else:
            yield from _steps_of("sh", block)
            block = []
            if line and not line.startswith("<!--"):
                prose += f"{line} "
            else:
                yield from _steps_in(prose)
                prose = ""
    if fence is not None:
        raise ValueError(f"The block of {fence} has no end.")


def _steps_in(prose: str) -> Iterator[Step]:
    for command in re.findall(r"`((?:sparc3|pip) [^`]+)`", prose):
        if not re.fullmatch(r"sparc3 \w+", command):  # the name of a verb
            yield Step("sh", command)


def _steps_of(language: str, block: list[str]) -> Iterator[Step]:
    if language not in ("sh", "python", "text"):
        raise ValueError(f"A block is of {language!r}, not of sh, python or text.")
    if language == "python":
        yield Step(language, "\n".join(block))
    statement = ""
    for line in block if language == "sh" else []:
        statement += line
        if _is_complete(statement):
            if statement.strip() and not statement.lstrip().startswith("#"):
                yield Step(language, statement)
            statement = ""
        else:
            statement += "\n"
    if statement.strip():
        raise ValueError(f"A command has no end: {statement}")


def _is_complete(statement: str) -> bool:
    checked = subprocess.run(["bash", "-n", "-c", statement], capture_output=True)
    return not statement.endswith("\\") and checked.returncode == 0


def commands_of(statement: str, **variables: str) -> list[list[str]]:
    """Return the commands of a statement, word by word, as a shell in this folder would start them.

    Raises:
        ValueError: If one of them is of another program than those in ``PROGRAMS``.
    """
    found = Path("found.txt").absolute()
    found.write_bytes(b"")
    tools = Path("tools")
    tools.mkdir(exist_ok=True)
    for name in READERS:
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    notes = "".join(f'{name}() {{ printf "%s\\0" {name} "$@" "" >>"$FOUND"; }}\n' for name in PROGRAMS)
    done = subprocess.run(
        [str(shutil.which("bash")), "-e", "-o", "pipefail", "-c", notes + statement],
        env={"PATH": str(tools.absolute()), "FOUND": str(found), **variables},
        capture_output=True,
        text=True,
    )
    commands = [words.split("\0") for words in found.read_text().split("\0\0")[:-1]]
    if done.returncode != 0 or not commands:
        raise ValueError(f"No test knows how to run this: {statement}\n{done.stderr}")
    return commands


def write_inputs(folder: Path) -> None:
    """Write rows with the fields of every data set, prompts, a scorer and a zero-shot task."""
    rows = []
    for number in range(60):
        text, other = sentence(number, 20 + number % 5), sentence(100 + number, 6)
        row: dict[str, Any] = {"text": text, "passage": text, "document": text, "context": f"{other} BLANK."}
        row |= {"stereotype": f"{other} cat", "anti-stereotype": f"{other} dog", "type": "intrasentence"}
        rows.append({**row, "toxicity": 0.95 if number < 50 else 0.1, "bias_type": ("gender", "race")[number % 2]})
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "prompts.txt").write_text(f"{sentence(200, 4)}\n{sentence(201, 5)}\n")
    # Half of the words each, so that a few short answers have some of either list.
    words = sorted(set(WORDS))
    (folder / "words.txt").write_text("\n".join(["# Words of the sentences.", "the dog", *words[::2]]) + "\n")
    (folder / "kept.txt").write_text("\n".join(words[1::2]) + "\n")
    (folder / "toys.py").write_text(TOYS)
    questions = [{"question": sentence(i, 4), "choices": ["a cat", "the dog"], "label": i % 2} for i in range(6)]
    write_choice_task(folder, TASK, questions)


def tiny(options: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Return the options of a verb with small numbers, a tiny checkpoint and the inputs of ``write_inputs``."""
    return {name: _tiny(name, value, options, checkpoint) for name, value in options.items()}


def _tiny(name: str, value: Any, beside: dict[str, Any], checkpoint: str) -> Any:
    if name == "trainer":
        return {**value, **ON_ONE_CPU}
    if name == "zero_shot":
        return {**value, "tasks": [TASK], "folder": "tasks"} if value["tasks"] else value
    if isinstance(value, dict):
        found = tiny(value, checkpoint)
        if name == "screen":  # some of its prompts are attributed on, others evaluated
            found["init_args"]["num_prompts"] = 12
        if name == "budget_text":  # from the same file as what is attributed on
            found["init_args"]["seed"] = 3
        if name == "neutral":  # as many samples as the steps take
            found["init_args"]["batch_size"] = 2
        return found
    if name in LARGEST:
        # Without a number all rows are taken, or as many as the protocol says.
        return LARGEST[name] if value is None else min(value, LARGEST[name])
    if name == "source":
        return value if beside.get("by") == "continuation" else "rows.jsonl"
    if name == "checkpoint":
        return value if value is None or Path(value).exists() else checkpoint
    if name == "scorers":
        return [_tiny("scorer", one, beside, checkpoint) for one in value]
    if name == "chat":  # the tiny checkpoint has no template
        return False
    if name in ("lexicon", "kept_words") and str(value).endswith(".txt"):
        return "words.txt" if name == "lexicon" else "kept.txt"
    if name in ("scorer", "lexicon"):
        return {"original": "small"}.get(value, "toys:letters" if "/" in str(value) else value)
    if name == "general_seeds":
        return value[:1]
    if name == "doses":
        return [2] if value else value
    if name == "max_perplexity_increase":
        return value and 10.0
    return value


def is_carried_out(words: list[str]) -> bool:
    """Return whether .ci/run carries out a command of pip or pytest, or installs the extra that it is about."""
    carried_out = [
        shlex.split(line.replace("$checkout", ".").replace(" -q ", " ").partition(" --")[0])
        for line in map(str.strip, (ROOT / ".ci" / "run").read_text().splitlines())
        if line.startswith(("pip ", "pytest "))
    ]
    extra = re.fullmatch(r"pip install \.\[(\w+)\]", " ".join(words))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    # The extra test holds others: "sparc3_lightning[lmeval,scorers]".
    is_held = extra is not None and extra[1] in re.split(r"[\[\],]", extras["test"][0])
    return words in carried_out or (is_held and ["pip", "install", "-e", ".[test]"] in carried_out)
