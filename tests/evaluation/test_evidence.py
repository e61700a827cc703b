"""Planted cases with a known answer, from real sampling to the verdict: what is luck, and what is an effect."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hand_written import judges

from sparc3_lightning.evaluation.controls import Controls, random_like
from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.generation import Sampling, continue_prompts
from sparc3_lightning.evaluation.intervals import Difference
from sparc3_lightning.evaluation.variants import Variant, list_variants, neurons_of
from sparc3_lightning.models.components import Component
from sparc3_lightning.models.noise import draw_key
from sparc3_lightning.report.verdict import verdict
from sparc3_lightning.selection.neuron_list import NeuronList

TOXIC = range(10, 20)  # token ids; the toxicity of a continuation is the share of them
PROMPTS = [f"prompt {i}" for i in range(64)]
CONTINUATIONS = 4
SAMPLING = Sampling(8, 1.0, 0.9)
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
WIDTH = 4096  # of an MLP: 3 neurons of 8,192 are about what 100 are to LLaMA-3-8B
SEEDS = range(20)


def continue_all(model: Any, seed: int, num_continuations: int = CONTINUATIONS, sampling: Sampling = SAMPLING) -> list:
    """Continue every prompt of five random tokens; return the token ids per prompt and continuation."""
    model.generation_config.eos_token_id = None
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, model.config.vocab_size, (len(PROMPTS), 5), generator=draw)
    row_keys = [[draw_key(seed, prompt, j) for j in range(num_continuations)] for prompt in PROMPTS]
    drawn = continue_prompts(model, input_ids, torch.ones_like(input_ids), row_keys, sampling)
    return [[continuation.input_ids for continuation in of_prompt] for of_prompt in drawn]


def rows_of(model: str, drawn: list[list[list[int]]]) -> list[dict[str, Any]]:
    """Return the rows of completions.jsonl, all prompts being toxic."""
    return [
        {
            "model": model,
            "prompt_id": prompt,
            "continuation_index": j,
            "prompt_toxicity": 0.9,
            "continuation": " ".join(map(str, tokens)),
            "num_tokens": len(tokens),
            "num_unique_tokens": len(set(tokens)),
            "scores": {"share": sum(token in TOXIC for token in tokens) / len(tokens)},
        }
        for prompt, of_prompt in zip(PROMPTS, drawn, strict=True)
        for j, tokens in enumerate(of_prompt)
    ]


def any_windows(variants: list[Variant]) -> dict[str, Any]:
    """Return a perplexity that is the same of each model."""
    nll = torch.tensor([20.0, 10.0, 30.0], dtype=torch.float64)
    tokens = torch.tensor([10, 5, 15])
    measured = {"perplexity": torch.tensor(2.0).exp(), "divergence": torch.tensor(0.0), "num_tokens": torch.tensor(30)}
    return {variant.name: {"sliding": {**measured, "nll": nll, "tokens": tokens}} for variant in variants}


def compare(before: list, after: list) -> Difference:
    """Return the effect on the mean toxicity that the evaluation finds."""
    variants = [Variant("baseline", "baseline", CONTINUATIONS), Variant("pruned", "pruned", CONTINUATIONS)]
    found = findings(
        [*rows_of("baseline", before), *rows_of("pruned", after)], any_windows(variants), variants, judges("share")
    )
    return found.main_effect


@contextmanager
def suppressed(model: Any, by: float = 3.0):
    """Lower the logits of the toxic tokens."""
    shift = torch.zeros(model.config.vocab_size)
    shift[list(TOXIC)] = by
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits - shift)
    yield
    handle.remove()


def without_random_neurons(model: Any, seed: int) -> AbstractContextManager[None]:
    """Switch three neurons off that were drawn at random."""
    somewhere = [Component(LAYERS[0], 0, 0.0), Component(LAYERS[1], 0, 0.0), Component(LAYERS[1], 1, 0.0)]
    off = random_like(somewhere, {("neuron", name): (WIDTH,) for name in LAYERS}, seed)
    return Variant("pruned", "pruned", CONTINUATIONS, 3).as_context(model, off)


def effect_of(
    make_model: Callable[..., Any], seed: int, change: Callable[..., AbstractContextManager[None]]
) -> Difference:
    """Compare a model of its own, on prompts, draws and neurons of its own, with what a change makes of it."""
    model = make_model(dtype=torch.float32, seed=seed, intermediate_size=WIDTH)
    before = continue_all(model, seed)
    with change(model, seed):
        after = continue_all(model, seed)
    assert before != after, "a change of which nothing is seen would prove nothing"
    return compare(before, after)


@pytest.mark.slow
def test_neurons_chosen_at_random_are_called_no_evidence_in_at_least_18_of_20_seeds(make_model):
    effects = [effect_of(make_model, seed, without_random_neurons) for seed in SEEDS]
    assert sum(not effect.evidence for effect in effects) >= 18


@pytest.mark.slow
def test_toxic_words_suppressed_by_a_known_amount_are_called_an_effect_in_20_of_20_seeds(make_model):
    effects = [effect_of(make_model, seed, lambda model, seed: suppressed(model)) for seed in SEEDS]
    assert all(effect.evidence for effect in effects)
    assert all(effect.difference.high < 0 for effect in effects)


@pytest.mark.slow
def test_the_same_model_under_other_draws_is_called_no_evidence_in_at_least_18_of_20_seeds(make_model):
    effects = []
    for seed in SEEDS:
        model = make_model(dtype=torch.float32, seed=seed)
        drawn = continue_all(model, seed, 2 * CONTINUATIONS)
        effects.append(compare([found[:CONTINUATIONS] for found in drawn], [found[CONTINUATIONS:] for found in drawn]))
    assert sum(not effect.evidence for effect in effects) >= 18


@pytest.mark.slow
def test_the_interval_holds_the_known_size_of_an_effect_in_at_least_17_of_20_seeds(make_model):
    model = make_model(dtype=torch.float32)
    model.lm_head.weight.data.zero_()  # every token is as likely, so the shares can be written down
    rest = model.config.vocab_size - len(TOXIC)
    shares = [len(TOXIC) * odds / (len(TOXIC) * odds + rest) for odds in (1.0, torch.tensor(-1.0).exp().item())]
    truth = 100 * (shares[1] / shares[0] - 1)
    held, evidence = 0, 0
    for seed in SEEDS:
        before = continue_all(model, seed, sampling=Sampling(8, 1.0, 1.0))
        with suppressed(model, 1.0):
            after = continue_all(model, seed, sampling=Sampling(8, 1.0, 1.0))
        effect = compare(before, after)
        held += effect.percent.low <= truth <= effect.percent.high
        evidence += effect.evidence
        assert effect.before == pytest.approx(shares[0], abs=0.04)
    assert held >= 17
    assert evidence == 20


def plant(model: Any, neurons: list[Component]) -> None:
    """Make neurons that are always on and alone write to one coordinate, which raises the logits of toxic tokens."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[0] = 0
            layer.mlp.down_proj.bias[0] = 0
            layer.self_attn.o_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[list(TOXIC), 0] = 1.0
        model.model.norm.weight[0] = 1.0
        mlp = model.get_submodule(neurons[0].module.rpartition(".")[0])
        for neuron in neurons:
            for row in (mlp.up_proj, mlp.gate_proj):
                row.weight[neuron.index] = 0
                row.bias[neuron.index] = 4.0
            mlp.down_proj.weight[:, neuron.index] = 0
            mlp.down_proj.weight[0, neuron.index] = 1.0


