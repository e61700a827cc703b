"""Other costs and benefits than those of `benefit_per_cost`: `python tests/benchmarks/interactions.py [--json FILE]`.

SmolLM2-135M, neurons and attention channels in one ranking, the parts of the prompts and the texts of selections.py.
One pass over documents and one over the model's own continuations give the derivatives by every gain. From them follow
costs of pairs, costs and benefits towards the mean, and the benefit from fewer prompts, less that on harmless
continuations, or by the judge's own gradient. The first table is what costs and costs of pairs predict of lists,
against the divergence measured on the budget's text. The second is how much benefit a greedy choice by marginal costs
finds, charged by documents that it did not see, the third that of fewer prompts, on other ones. The last is what each
choice does within a budget, on the prompts for choices made by hand.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import (
    BANDS,
    DATA,
    JUDGES,
    OWN_HARMLESS,
    Subject,
    attribute,
    data_files,
    documents,
    evaluation,
    head,
    line,
    parse,
    percent,
    smollm2,
    sparc3,
    write,
)
from torch import Tensor
from transformers import PreTrainedModel

from sparc3_lightning.attribution.lexicon import Lexicon
from sparc3_lightning.attribution.targets import lexicon_of, lexicon_probability, sampled_log_probability
from sparc3_lightning.data.base import ReferenceSamples
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.evaluation.completions import load_completions
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.architectures import find_layers, head_layers, neuron_layers
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, in_words, mask
from sparc3_lightning.models.likelihood import Reference, last_hidden_state, score_windows
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.models.noise import draw_key
from sparc3_lightning.scorers.registry import load_scorer
from sparc3_lightning.selection.budget import Budget, PerplexityRise, choose_within
from sparc3_lightning.selection.criteria import floor_of
from sparc3_lightning.selection.neuron_list import NeuronList

CHUNK = 64
LEAST = 0.1  # of a component's own cost, below which no marginal cost falls
CANDIDATES = 1000  # whose costs of pairs are formed


def main() -> None:
    """Measure, and print the tables."""
    options = parse(
        __doc__,
        folder={"type": Path, "default": Path("selections")},
        data={"type": Path, "default": DATA},
        budget={"type": float, "default": 0.01},
        documents={"type": int, "default": 64, "help": "to attribute on"},
        shares={
            "type": float,
            "nargs": "+",
            "default": [0.1, 0.2, 0.4, 1.0],
            "help": "of the costs of pairs that count",
        },
        prompts={"type": int, "default": 100},
        continuations={"type": int, "default": 5},
    )
    files = data_files(options.data)
    options.folder.mkdir(exist_ok=True)
    options.json = options.json and options.json.resolve()
    with chdir(options.folder):
        subject = smollm2(files, num_attributed=options.documents)
        attribute(subject, [])  # the continuations alone
        write(options, measured(subject, options))


def measured(subject: Subject, options: Any) -> dict[str, Any]:
    """Print the tables, and return their figures."""
    checkpoint = Checkpoint(subject.checkpoint)
    model = checkpoint.load(torch.float32).eval().requires_grad_(False)
    components, layers = components_of(model)
    general = documents(subject, subject.num_attributed)
    cost = derivatives(model, layers, general.predict_dataloader(), sampled(), CHUNK)
    file = Path("lightning_logs/evaluate/cont/completions.jsonl")
    own = [row for row in load_completions(file) if row["continuation"]]
    continued = ToxicPrompts(
        str(file),
        by="continuation",
        continuation_toxicity=(0, 1),
        min_toxicity=0.5,
        num_samples=len(own),
        batch_size=16,
    )
    continued.model_checkpoint = checkpoint
    continued.setup("predict")
    gain = derivatives(model, layers, continued.predict_dataloader(), lexical(continued))
    harmless = {
        f"{row['prompt_id']}/{row['continuation_index']}"
        for row in own
        if BANDS[OWN_HARMLESS][0] <= (row["scores"][JUDGES[0]] or 0) <= BANDS[OWN_HARMLESS][1]
    }
    is_harmless = torch.tensor([name in harmless for name in gain.names])
    prompts = list(dict.fromkeys(name.rpartition("/")[0] for name in sorted(gain.names)))
    benefit, costs = gain.off.mean(dim=0), squares(cost.off)
    floor = floor_of(CHUNK * len(cost.off)) * costs.mean()
    order = ranking(benefit, costs + floor)
    first = order[:CANDIDATES]
    pairs = information(cost.off[:, first])
    text = documents(subject, subject.num_priced, 7)
    text.leave_out = {sample.id for sample in general.samples}
    batches = list(text.predict_dataloader())
    found: dict[str, Any] = {
        "predicted": predictions(model, batches, [components[i] for i in first], pairs, floor),
        "held out": held_out(benefit[first], cost.off[:, first], subject.seq_len // CHUNK, floor, options),
        "prompts": by_prompts(gain, costs + floor, options.budget),
    }
    orders = {"benefit per cost": [components[i] for i in first]}
    for share in options.shares:
        chosen = greedy(benefit[first], pairs, floor, share, len(first) // 2)
        orders[f"greedy, {share:g} of pairs"] = [components[first[i]] for i in chosen]
    for number in (len(prompts) // 3, 2 * len(prompts) // 3):
        some = torch.tensor([name.rpartition("/")[0] in prompts[:number] for name in gain.names])
        found_by = ranking(gain.off[some].mean(dim=0), costs + floor)[:CANDIDATES]
        orders[f"{number} prompts"] = [components[i] for i in found_by]
    contrast = ranking(benefit - gain.off[is_harmless].mean(dim=0), costs + floor)[:CANDIDATES]
    orders["less harmless"] = [components[i] for i in contrast]
    by_judge = derivatives(model, layers, continued.predict_dataloader(), judged(continued)).off.mean(dim=0)
    orders["judge's gradient"] = [components[i] for i in ranking(by_judge, costs + floor)[:CANDIDATES]]
    orders["off or at the mean"] = at_mean(components, cost, gain, floor)
    rise, lists = PerplexityRise(model, batches), {}
    for name, ranked in orders.items():
        lists[name] = choose_within(rise, ranked, Budget(options.budget))
    return found | {"chosen": compare(subject, checkpoint, lists, options)}


def components_of(model: PreTrainedModel) -> tuple[list[Component], list[torch.nn.Module]]:
    """Return all neurons and channels, and the layers whose inputs, one after the other, are their activations."""
    neurons = columns_of(model, find_layers(model, neuron_layers(model)))
    channels = find_layers(model, head_layers(model))
    components = [Component(name, i, 0.0) for name, layer in neurons.items() for i in range(layer.in_features)]
    components += [
        Component(name, i, 0.0, granularity="channel")
        for name, layer in channels.items()
        for i in range(layer.in_features)
    ]
    return components, [*neurons.values(), *channels.values()]


def sampled() -> Callable[[PreTrainedModel, Any, Tensor | None], Tensor]:
    """Return the target of costs, with the draws of ``sparc3 attribute``."""

    def target(model: PreTrainedModel, batch: Any, mask_BT: Tensor | None) -> Tensor:
        keys = torch.tensor([draw_key(0, name) for name in batch["sample_ids"]])
        return sampled_log_probability(model, batch["input_ids"], mask_BT, keys)

    return target


def lexical(data: ReferenceSamples) -> Callable[[PreTrainedModel, Any, Tensor | None], Tensor]:
    """Return the target of benefits, with the words that the judge who chooses finds toxic."""
    lexicon = Lexicon.of_tokens(lexicon_of(data.load_tokenizer(), load_scorer(JUDGES[0]).score))
    return lambda model, batch, mask_BT: lexicon_probability(
        model, batch["input_ids"], mask_BT, batch["start"], lexicon
    )


def judged(data: ReferenceSamples) -> Callable[[PreTrainedModel, Any, Tensor | None], Tensor]:
    """Return the target of benefits without a list of words: the judge's score, through soft tokens.

    The judge reads each token of a continuation as the mean of the word pieces of its text. The value is that of the
    continuation as it is. The derivative is that of the mean over the vocabulary, by the model's probabilities, in the
    place of each token (straight-through, Bengio et al. 2013).
    """
    judge = load_scorer(JUDGES[0]).detoxify  # type: ignore[attr-defined]
    pieces_PD = judge.model.requires_grad_(False).get_input_embeddings().weight
    tokenizer = data.load_tokenizer()
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    pieces = judge.tokenizer(texts, add_special_tokens=False)["input_ids"]
    E_VD = torch.stack([pieces_PD[of or [judge.tokenizer.unk_token_id]].mean(dim=0) for of in pieces])
    first, last = (pieces_PD[[token]] for token in (judge.tokenizer.cls_token_id, judge.tokenizer.sep_token_id))

    def target(model: PreTrainedModel, batch: Any, mask_BT: Tensor | None) -> Tensor:
        ids = batch["input_ids"]
        P_BTV = model(input_ids=ids, attention_mask=mask_BT, use_cache=False).logits.softmax(dim=-1)
        scores = []
        for row, start in enumerate(batch["start"].tolist()):
            end = ids.shape[1] if mask_BT is None else int(mask_BT[row].sum())
            soft_TD = P_BTV[row, start - 1 : end - 1] @ E_VD
            read_TD = torch.cat([first, E_VD[ids[row, start:end]] + soft_TD - soft_TD.detach(), last])
            scores.append(judge.model(inputs_embeds=read_TD[None])[0].sigmoid().squeeze())
        return torch.stack(scores)

    return target


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of a target by the gain of each component, on each chunk of each sample.

    Args:
        off: Towards 0: the sum of activation x gradient, shape ``[chunks, components]``.
        constant: By a constant in the place of the activation: the sum of gradients, of the same shape.
        mean: Mean activation over all tokens, padding too, shape ``[components]``.
        names: Of the samples.
    """

    off: Tensor
    constant: Tensor
    mean: Tensor
    names: list[str]

    def towards(self, mean: Tensor) -> Tensor:
        """Return the derivatives by a gain towards a mean, (activation - mean) x gradient."""
        return self.off - mean * self.constant


