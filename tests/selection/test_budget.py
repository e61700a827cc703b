"""A budget of perplexity: bisection against a scan, costs against finite differences, and what is refused."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import MODULES, Unshuffled, provenance, random_scores, save_scores, sentence

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.cli import main
from sparc3_lightning.data.base import HubDataset, Sample, pad_right
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.selection.budget import Budget, PerplexityRise, choose_within, largest_within
from sparc3_lightning.selection.neuron_list import NeuronList

LENGTHS = (9, 6, 8, 3)


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s{i}", torch.randint(4, 60, (n,), generator=draw).tolist()) for i, n in enumerate(LENGTHS)]


@pytest.fixture
def rise(model, samples) -> PerplexityRise:
    return PerplexityRise(model, [pad_right(samples[:3], 0), pad_right(samples[3:], 0)])


def ranking(number: int = 20, **edit: float) -> list[Component]:
    return [Component(MODULES[i % 2], i, -1.0 / (1 + i), **edit) for i in range(number)]


def nats_by_hand(model, samples: list[Sample]) -> float:
    """One sample and one token at a time."""
    total = 0.0
    for sample in samples:
        logs = model(torch.tensor([sample.input_ids])).logits[0].log_softmax(dim=-1)
        total -= sum(logs[t, token].item() for t, token in enumerate(sample.input_ids[1:]))
    return total / sum(len(sample.input_ids) - 1 for sample in samples)


@pytest.mark.parametrize("edit", [{}, {"damping": 0.5}, {"mean": 0.3}])
def test_the_rise_is_that_of_perplexity_over_all_tokens_but_the_first_of_each_sample(model, samples, rise, edit):
    neurons = ranking(7, **edit)
    before = nats_by_hand(model, samples)
    with mask(model, neurons):
        after = nats_by_hand(model, samples)
    assert rise.perplexity == pytest.approx(math.exp(before), rel=1e-6)
    assert rise(neurons) == pytest.approx(math.exp(after - before) - 1, rel=1e-4)
    assert rise.num_tokens == sum(LENGTHS) - 4
    assert rise.measured[-1]["num_neurons"] == 7


def test_a_list_that_was_measured_is_not_measured_again_but_one_of_another_strength_is(rise):
    first = rise(ranking(7))
    assert rise(ranking(7)) == first
    assert len(rise.measured) == 1
    assert rise(ranking(7, damping=0.5)) != first
    assert len(rise.measured) == 2


@pytest.mark.parametrize("edit", [{}, {"damping": 0.5, "mean": 0.3}])
def test_costs_are_the_slopes_at_both_ends_by_finite_differences(model, samples, rise, edit):
    neurons = ranking(6, **edit)
    found = rise.costs(neurons)
    step = 1e-2  # the norms of transformers are computed in float32
    for i, neuron in enumerate(neurons):
        slopes = []
        for end in (0.0, 1.0):
            losses = []
            for part in (end + step, end - step):
                dampings = [end] * len(neurons)
                dampings[i] = part
                off = [replace(n, damping=n.damping * s) for n, s in zip(neurons, dampings, strict=True) if s]
                with mask(model, off):
                    losses.append(nats_by_hand(model, samples))
            slopes.append((losses[0] - losses[1]) / (2 * step))
        assert found[i].item() == pytest.approx(sum(slopes) / 2, rel=1e-2, abs=2e-4)
        assert neuron.score < 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("budget", [0.5, 1.0, 3.0, 17.5, 99.5, 1000.0])
@pytest.mark.parametrize("most", [1, 2, 64, 100])
@pytest.mark.parametrize("start", [1, 10, 100])
def test_bisection_finds_what_a_scan_finds_where_the_rise_grows(budget, most, start):
    asked = []

    def rise(number: int) -> float:
        asked.append(number)
        return float(number)

    expected = max([n for n in range(1, most + 1) if n <= budget], default=0)
    assert largest_within(rise, most, budget, start, slack=0) == expected
    assert len(asked) <= 3 + 2 * math.ceil(math.log2(most))
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_few_measurements_are_made_where_the_rise_is_smooth(power):
    asked = []

    def rise(number: int) -> float:
        asked.append(number)
        return 2e-4 * number**power

    found = largest_within(rise, 1000, 0.01, slack=0)
    few = len(asked)
    assert rise(found) <= 0.01 < rise(found + 1)
    assert few <= 12
    asked.clear()
    near = largest_within(rise, 1000, 0.01, slack=0.05)
    assert len(asked) <= few
    assert near == found or 0.0095 <= rise(near) <= 0.01


def test_what_bisection_returns_is_within_the_budget_even_where_the_rise_falls_again():
    rises = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.9]
    found = largest_within(lambda number: rises[number - 1], len(rises), 0.5)
    assert found in (1, 3, 5)


def test_a_rise_that_is_no_number_is_beyond_every_budget():
    assert largest_within(lambda number: 0.1 if number <= 7 else math.nan, 1000, 0.5) == 7
    assert largest_within(lambda number: math.nan, 1000, 0.5) == 0


def test_the_longest_head_within_the_budget_is_taken(rise):
    ranked = ranking()
    rises = [rise(ranked[:n]) for n in range(1, 21)]
    budget = sorted(rises)[10] * 1.0001
    chosen = choose_within(rise, ranked, Budget(budget))
    assert chosen == ranked[: len(chosen)]
    assert rises[len(chosen) - 1] <= budget
    assert len(chosen) == 20 or rises[len(chosen)] > budget


def test_of_several_strengths_that_with_the_highest_sum_of_scores_is_taken(rise):
    ranked = ranking()
    budget = max(rise([n]) for n in ranked[:2]) + 1e-9
    options = {}
    for damping in (1.0, 0.5, 0.25):
        chosen = choose_within(rise, ranked, Budget(budget), (damping,))
        assert {n.damping for n in chosen} == {damping}
        options[damping] = -damping * sum(n.score for n in chosen)
    chosen = choose_within(rise, ranked, Budget(budget), (1.0, 0.5, 0.25))
    assert options[chosen[0].damping] == max(options.values())


def test_a_round_of_refinement_keeps_to_the_budget_and_never_gains_less(rise):
    ranked = ranking()
    budget = Budget(abs(rise(ranked[:8])) + 1e-6)
    plain = choose_within(rise, ranked, budget)
    refined = choose_within(rise, ranked, replace(budget, refine=3))
    assert rise(refined) <= budget.max_perplexity_increase
    assert sum(n.score for n in refined) <= sum(n.score for n in plain)


class Additive:
    """Stands for a model in which each neuron costs what it is given, whatever the others do."""

    prediction = None

    def __init__(self, of: dict[int, float]) -> None:
        self.of = of
        self.measured: list[dict[str, float]] = []

    def __call__(self, neurons: list[Component]) -> float:
        self.measured.append({"num_neurons": len(neurons), "rise": sum(self.costs(neurons).tolist())})
        return self.measured[-1]["rise"]

    def costs(self, neurons: list[Component]) -> torch.Tensor:
        return torch.tensor([self.of[n.index] * n.damping**2 for n in neurons], dtype=torch.float64)


def test_refinement_drops_a_costly_neuron_at_the_head_that_would_keep_the_others_out():
    rise = Additive({i: 1.0 if i == 2 else 1e-3 for i in range(50)})
    ranked = [Component(MODULES[0], i, -2.0 + 0.01 * i) for i in range(50)]
    assert [n.index for n in choose_within(rise, ranked, Budget(0.0101))] == [0, 1]
    refined = [n.index for n in choose_within(rise, ranked, Budget(0.0101, refine=1))]
    assert refined[:2] == [0, 1]
    assert 2 not in refined
    assert len(refined) == 10
    assert choose_within(rise, ranked, Budget(0.0101, refine=4)) == sorted(
        choose_within(rise, ranked, Budget(0.0101, refine=4)), key=lambda n: n.score
    )


@pytest.mark.parametrize("dampings", [(1.0,), (1.0, 0.5)])
def test_refinement_drops_a_first_neuron_that_costs_more_than_the_budget(dampings):
    rise = Additive({i: 1.0 if i == 0 else 1e-3 for i in range(50)})
    ranked = [Component(MODULES[0], i, -2.0 + 0.01 * i) for i in range(50)]
    with pytest.raises(ValueError, match=r"Not even one neuron .* 100\.00 %.*by --model\.budget\.refine 1, or choose"):
        choose_within(rise, ranked, Budget(0.0101))
    chosen = choose_within(rise, ranked, Budget(0.0101, refine=1), dampings)
    left = [i for i in range(50) if i not in (0, 19)]  # a tenth of the 20 that are considered
    assert [n.index for n in chosen] == left[: 10 if dampings == (1.0,) else 40]
    channels = [replace(n, granularity="channel") for n in ranked]
    with pytest.raises(ValueError, match=r"Not even one neuron [^,]*: raise it, or choose another"):
        choose_within(rise, channels, Budget(0.0101))
    with pytest.raises(ValueError, match="Not even one neuron"):
        choose_within(Additive({0: 1.0}), ranked[:1], Budget(0.0101, refine=2))


def test_where_scores_are_benefit_per_cost_the_damping_and_the_refinement_are_by_benefit():
    costs = {i: 1e-6 if i < 10 else 1e-3 for i in range(210)}
    rise = Additive(costs)
    ranked = [Component(MODULES[0], i, -1.0 / (costs[i] + 1e-4)) for i in range(210)]  # benefits of 1, and a floor
    by = [choose_within(rise, ranked, Budget(0.0501), (1.0, 0.5), *of) for of in ((), (lambda neuron: 1.0,))]
    assert [(len(of), of[0].damping) for of in by] == [(60, 1.0), (210, 0.5)]


def test_half_the_strength_pays_for_four_times_the_neurons_where_costs_are_quadratic():
    rise = Additive(dict.fromkeys(range(50), 1e-3))
    ranked = [Component(MODULES[0], i, -1.0) for i in range(50)]
    chosen = choose_within(rise, ranked, Budget(0.0101), (1.0, 0.5))
    assert len(chosen) == 40
    assert {n.damping for n in chosen} == {0.5}


def test_a_budget_that_pays_for_no_neuron_is_refused(rise):
    costly = max(ranking(), key=lambda n: rise([n]))
    assert rise([costly]) > 0
    with pytest.raises(ValueError, match=r"Not even one neuron is within --model.budget.max_perplexity_increase 1e-09"):
        choose_within(rise, [costly], Budget(1e-9))


def test_neurons_that_cost_nothing_are_taken_though_none_has_a_benefit():
    ranked = [Component(MODULES[0], i, 0.5) for i in range(50)]
    assert choose_within(Additive(dict.fromkeys(range(50), 0.0)), ranked, Budget(0.01), (1.0, 0.5)) == ranked


@pytest.fixture
def files(tiny_checkpoint) -> tuple[Path, Path, Path]:
    of = provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint)
    documents = Path("documents.jsonl")
    documents.write_text("\n".join(json.dumps({"text": sentence(i, 14)}) for i in range(12)))
    data = {"class": "C4", "source": str(documents)}
    used = [f"document-{i}" for i in (1, 2, 3)]
    general = save_scores("g/scores.safetensors", random_scores(0), of, data=data, sample_ids=used)
    return general, save_scores("b/scores.safetensors", random_scores(9, 0.5), of), documents


def prune(general: Path, behavior: Path, *options: str) -> Path:
    args = ["prune", f"--model.general=[{general}]", f"--model.behavior={behavior}", "--trainer.accelerator=cpu"]
    return Path(main([*args, *options]).trainer.log_dir)


def test_prune_spends_a_budget_on_documents_that_were_not_attributed(files):
    general, behavior, documents = files
    data = [f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=12", "--data.batch_size=5"]
    folder = prune(general, behavior, "--model.budget.max_perplexity_increase=0.02", "--data=C4", *data)
    found = NeuronList.load(folder / "neurons.json")
    budget = found.provenance["budget"]
    assert budget["num_documents"] == 9
    assert budget["num_tokens"] == 9 * 11
    assert budget["rise"] <= 0.02
    assert len(found.neurons) + len(found.next) == 48
    assert len(budget["measured"]) >= 2
    selection = json.loads((folder / "selection.json").read_text())
    assert selection["num_neurons"] == len(found.neurons)
    assert selection["budget"]["rise"] == budget["rise"]


def test_that_all_ranked_neurons_are_within_the_budget_is_said(files):
    general, behavior, documents = files
    data = ["--data=C4", f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=12"]
    budget = "--model.budget.max_perplexity_increase=9"
    with pytest.warns(match=r"^The 3 of --model\.num_ranked are all within the budget \(.* 48 could be ranked: raise"):
        assert (
            len(NeuronList.load(prune(general, behavior, budget, "--model.num_ranked=3", *data) / "neurons.json").order)
            == 3
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The 48 of")
        prune(general, behavior, budget, "--model.num_ranked=48", *data)
    with pytest.raises(ValueError, match=r"--data holds no document of two tokens.*raise --data\.seq_len"):
        prune(general, behavior, budget, *data, "--data.seq_len=1")


def test_a_selection_that_leaves_no_neuron_for_a_budget_is_refused(files):
    general, behavior, documents = files
    options = ["--data=C4", f"--data.source={documents}", "--model.budget.max_perplexity_increase=0.02"]
    none = ["--model.criterion=set_difference", "--model.top_behavior=0.001"]
    with pytest.raises(
        ValueError, match=r"^--model\.criterion set_difference leaves no neuron .*--model\.top_behavior, or"
    ):
        prune(general, behavior, *options, *none)


def test_the_neurons_that_come_next_are_switched_off_as_far_as_those_that_a_budget_paid_for(files):
    general, behavior, documents = files
    data = [f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=12"]
    options = ["--model.budget.max_perplexity_increase=0.02", "--model.dampings=[0.125,1.0]", "--data=C4", *data]
    found = NeuronList.load(prune(general, behavior, *options) / "neurons.json")
    assert found.provenance["damping"] == 1
    assert found.next
    assert {neuron.damping for neuron in found.neurons + found.next} == {1.0}


def test_a_budget_without_a_text_and_options_without_a_budget_are_refused(files):
    general, behavior, _ = files
    with pytest.raises(ValueError, match=r"--model.budget.max_perplexity_increase needs a text: --data C4"):
        prune(general, behavior, "--model.budget.max_perplexity_increase=0.02")
    with pytest.raises(ValueError, match=r"--model.budget.max_perplexity_increase must be above 0"):
        prune(general, behavior, "--model.budget.max_perplexity_increase=0")
    with pytest.raises(ValueError, match=r"--model.budget.max_perplexity_increase must be above 0, got nan"):
        Budget(math.nan).check([1.0])
    with pytest.raises(ValueError, match=r"--model.budget.refine must be at least 0, got -3"):
        Budget(0.1, refine=-3).check([1.0])
    with pytest.raises(ValueError, match=r"need --model.budget.max_perplexity_increase"):
        prune(general, behavior, "--model.budget.refine=2")
    with pytest.raises(ValueError, match=r"--model.dampings must be above 0 and at most 1"):
        prune(general, behavior, "--model.dampings=[1.5]")


def test_what_a_budget_cannot_be_measured_of_is_refused_before_a_model_is_loaded(files, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("the model was loaded"))
    _, behavior, documents = files
    options = [
        "--model.budget.max_perplexity_increase=0.02",
        "--data=C4",
        f"--data.source={documents}",
        "--data.seq_len=12",
    ]
    of = ScoreFile.load(behavior).provenance
    heads = {f"model.layers.{i}.self_attn.o_proj": torch.rand(4) for i in range(2)}
    of_heads = [save_scores(f"{i}.safetensors", heads, of, granularity="head", layers=["o_proj"]) for i in range(2)]
    with pytest.raises(ValueError, match=r"--model.budget.refine is for neurons, and these are scores of heads"):
        prune(*of_heads, *options, "--model.budget.refine=1", "--model.min_differential_strength=-100")
    before = [
        save_scores(f"before{i}.safetensors", random_scores(i), of, checkpoint_fingerprint="files:before")
        for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"no longer the one that was attributed \(files:before\), so it was not used"):
        prune(*before, *options, "--model.min_differential_strength=-100")


def test_the_text_is_tokenized_as_by_the_commit_that_was_attributed(files, monkeypatch):
    general, behavior, documents = files
    loaded = []
    tokenizer = Checkpoint.tokenizer
    monkeypatch.setattr(Checkpoint, "unchanged", lambda name, _: Checkpoint(name, "0123abcd"))
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: loaded.append(self) or tokenizer(self))
    data = [f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=12"]
    prune(general, behavior, "--model.budget.max_perplexity_increase=0.02", "--data=C4", *data)
    assert loaded == [Checkpoint(ScoreFile.load(general).provenance.checkpoint, "0123abcd")]


def test_attributed_documents_are_left_out_however_the_path_of_their_file_is_written(files):
    general, behavior, documents = files
    data = [f"--data.source={documents.absolute()}", "--data.seq_len=12", "--data.num_samples=12"]
    folder = prune(general, behavior, "--model.budget.max_perplexity_increase=0.02", "--data=C4", *data)
    assert NeuronList.load(folder / "neurons.json").provenance["budget"]["num_documents"] == 9


@pytest.mark.parametrize(("seed", "num_left"), [(0, 9), (3, 12)])
def test_of_a_stream_those_are_left_out_that_have_the_same_place_after_the_same_shuffle(
    files, monkeypatch, seed, num_left
):
    general, behavior, documents = files
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    monkeypatch.setenv("SPARC3_CACHE", "cache")
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: Unshuffled(rows))
    of = {"class": "C4", "source": None, "seed": 0, "buffer_size": 10_000}
    streamed = save_scores("s/scores.safetensors", random_scores(0), ScoreFile.load(general).provenance, data=of)
    data = [f"--data.seed={seed}", "--data.seq_len=12", "--data.num_samples=12"]
    folder = prune(streamed, behavior, "--model.budget.max_perplexity_increase=0.02", "--data=C4", *data)
    assert NeuronList.load(folder / "neurons.json").provenance["budget"]["num_documents"] == num_left


def test_a_text_of_attributed_documents_alone_is_refused(files):
    general, behavior, documents = files
    lines = documents.read_text().splitlines()
    documents.write_text("\n".join(lines[:3]))
    data = [f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=3"]
    with pytest.raises(ValueError, match=r"holds no document that was not used to attribute"):
        prune(general, behavior, "--model.budget.max_perplexity_increase=0.02", "--data=C4", *data)
