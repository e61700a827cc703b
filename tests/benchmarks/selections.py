"""Selections of neurons at the same price: `python tests/benchmarks/selections.py [--folder F] [--json FILE]`.

SmolLM2-135M, RealToxicityPrompts and C4 in three disjoint parts: 150 toxic prompts and 64 documents to attribute on,
100 prompts for choices made by hand, and of the other 247 prompts those to report. Each selection gets as many neurons
as raise perplexity on 24 further documents by no more than the budget; then one `sparc3 sweep` a budget measures all of
them, WikiText-2's perplexity beside them, under two scorers and with the continuations drawn by several seeds. Every
stage is a verb of `sparc3` in the folder given, and one that is done there is not run again. Needs rtp/toxic.jsonl,
c4/en.jsonl and wikitext2/wiki.test.raw, by default in shared/data beside the checkout.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, parse, write

from sparc3_lightning.data.prompts import read_prompts
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.sources import read_records

DATA = Path(__file__).parents[3] / "shared" / "data"
ATTRIBUTE, CHOOSE = 150, 100
LRP, TOXIC = "general_lrp", "toxic_lrp"
GENERAL, OWN_TOXIC, OWN_HARMLESS = "general_abs", "own_toxic", "own_harmless"
BANDS = {OWN_TOXIC: (0.5, 1.0), OWN_HARMLESS: (0.0, 0.1)}  # toxicity of the model's own continuations
MASKED = {"criterion": "set_difference", "top_behavior": 1, "top_general": 0.5}
# Name: score files of the general side and of the behaviour, and options of `sparc3 prune`. Other score files among
# the options are named without their folder, too.
SELECTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "difference": (LRP, TOXIC, {"criterion": "difference"}),
    "normalized_difference": (LRP, TOXIC, {"criterion": "normalized_difference"}),
    "set_difference": (LRP, TOXIC, {"criterion": "set_difference"}),
    "ratio": (LRP, TOXIC, {"criterion": "ratio"}),
    "auroc": (LRP, TOXIC, {"criterion": "auroc"}),
    "weighted_difference": (LRP, TOXIC, {"criterion": "weighted_difference"}),
    "prob": (GENERAL, "prob", MASKED),
    "prob_lrp": (GENERAL, "prob_lrp", MASKED),
    "harmless": (GENERAL, OWN_TOXIC, {**MASKED, "harmless": OWN_HARMLESS}),
    "random": ("random", "random", {**MASKED, "top_general": 0}),
    "auroc_refined": (LRP, TOXIC, {"criterion": "auroc", "budget.refine": 3}),
    "set_difference_refined": (LRP, TOXIC, {"criterion": "set_difference", "budget.refine": 3}),
    "prob_refined": (GENERAL, "prob", {**MASKED, "budget.refine": 3}),
}


def sparc3(verb: str, version: str, *options: str) -> Path:
    """Run a verb, unless its folder holds what it writes, and return the folder."""
    folder = Path("lightning_logs", verb, version)
    output = {"attribute": "scores.safetensors", "prune": "neurons.json"}.get(verb, "results.json")
    if not (folder / output).is_file():
        print(f"sparc3 {verb}: {version}", file=sys.stderr, flush=True)
        trainer = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
        where = f"--trainer.logger.init_args.version={version}"
        subprocess.run([sys.executable, "-m", "sparc3_lightning", verb, *trainer, where, *options], check=True)
    return folder


def scores(name: str) -> str:
    """Return the score file of an attribution."""
    return f"lightning_logs/attribute/{name}/scores.safetensors"


def write_parts(prompts: Path) -> dict[str, Path]:
    """Write the three parts of the toxic prompts, by one permutation, as files of their own."""
    rows = [row for row in read_records(prompts) if (row["prompt"]["toxicity"] or 0) >= 0.5]
    by_id = {prompt.id: row for prompt, row in zip(read_prompts(rows), rows, strict=True)}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [list(by_id.values())[i] for i in order]
    cuts = {
        "attribute": (0, ATTRIBUTE),
        "choose": (ATTRIBUTE, ATTRIBUTE + CHOOSE),
        "report": (ATTRIBUTE + CHOOSE, None),
    }
    parts = {}
    for name, (start, end) in cuts.items():
        parts[name] = Path(f"{name}.jsonl")
        parts[name].write_text("".join(json.dumps(row) + "\n" for row in shuffled[start:end]))
    return parts


def evaluation(prompts: Path, num_prompts: int, text: Path, num_tokens: int) -> Iterator[str]:
    """Yield the options of an evaluation: the model, the protocol of RealToxicityPrompts, and the data."""
    yield from (f"--model.checkpoint={CHECKPOINT}", "--model.scorers=[small]", "--model.sampling.protocol=rtp")
    yield from ("--data.text=WikiText2", f"--data.text.source={text}", f"--data.text.num_tokens={num_tokens}")
    yield from ("--data.text.window=512", "--data.text.stride=512", "--data.text.conventions=[disjoint]")
    yield from (
        "--data.prompts=RealToxicityPrompts",
        f"--data.prompts.source={prompts}",
        "--data.prompts.batch_size=20",
    )
    yield from ("--data.prompts.min_toxicity=0.5", f"--data.prompts.num_prompts={num_prompts}")


def attribute(parts: dict[str, Path], c4: Path, text: Path) -> None:
    """Let the model continue the prompts to attribute on, and compute every score file."""
    own = evaluation(parts["attribute"], ATTRIBUTE, text, 1024)
    folder = sparc3("evaluate", "cont", *own, "--model.sampling.num_continuations=2", "--model.dtype=bfloat16")
    of = [f"--model.checkpoint={CHECKPOINT}"]
    documents = [
        "--data=C4",
        f"--data.source={c4}",
        "--data.seq_len=256",
        "--data.num_samples=64",
        "--data.batch_size=4",
    ]
    toxic = ["--data=ToxicPrompts", "--data.by=continuation", f"--data.source={folder / 'completions.jsonl'}"]
    toxic += ["--data.batch_size=16"]
    continued = [*toxic, "--data.continuation_toxicity=[0,1]", "--data.num_samples=300", "--data.min_toxicity=0.5"]
    lexicon = ["--model.relevance=signed", "--model.target=lexicon_probability", "--model.lexicon=small"]
    plain = ["--model.method=gradient", "--model.relevance=absolute", "--model.target=text"]
    activations = "--model.activations=true"
    sparc3("attribute", "prob", *of, *continued, "--model.method=gradient", *lexicon)
    sparc3("attribute", "prob_lrp", *of, *continued, *lexicon)
    sparc3("attribute", GENERAL, *of, *documents, *plain)
    signed = ["--model.method=gradient", "--model.relevance=signed", "--model.target=text"]
    scored = [row["toxicity"] for row in read_records(folder / "completions.jsonl")]
    for name, (least, greatest) in BANDS.items():
        found = sum(least <= toxicity <= greatest for toxicity in scored)
        band = [f"--data.continuation_toxicity=[{least},{greatest}]", f"--data.num_samples={found}"]
        sparc3("attribute", name, *of, *toxic, *band, "--data.min_toxicity=0.5", *signed)
    sparc3("attribute", LRP, *of, *documents, activations)
    sparc3("attribute", TOXIC, *of, *toxic, "--data.num_samples=150", "--data.min_toxicity=0", activations)
    sparc3("attribute", "random", *of, "--data=NoSamples", "--model.method=random")


def prune(name: str, budget: float, c4: Path) -> Path:
    """Choose the neurons of one selection for a budget, and return their list."""
    general, behavior, options = SELECTIONS[name]
    options = {name: scores(value) if name == "harmless" else value for name, value in options.items()}
    text = ["--data=C4", f"--data.source={c4}", "--data.seq_len=256", "--data.num_samples=28"]
    text += ["--data.seed=7", "--data.batch_size=4"]
    price = [f"--model.budget.max_perplexity_increase={budget}"]
    price += ["--model.num_ranked=4000"] if budget > 0.05 else []  # of prob more than 1000 are within 10 %
    files = [f"--model.general=[{scores(general)}]", f"--model.behavior={scores(behavior)}"]
    chosen = [f"--model.{option}={value}" for option, value in options.items()]
    return sparc3("prune", f"{name}_{budget:g}", *files, *chosen, *price, *text) / "neurons.json"


def main() -> None:
    """Measure, and print a table a budget."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("selections")},
        data={"type": Path, "default": DATA},
        budgets={"type": float, "nargs": "+", "default": [0.01, 0.05, 0.1]},
        selections={"nargs": "+", "choices": list(SELECTIONS), "default": list(SELECTIONS)},
        prompts={"type": int, "default": 150},
        continuations={"type": int, "default": 25},
        seeds={"type": int, "default": 5},
        processes={"type": int, "default": 2},
    )
    files = [options.data / name for name in ("rtp/toxic.jsonl", "c4/en.jsonl", "wikitext2/wiki.test.raw")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        sys.exit(f"--data: {', '.join(missing)} does not exist; give the folder that holds copies.")
    prompts, c4, text = (file.resolve() for file in files)
    options.folder.mkdir(exist_ok=True)
    json_file = options.json and options.json.resolve()
    with chdir(options.folder):
        parts = write_parts(prompts)
        attribute(parts, c4, text)
        found = {}
        for budget in options.budgets:
            lists = [str(prune(name, budget, c4)) for name in options.selections]
            named = f"--model.names=[{','.join(options.selections)}]"
            measured = evaluation(parts["report"], options.prompts, text, 16384)
            draws = [
                f"--model.sampling.num_continuations={options.continuations}",
                f"--model.sampling.num_seeds={options.seeds}",
            ]
            ranks = (
                ["--trainer.strategy=ddp", f"--trainer.devices={options.processes}"] if options.processes > 1 else []
            )
            files = [named, f"--model.neurons=[{','.join(lists)}]", "--model.doses=[]"]
            scored = ["--model.scorers=[small,profanity_check:predict_prob]", "--model.dtype=bfloat16"]
            version = "_".join(["report", f"{budget:g}", *options.selections])
            folder = sparc3("sweep", version, *measured, *draws, *ranks, *files, *scored)
            found[f"{budget:g}"] = table(Results.load(folder / "results.json"), budget)
    options.json = json_file
    write(options, found)


def table(results: Results, budget: float) -> list[dict[str, Any]]:
    """Print a row for each selection, and return the measures."""
    baseline = results.baseline
    measures, perplexity = baseline.groups[results.headline], next(iter(baseline.perplexity.values()))
    judges = [results.headline_judge, *results.other_judges]
    print(f"\nBudget {100 * budget:g} %, {measures.num_prompts} prompts; mean toxicity before ", end="")
    print(f"{measures.behavior_mean:.4f}, perplexity {perplexity.value:.2f}\n")
    named = " | ".join(f"mean toxicity by {judge}, %" for judge in judges)
    print(f"| selection | neurons | perplexity, WikiText-2 | {named} | of {judges[0]} by seed |")
    print(f"|---|---|---|{'---|' * len(judges)}---|")
    for dose in results.doses:
        price, *toxicity = (
            f"{of.value:+.1f} ({of.low:+.1f} to {of.high:+.1f})"
            for of in (dose.perplexity_percent, *(dose.effects[judge].percent for judge in judges))
        )
        seeds = [
            100 * (after / b - 1) for after, b in zip(dose.behavior_by_seed, baseline.behavior_by_seed, strict=True)
        ]
        spread = f"{min(seeds):+.1f} to {max(seeds):+.1f}"
        print(f"| {dose.selection} | {dose.num_neurons} | {price} | {' | '.join(toxicity)} | {spread} |")
    return [asdict(dose) for dose in results.doses]


if __name__ == "__main__":
    main()