def derivatives(
    model: PreTrainedModel,
    layers: Sequence[torch.nn.Module],
    batches: Iterable[Any],
    target: Callable[[PreTrainedModel, Any, Tensor | None], Tensor],
    chunk: int | None = None,
) -> Derivatives:
    """Return the derivatives by the gain of each input of some layers.

    Args:
        model: Whose weights are frozen.
        layers: Whose inputs are components, in order.
        batches: Of samples.
        target: Returns that of each sample.
        chunk: Tokens of a chunk, which must divide those of every sample; None for whole samples.
    """
    ends = torch.tensor([0, *(layer.in_features for layer in layers)]).cumsum(0).tolist()
    offs, constants, names = [], [], []
    total, number = torch.zeros(ends[-1], dtype=torch.float64), 0
    for batch in batches:
        of, size = batch["input_ids"].shape
        sums = torch.zeros(2, of * (size // chunk if chunk else 1), ends[-1])

        def hook(part: slice, sums: Tensor = sums, size: int = size) -> Callable[..., tuple[Tensor]]:
            def record(module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
                A_BTI = inputs[0].view_as(inputs[0]).requires_grad_()
                values = A_BTI.detach()
                total[part] += values.sum(dim=(0, 1))

                def take(G_BTI: Tensor) -> None:
                    for i, rows in enumerate((values * G_BTI, G_BTI)):
                        sums[i, :, part] = rows.unflatten(1, (-1, chunk or size)).sum(dim=2).flatten(0, 1)

                A_BTI.register_hook(take)
                return (A_BTI,)

            return record

        parts = [slice(start, end) for start, end in pairwise(ends)]
        handles = [layer.register_forward_pre_hook(hook(part)) for layer, part in zip(layers, parts, strict=True)]
        target(model, batch, batch["attention_mask"] if batch["is_padded"] else None).sum().backward()
        for handle in handles:
            handle.remove()
        offs.append(sums[0])
        constants.append(sums[1])
        names += batch["sample_ids"]
        number += of * size
    return Derivatives(torch.cat(offs), torch.cat(constants), (total / number).float(), names)


def squares(V_CK: Tensor) -> Tensor:
    """Return the cost of each component, as ``sparc3 attribute`` does, shape ``[components]``, float64."""
    return V_CK.double().square().sum(dim=0) / (CHUNK * len(V_CK))


def information(V_CK: Tensor) -> Tensor:
    """Return the Fisher information of all pairs of gains, nats squared a token, shape ``[components, components]``."""
    return V_CK.double().T @ V_CK.double() / (CHUNK * len(V_CK))


def ranking(benefit: Tensor, costs: Tensor) -> list[int]:
    """Return the components that the behaviour gains from, by benefit over cost with its floor, the best first."""
    worth = benefit.double() / costs
    return [i for i in worth.argsort(descending=True).tolist() if benefit[i] > 0]


def at_mean(components: Sequence[Component], cost: Derivatives, gain: Derivatives, floor: Tensor) -> list[Component]:
    """Return neurons and channels by benefit over cost, each neuron off or at its mean, whichever is better."""
    worth = []
    for derived in (cost.off, gain.off), (cost.towards(cost.mean), gain.towards(cost.mean)):
        costs, benefit = squares(derived[0]), derived[1].mean(dim=0).double()
        worth.append(benefit / (costs + floor))
    is_neuron = torch.tensor([component.granularity == "neuron" for component in components])
    held = is_neuron & (worth[1] > worth[0])
    order = torch.where(held, worth[1], worth[0]).argsort(descending=True)[:CANDIDATES].tolist()
    means = cost.mean.tolist()
    return [replace(components[i], mean=means[i]) if held[i] else components[i] for i in order]


def greedy(benefit: Tensor, C_KK: Tensor, floor: Tensor, share: float, number: int) -> list[int]:
    """Choose components one after the other, each time that of the most benefit for what it costs beside the others.

    Args:
        benefit: Of each component, shape ``[components]``.
        C_KK: From ``information``.
        floor: Added to each component's own cost.
        share: Of the costs of pairs that counts: 0 is the ranking by benefit over cost. These costs are noisy where
            there are fewer chunks than components.
        number: How many to choose.
    """
    own = C_KK.diagonal() + floor
    marginal, left, chosen = own.clone(), torch.ones(len(own), dtype=torch.bool), []
    for _ in range(number):
        worth = benefit / torch.maximum(marginal, LEAST * own)
        chosen.append(int(torch.where(left, worth, -math.inf).argmax()))
        left[chosen[-1]] = False
        marginal = marginal + 2 * share * C_KK[chosen[-1]]
    return chosen


def predictions(
    model: PreTrainedModel, text: Sequence[Any], ranked: Sequence[Component], C_KK: Tensor, floor: Tensor
) -> list[dict[str, Any]]:
    """Print what costs predict of lists of components, against the divergence and the rise of the loss on a text."""
    draw = torch.Generator().manual_seed(0)
    subsets = {f"first {n}": torch.arange(n) for n in (35, 70, 140, 280)}
    for i, n in enumerate((50, 50, 150, 150)):
        subsets[f"{n} at random, {i % 2 + 1}"] = torch.randperm(len(ranked), generator=draw)[:n]
    print("\nThousandths of a nat a token\n")
    head("components", "sum of costs", "with the floor", "sum over pairs", "KL measured", "rise of the loss")
    original = []
    for batch in text:
        ids = batch["input_ids"]
        with torch.no_grad():
            hidden = last_hidden_state(model, ids)
            original.append((ids, hidden, score_windows(model, hidden, ids, spans(ids))[0]))
    found = []
    for name, subset in subsets.items():
        own, of_pairs = C_KK.diagonal()[subset], C_KK[subset][:, subset]
        row = [(total / 2).item() for total in (own.sum(), (own + floor).sum(), of_pairs.sum())]
        row += divergence(model, original, [ranked[i] for i in subset])
        line(name, *(f"{1000 * value:.2f}" for value in row))
        found.append({"components": name, "thousandths": row})
    return found


@torch.no_grad()
def divergence(
    model: PreTrainedModel, original: Sequence[tuple[Tensor, Tensor, Tensor]], off: Sequence[Component]
) -> list[float]:
    """Return KL(original || model with components off) and the rise of the loss, nats a token.

    Args:
        model: Causal language model.
        original: Token ids of a batch, the hidden states of the model as it is, and its loss on each document.
        off: Components.
    """
    totals, number = torch.zeros(2, dtype=torch.float64), 0
    with mask(model, off):
        for ids, hidden, before in original:
            reference = Reference(hidden)
            after, kl = score_windows(model, last_hidden_state(model, ids), ids, spans(ids), reference)
            totals += torch.stack([kl.sum(), (after - before).sum()])
            number += ids[:, 1:].numel()
    return (totals / number).tolist()


def spans(ids: Tensor) -> Tensor:
    """Return the spans of every token but the first of each document, see ``score_windows``."""
    return torch.tensor([[1, ids.shape[1]]] * len(ids))


def held_out(benefit: Tensor, V_CK: Tensor, chunks: int, floor: Tensor, options: Any) -> list[dict[str, float]]:
    """Print how much benefit greedy choices by half of the documents find within the budget by the other half."""
    print(f"\nBudget {100 * options.budget:g} %, charged the sum over pairs of the other half\n")
    head("share of pairs", "benefit, of that of share 0, %", "components", "own charge over that, %")
    halves = V_CK.unflatten(0, (-1, chunks))
    C_KK, D_KK = (information(half.flatten(0, 1)) for half in (halves[::2], halves[1::2]))
    found: list[dict[str, float]] = []
    for share in [0.0, *options.shares]:
        both = []
        for own, other in ((C_KK, D_KK), (D_KK, C_KK)):
            order = greedy(benefit.double(), own, floor, share, len(benefit) // 2)
            placed = other[order][:, order]
            # What each one adds: its own cost, and twice those with each of the ones before.
            charge = (2 * placed.tril(-1).sum(dim=1) + placed.diagonal()).cumsum(0) / 2
            beyond = (charge > math.log1p(options.budget)).nonzero()
            taken = order[: int(beyond[0]) if len(beyond) else len(order)]
            both.append(
                (benefit[taken].sum().item(), len(taken), own[taken][:, taken].sum() / other[taken][:, taken].sum())
            )
        gain, number, over = (sum(map(float, of)) / 2 for of in zip(*both, strict=True))
        found.append({"share": share, "benefit": gain, "number": number, "own": over})
        line(f"{share:g}", f"{100 * gain / found[0]['benefit']:.1f}", f"{number:.0f}", f"{100 * over:.0f}")
    return found


def by_prompts(gain: Derivatives, costs: Tensor, budget: float) -> list[dict[str, float]]:
    """Print the benefit, on a third of the prompts, of lists ranked by some others; the mean over eight draws."""
    names = [name.rpartition("/")[0] for name in gain.names]
    prompts = list(dict.fromkeys(names))
    of_prompts = torch.stack(
        [gain.off[[i for i, other in enumerate(names) if other == name]].mean(dim=0) for name in prompts]
    )
    third = len(prompts) // 3
    benefits: dict[int, list[float]] = {}
    for seed in range(8):
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
        there = of_prompts[order[-third:]].mean(dim=0)
        for number in (third // 4, third // 2, third, 2 * third):
            ranked = ranking(of_prompts[order[:number]].mean(dim=0), costs)
            nats = costs[ranked].cumsum(0) / 2
            taken = ranked[: int((nats <= math.log1p(budget)).sum())]
            benefits.setdefault(number, []).append(there[taken].sum().item())
    print(f"\nBenefit on {third} other prompts, within {100 * budget:g} % by the sum of costs\n")
    head("prompts", f"benefit, of that of {2 * third}, %")
    means = {number: sum(of) / len(of) for number, of in benefits.items()}
    for number, mean in means.items():
        line(str(number), f"{100 * mean / means[2 * third]:.0f}")
    return [{"prompts": number, "benefit": mean} for number, mean in means.items()]


def compare(subject: Subject, checkpoint: Checkpoint, lists: dict[str, list[Component]], options: Any) -> list[Any]:
    """Measure lists on the prompts for choices, and print a row for each."""
    origin = {"checkpoint": subject.checkpoint, "checkpoint_fingerprint": checkpoint.fingerprint}
    paths = {name.replace(",", "").replace(" ", "_"): components for name, components in lists.items()}
    for name, components in paths.items():
        NeuronList(components, {**origin, "choosers": {JUDGES[0]: None}}).save(f"{name}.json")
    named = [f"--model.names=[{','.join(paths)}]", f"--model.neurons=[{','.join(f'{name}.json' for name in paths)}]"]
    draws = [f"--model.sampling.num_continuations={options.continuations}", "--model.doses=[]"]
    choose = evaluation(subject, "choose", options.prompts, 8192)
    folder = sparc3(
        "sweep", f"interactions_{options.budget:g}_{options.prompts}", *choose, *draws, *named, "--model.dtype=bfloat16"
    )
    results = Results.load(folder / "results.json")
    print("\nOn the prompts for choices\n")
    head("choice", "switched off", "WikiText-2, %", *(f"mean toxicity, {judge}, %" for judge in results.judges))
    for dose in results.doses:
        judged = (percent(effect and effect.percent) for effect in dose.effects.values())
        line(dose.selection, in_words(dose.kinds), percent(dose.perplexity_percent), *judged)
    return [{"choice": dose.selection, "kinds": dict(dose.kinds)} for dose in results.doses]


if __name__ == "__main__":
    main()
