"""How far static gains go: `python tests/benchmarks/upper_bound.py [--folder F] [--json FILE]`. **This trains.**

No part of `sparc3` does: this is an upper bound, to know what selections without training leave. Every neuron and every
attention channel of SmolLM2-135M-Instruct gets a gain in [0, 1], at first 0 where `benefit_per_cost` switches off what
1 % of perplexity pays for, and 1 elsewhere. Adam fits them on T + lambda KL, from the largest lambda to the smallest,
each from where the one before ended: T is the probability of the lexicon's tokens over the model's own continuations of
the part `attribute`, as the target `lexicon_probability` has it, in units of its value before; KL is the divergence
from the original, in nats a token, on the documents of C4 that costs are attributed on. Then one `sparc3 sweep` on the
part `choose` measures the gains and that list beside them; the part `report` is not used. The stages are those of
selections.py, in the folder given, and one that is done there is not run again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import (
    ATTRIBUTE,
    CHOOSE,
    DATA,
    JUDGES,
    Subject,
    attribute,
    data_files,
    documents,
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.attribution.lexicon import Lexicon
from sparc3_lightning.attribution.targets import lexicon_of, lexicon_probability
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.evaluation.completions import load_completions
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.architectures import find_layers, head_layers, neuron_layers
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, counts_of, in_words
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.scorers.registry import load_scorer
from sparc3_lightning.selection.budget import PerplexityRise
from sparc3_lightning.selection.neuron_list import NeuronList

BESIDE = "benefit_per_cost_channels"
LEAST = 0.01  # of a damping: a gain closer to 1 is taken for 1
LARGE = 1e-3  # a gradient by which a gain moves in earnest: of a smaller one, which is mostly noise, Adam makes less


class Gains:
    """A gain of each neuron and each channel of a model, 1 at first.

    Args:
        model: Causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        neurons, channels = (list(find_layers(model, of(model))) for of in (neuron_layers, head_layers))
        self.layers = columns_of(model, neurons) | find_layers(model, channels)
        self.kinds = dict.fromkeys(neurons, "neuron") | dict.fromkeys(channels, "channel")
        self.values = {name: nn.Parameter(torch.ones(layer.in_features)) for name, layer in self.layers.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Multiply activations by their gains for the length of a ``with`` block."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                gain = self.values[name]
                handle = layer.register_forward_pre_hook(lambda _, inputs, gain=gain: (inputs[0] * gain.to(inputs[0]),))
                stack.callback(handle.remove)
            yield

    def take(self, components: Sequence[Component]) -> None:
        """Set the gains of components to what they leave of an activation."""
        with torch.no_grad():
            for component in components:
                self.values[component.module][component.index] = 1 - component.damping

    def components(self) -> list[Component]:
        """Return what is damped, first what is damped most."""
        found = [
            Component(name, i, gain - 1, damping=1 - gain, granularity=self.kinds[name])  # type: ignore[arg-type]
            for name, values in self.values.items()
            for i, gain in enumerate(values.tolist())
            if 1 - gain >= LEAST
        ]
        return sorted(found, key=lambda component: component.score)


def fit(
    model: PreTrainedModel,
    gains: Gains,
    texts: Sequence[Sample],
    documents: Tensor,
    lexicon: Lexicon,
    weight: float,
    *,
    steps: int = 60,
    rate: float = 0.01,
    batch: tuple[int, int] = (8, 1),
    before: float = 1.0,
    seed: int = 0,
) -> tuple[float, float]:
    """Fit the gains in place on T / ``before`` + ``weight`` KL by Adam, whose rate falls to a tenth.

    Args:
        model: Causal language model whose weights are frozen.
        gains: To be fitted; after each step they are clamped to [0, 1].
        texts: Continuations with the prompts before them, for T.
        documents: For KL, shape ``[documents, tokens]``.
        lexicon: Whose tokens are to be less likely.
        weight: Of KL, lambda.
        steps: Of Adam.
        rate: Of learning, at first.
        batch: Continuations and documents of a step.
        before: T of the original model.
        seed: Of the draws of batches.

    Returns:
        T / ``before`` and KL, averaged over the last quarter of the steps.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(gains.values.values(), lr=rate, betas=(0.9, 0.99), eps=LARGE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    seen = []
    for step in range(steps):
        chosen, read = (
            torch.randint(len(of), (number,), generator=draw).tolist()
            for of, number in zip((texts, documents), batch, strict=True)
        )
        with torch.no_grad():
            original = model(input_ids=documents[read], use_cache=False).logits.float().log_softmax(dim=-1)
        with gains.applied():
            t = mean_probability(model, [texts[i] for i in chosen], lexicon) / before
            edited = model(input_ids=documents[read], use_cache=False).logits.float().log_softmax(dim=-1)
        kl = (original.exp() * (original - edited)).sum(dim=-1).mean()
        optimizer.zero_grad()
        (t + weight * kl).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for gain in gains.values.values():
                gain.clamp_(0, 1)
        seen.append((t.item(), kl.item()))
        if step % 10 == 9:
            said = f"lambda {weight:g}, step {step + 1}: T {100 * seen[-1][0]:.0f} %, KL {seen[-1][1]:.4f}"
            print(said, file=sys.stderr, flush=True)
    last = torch.tensor(seen[-max(1, steps // 4) :]).mean(dim=0).tolist()
    return last[0], last[1]


def mean_probability(model: PreTrainedModel, texts: Sequence[Sample], lexicon: Lexicon) -> Tensor:
    """Return the target ``lexicon_probability``, averaged over texts."""
    batch = pad_right(list(texts))
    return lexicon_probability(model, batch["input_ids"], batch["attention_mask"], batch["start"], lexicon).mean()


def main() -> None:
    """Fit, measure, and print a table."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("selections")},
        data={"type": Path, "default": DATA},
        lambdas={"type": float, "nargs": "+", "default": [30.0, 10.0]},
        steps={"type": int, "default": 60, "help": "of Adam, for each lambda"},
        rate={"type": float, "default": 0.01, "help": "of learning: by 0.1 the gains drift apart with noise"},
        dtype={"default": "bfloat16"},
        prompts={"type": int, "default": CHOOSE},
        continuations={"type": int, "default": 5},
        tokens={"type": int, "default": 16384, "help": "of WikiText-2"},
    )
    data = data_files(options.data)
    options.folder.mkdir(exist_ok=True)
    json_file = options.json and options.json.resolve()
    with chdir(options.folder):
        subject = smollm2(data)
        attribute(subject, [BESIDE])
        beside = prune(subject, BESIDE, 0.01)
        fitted = fit_all(subject, beside, options)
        files = [beside, *(Path(row["file"]) for row in fitted[1:])]
        names = ",".join([BESIDE, *["gains"] * len(options.lambdas)])
        chosen = [f"--model.names=[{names}]", f"--model.neurons=[{','.join(map(str, files))}]", "--model.doses=[]"]
        measured = evaluation(subject, "choose", options.prompts, options.tokens)
        measured = [*measured, f"--model.sampling.num_continuations={options.continuations}", "--model.dtype=bfloat16"]
        folder = sparc3("sweep", f"bound_{version_of(options)}", *measured, *chosen)
        results = Results.load(folder / "results.json")
    options.json = json_file
    table(results, fitted)
    doses = [{**row, **asdict(dose)} for row, dose in zip(fitted, results.doses, strict=True)]
    write(options, doses)