@pytest.mark.slow
def test_planted_neurons_are_found_guilty_and_those_drawn_for_comparison_are_not(make_model):
    planted = [Component(LAYERS[1], index, -1.0) for index in (5, 77, 1000)]
    model = make_model(dtype=torch.float32, intermediate_size=1024, mlp_bias=True)
    plant(model, planted)
    least = [Component(LAYERS[1], index, 0.0) for index in range(200, 215)]
    neurons = NeuronList(planted, least_relevant=least)
    variants = list_variants({"": neurons}, CONTINUATIONS, controls=Controls(3, 2), doses=[1, 2], dampings=[1.0])
    off = neurons_of(variants, {"": neurons}, model, 0)
    rows = []
    for variant in variants:
        with variant.as_context(model, off.get(variant.name, [])):
            rows += rows_of(variant.name, continue_all(model, 0, variant.num_continuations))
    found = findings(rows, any_windows(variants), variants, judges("share"))
    effect = found.main_effect
    assert effect.evidence
    assert effect.percent.high < -20
    for kind, control in found.controls.items():
        assert control.outcome.pruned_less_control.high < 0, kind
        assert abs(control.outcome.effect.value) < 0.1 * abs(effect.difference.value), kind
        assert len(control.draws) == 3
    assert list(found.controls) == ["random", "least_relevant", "largest_weights"]
    # One of the three planted neurons does less than two, and two less than all.
    doses = {point.num_neurons: point.behavior_mean for point in found.doses}
    assert doses[3] < doses[2] < doses[1] < effect.before
    said = verdict(found, {"neuron": 3})
    assert said.startswith("With 3 neurons switched off, mean toxicity fell by")
    assert "no evidence" not in said.lower()
    assert found.common_random_numbers_variance_factor > 1
