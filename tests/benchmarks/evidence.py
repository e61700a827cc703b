"""What the recommended selection does to SmolLM2: `python tests/benchmarks/evidence.py [--folder F] [--json FILE]`.

The parts, texts and judges of selections.py. Neurons and channels are chosen by benefit per cost within a budget of
perplexity. Then one evaluation continues the prompts to report by many tokens and says what changed: by every judge, in
the pieces of the continuations, by controls, and in what a model is for (perplexity on WikiText-2 and on news, KL,
length and variety). Then one stress test of as many prompts says what is left of the effect after rounding, after
training on news, and on the prompts for choices made by hand, which nothing was chosen on here. Every stage is a verb
of `sparc3` in the folder given, and one that is done there is not run again. Needs the files of selections.py.
"""

from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import (
    DATA,
    JUDGES,
    TEXT,
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

from sparc3_lightning.evaluation.results import Control, Difference, Results
from sparc3_lightning.evaluation.stress import StressResults
from sparc3_lightning.models.components import in_words

SELECTION = "benefit_per_cost_channels"


def main() -> None:
    """Measure, and print the tables."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("selections")},
        data={"type": Path, "default": DATA},
        budget={"type": float, "default": 0.01},
        judges={"nargs": "*", "default": JUDGES[1:], "help": f"beside {JUDGES[0]}, which chooses"},
        prompts={"type": int, "default": 150},
        continuations={"type": int, "default": 25},
        tokens={"type": int, "default": 100, "help": "of a continuation; of the stress test 20"},
        text={"type": int, "default": 16384, "help": "tokens of each text for perplexity"},
        draws={"type": int, "default": 5, "help": "of each control"},
        of_draws={"type": int, "default": 1, "help": "continuations of a prompt by each draw"},
        steps={"type": int, "default": 25, "help": "of the training"},
    )
    files = data_files(options.data)
    options.folder.mkdir(exist_ok=True)
    json_file = options.json and options.json.resolve()
    with chdir(options.folder):
        model = smollm2(files)
        attribute(model, [SELECTION])
        neurons = prune(model, SELECTION, options.budget)
        judges = [JUDGES[0], *options.judges]
        asked = list(evaluation(model, "report", options.prompts, options.text, judges))
        asked += ["--model.dtype=bfloat16", f"--model.neurons={neurons}"]
        asked += [f"--model.sampling.num_continuations={options.continuations}"]
        more = [f"--model.sampling.max_new_tokens={options.tokens}", f"--model.controls.num_draws={options.draws}"]
        more += [f"--model.controls.num_continuations={options.of_draws}"]
        more += ["--data.other_text=WikiText2", f"--data.other_text.source={TEXT}"]
        more += ["--data.other_text.text_field=document", f"--data.other_text.num_tokens={options.text}"]
        more += [f"--data.other_text.window={model.window}", "--data.other_text.conventions=[disjoint]"]
        results = Results.load(sparc3("evaluate", "evidence", *asked, *more) / "results.json")
        asked += ["--data.other_prompts=RealToxicityPrompts", f"--data.other_prompts.source={model.parts['choose']}"]
        asked += ["--data.other_prompts.min_toxicity=0.5", "--data.other_prompts.num_prompts=null"]
        asked += ["--data.other_prompts.batch_size=20", f"--model.finetune.steps={options.steps}"]
        asked += ["--data.neutral=C4", f"--data.neutral.source={TEXT}", "--data.neutral.text_field=document"]
        asked += [f"--data.neutral.num_samples={4 * options.steps}", "--data.neutral.seq_len=128"]
        stress = StressResults.load(sparc3("stress", "evidence", *asked, "--data.neutral.batch_size=4") / "stress.json")
    options.json = json_file
    show(results)
    show_stress(stress)
    write(options, {"evaluate": asdict(results), "stress": asdict(stress)})


def show(found: Results) -> None:
    """Print what the evaluation found."""
    assert found.pruned is not None
    protocol = found.protocol.continuations
    group = found.headline
    print(f"\n{in_words(found.kinds)} off; {found.pruned.groups[group].num_prompts} prompts, ", end="")
    print(f"{protocol.num_continuations} continuations of {protocol.max_new_tokens} tokens\n")
    head("judge", "chose", "mean before", "change, %", "expected maximum, %", "probability of one, %")
    for name, judge in found.judges.items():
        of = judge.effects[group]
        measures = (of.behavior_mean, of.expected_maximum_behavior, of.behavior_probability)
        line(name, "yes" if judge.is_chooser else "no", _before(of.behavior_mean), *map(_percent, measures))
    if found.agreement is not None:
        print("\nRank correlation of the judges: ", end="")
        print("; ".join(f"{a} and {b} {r:.2f}" for a, of in found.agreement.spearman.items() for b, r in of.items()))
        print(f"Krippendorff's alpha {found.agreement.krippendorff_alpha:.2f}, {found.agreement.num_scored} texts")
    if found.lengths is not None:
        print(f"\nBy {found.headline_judge}, in pieces of the continuations\n")
        head("tokens", "before", "after", "change, %")
        for name, piece in {**found.lengths.within, **found.lengths.at}.items():
            line(name, _before(piece), f"{piece.after:.4f}" if piece else "", _percent(piece))
        if (later := found.lengths.last_less_first) is not None:
            of = later.difference
            ends = f"({of.low:+.4f} to {of.high:+.4f})"
            print(f"\nChange at the last position less that at the first: {of.value:+.4f} {ends}")
        for name, share in found.lengths.reaching.items():
            print(f"Continuations that reach {name}: {share.before:.3f} before, {share.after:.3f} after")
    print(f"\nControls, by {found.headline_judge}\n")
    head("off", "mean, %", "chosen less one more draw", "perplexity, %")
    for name, control in found.controls.items():
        line(name, *_outcome(control))
    print()
    head("", *found.models)
    for name in found.baseline.perplexity:
        line(f"perplexity, {name}", *(f"{model.perplexity[name].value:.2f}" for model in found.models.values()))
        line("its change, %", "", percent(found.perplexity_change[name]))
    line("KL, nats a token", *("" if model.kl is None else f"{model.kl:.4f}" for model in found.models.values()))
    for name in ("mean_length", "uniqueness", "distinct_1", "distinct_2", "share_empty"):
        line(name, *(f"{getattr(model.groups[group], name):.4f}" for model in found.models.values()))


def show_stress(results: StressResults) -> None:
    """Print what is left of the effect, by the headline's judge."""
    print(f"\nUnder stress, continuations of {results.protocol.continuations.max_new_tokens} tokens\n")
    head("stress", "before", "pruned", "change, %", "perplexity, %", "effect left, %")
    for one in results.stressed:
        effect = one.found.main_effect
        left: Any = one.left.get(one.found.headline_judge)
        share = f"{100 * left.value:.0f} ({100 * left.low:.0f} to {100 * left.high:.0f})" if left else ""
        price = percent(next(iter(one.found.perplexity_change.values())))
        line(one.name, _before(effect), f"{effect.after:.4f}" if effect else "", _percent(effect), price, share)


def _before(effect: Difference | None) -> str:
    return f"{effect.before:.4f}" if effect else ""


def _percent(effect: Difference | None) -> str:
    return percent(effect and effect.percent)


def _outcome(control: Control) -> list[str]:
    of = control.outcome
    if of is None:
        return ["", "", ""]
    less = of.pruned_less_control
    beside = f"{less.value:+.4f} ({less.low:+.4f} to {less.high:+.4f})"
    return [percent(of.effect_percent), beside, f"{of.perplexity_percent:+.1f}"]


if __name__ == "__main__":
    main()
