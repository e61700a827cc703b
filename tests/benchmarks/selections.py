"""Selections of neurons at the same price: `python tests/benchmarks/selections.py [--folder F] [--json FILE]`.

SmolLM2-135M, RealToxicityPrompts and C4 in three disjoint parts: 150 toxic prompts and 64 documents to attribute on,
100 prompts for choices made by hand, and of the other 247 prompts those to report. Each selection gets as many neurons
as raise perplexity on 24 further documents by no more than the budget; then one `sparc3 sweep` measures all of them at
all budgets, from one baseline, WikiText-2's perplexity beside them, by the judge that chose and by others, and with the
continuations drawn by several seeds; its doses.png has a line a selection. Every stage is a verb of `sparc3` in the
folder given, and one that is done there is not run again. Needs rtp/toxic.jsonl, c4/en.jsonl and
wikitext2/wiki.test.raw, by default in shared/data beside the checkout.
"""

import hashlib
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import (
    DATA,
    JUDGES,
    SELECTIONS,
    attribute,
    data_files,
    evaluation,
    head,
    line,
    parse,
    percent,
    prune,
    smollm2,
    sparc3,
    write,
)

from sparc3_lightning.evaluation.results import Dose, Results
from sparc3_lightning.models.components import in_words
from sparc3_lightning.selection.neuron_list import NeuronList


def main() -> None:
    """Measure, and print a table a budget."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("selections")},
        data={"type": Path, "default": DATA},
        budgets={"type": float, "nargs": "+", "default": [0.005, 0.01, 0.02, 0.05]},
        selections={"nargs": "+", "choices": list(SELECTIONS), "default": list(SELECTIONS)},
        judges={"nargs": "*", "default": JUDGES[1:], "help": f"beside {JUDGES[0]}, which chooses"},
        prompts={"type": int, "default": 150},
        continuations={"type": int, "default": 25},
        seeds={"type": int, "default": 5},
        processes={"type": int, "default": 2},
    )
    files = data_files(options.data)
    options.folder.mkdir(exist_ok=True)
    json_file = options.json and options.json.resolve()
    with chdir(options.folder):
        model = smollm2(files)
        attribute(model, options.selections)
        lists = [
            (name, budget, prune(model, name, budget)) for name in options.selections for budget in options.budgets
        ]
        named = ",".join(name for name, *_ in lists)
        named_files = ",".join(str(file) for *_, file in lists)
        judges = [JUDGES[0], *options.judges]
        measured = evaluation(model, "report", options.prompts, 16384, judges)
        draws = [
            f"--model.sampling.num_continuations={options.continuations}",
            f"--model.sampling.num_seeds={options.seeds}",
        ]
        ranks = ["--trainer.strategy=ddp", f"--trainer.devices={options.processes}"] if options.processes > 1 else []
        chosen = [f"--model.names=[{named}]", f"--model.neurons=[{named_files}]", "--model.doses=[]"]
        asked = [*measured, *draws, *chosen, "--model.dtype=bfloat16"]
        version = f"report-{hashlib.sha256(repr(asked).encode()).hexdigest()[:8]}"
        folder = sparc3("sweep", version, *asked, *ranks)
        results = Results.load(folder / "results.json")
        of_budget: dict[float, list[tuple[Dose, NeuronList]]] = {budget: [] for budget in options.budgets}
        for dose, (_, budget, file) in zip(results.doses, lists, strict=True):
            of_budget[budget].append((dose, NeuronList.load(file)))
        found = {f"{budget:g}": table(results, budget, of) for budget, of in of_budget.items()}
    options.json = json_file
    write(options, found)


def table(results: Results, budget: float, lists: Sequence[tuple[Dose, NeuronList]]) -> list[dict[str, Any]]:
    """Print a row for each list of a budget, and return the measures."""
    baseline = results.baseline
    measures, perplexity = baseline.groups[results.headline], next(iter(baseline.perplexity.values()))
    print(f"\nBudget {100 * budget:g} %, {measures.num_prompts} prompts; mean toxicity before ", end="")
    print(f"{measures.behavior_mean:.4f}, perplexity {perplexity.value:.2f}\n")
    judges = [f"mean toxicity, {name}, %" for name in results.judges]
    prices = ["perplexity, budget's text, %", "WikiText-2, %"]
    head("selection", "switched off", *prices, *judges, f"by seed, {results.headline_judge}, %")
    for dose, listed in lists:
        seeds = [
            100 * (after / b - 1) for after, b in zip(dose.behavior_by_seed, baseline.behavior_by_seed, strict=True)
        ]
        judged = (percent(effect and effect.percent) for effect in dose.effects.values())
        spread = f"{min(seeds):+.1f} to {max(seeds):+.1f}"
        use = listed.provenance["budget"]
        predicted = use.get("predicted")
        paid = f"{100 * use['rise']:+.2f}" + ("" if predicted is None else f" ({100 * predicted:+.2f} predicted)")
        line(dose.selection, in_words(dose.kinds), paid, percent(dose.perplexity_percent), *judged, spread)
    return [{**asdict(dose), "budget": listed.provenance["budget"]} for dose, listed in lists]


if __name__ == "__main__":
    main()