def version_of(options: argparse.Namespace) -> str:
    """Return what tells a fit from others."""
    return "_".join(f"{value:g}" for value in (*options.lambdas, options.steps, options.rate))


def fit_all(subject: Subject, beside: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit the gains for each lambda, and save each as a list.

    Returns:
        A row for the list beside them, and one for each lambda, with the rise of perplexity on the budget's text.
    """
    checkpoint = Checkpoint(subject.checkpoint)
    model = checkpoint.load(getattr(torch, options.dtype)).eval().requires_grad_(False)
    tokenizer = checkpoint.tokenizer()
    lexicon = Lexicon.of_tokens(lexicon_of(tokenizer, load_scorer(JUDGES[0]).score))
    completions = load_completions(Path("lightning_logs/evaluate/cont/completions.jsonl"))
    texts = [
        Sample(row["prompt_id"], [*row["prompt_token_ids"], *row["token_ids"]], start=len(row["prompt_token_ids"]))
        for row in completions
        if row["token_ids"]
    ]
    general = documents(subject, subject.num_attributed).samples
    known = {tuple(sample.input_ids) for sample in general}
    of_budget = [s for s in documents(subject, subject.num_priced, 7).samples if tuple(s.input_ids) not in known]
    rise = PerplexityRise(model, [pad_right(of_budget[i : i + 4]) for i in range(0, len(of_budget), 4)])
    listed = NeuronList.load(beside)
    found: list[dict[str, Any]] = [{"edit": BESIDE, "file": str(beside), "rise": rise(listed.neurons)}]
    with torch.no_grad():
        parts = [texts[i : i + 20] for i in range(0, len(texts), 20)]
        before = sum(len(part) * mean_probability(model, part, lexicon).item() for part in parts) / len(texts)
    print(
        f"T before {before:.5f}, {len(texts)} continuations, {len(lexicon.tokens)} tokens", file=sys.stderr, flush=True
    )
    gains = Gains(model)
    gains.take(listed.neurons)
    stacked = torch.tensor([list(sample.input_ids) for sample in general])
    for weight in sorted(options.lambdas, reverse=True):
        t, kl = fit(
            model, gains, texts, stacked, lexicon, weight, steps=options.steps, rate=options.rate, before=before
        )
        damped = gains.components()
        provenance = {**listed.provenance, "criterion": f"gains, lambda {weight:g}", "budget": None}
        file = Path(f"gains_{weight:g}_{version_of(options)}.json")
        NeuronList(damped, provenance).save(file)
        found.append({"edit": f"gains, lambda {weight:g}", "file": str(file), "rise": rise(damped), "t": t, "kl": kl})
        off = counts_of([component for component in damped if component.damping > 0.9])
        found[-1]["off"] = in_words(off) if off else "none"
    return found


def table(results: Results, fitted: Sequence[dict[str, Any]]) -> None:
    """Print a row for each edit."""
    measures = results.baseline.groups[results.headline]
    print(f"\n{measures.num_prompts} prompts of the part to choose on, {ATTRIBUTE} to fit on; ", end="")
    print(f"mean toxicity before {measures.behavior_mean:.4f}\n")
    judges = [f"mean toxicity, {name}, %" for name in results.judges]
    head("edit", "damped", "by over 90 %", "T, %", "KL", "perplexity, budget's text, %", "WikiText-2, %", *judges)
    for row, dose in zip(fitted, results.doses, strict=True):
        in_fit = ["", ""] if "t" not in row else [f"{100 * (row['t'] - 1):+.0f}", f"{row['kl']:.4f}"]
        judged = (percent(effect and effect.percent) for effect in dose.effects.values())
        rises = [f"{100 * row['rise']:+.2f}", percent(dose.perplexity_percent)]
        line(row["edit"], in_words(dose.kinds), row.get("off", "all"), *in_fit, *rises, *judged)


if __name__ == "__main__":
    main()
