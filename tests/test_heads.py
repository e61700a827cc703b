"""Heads: their relevance, masks and pruning, against one head, one token and one number at a time."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentence
from test_attribute import trainer
from test_evaluate import evaluation, run, save_neurons, write_inputs
from torch import Tensor

from sparc3_lightning.accumulator import ScoreAccumulator
from sparc3_lightning.attribute import SCORES, Attribution
from sparc3_lightning.checkpoints import export_pruned
from sparc3_lightning.data import C4
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.heads import head_dims, head_norms, mask_heads, num_heads, prune_heads_
from sparc3_lightning.lrp import FAMILIES, lrp
from sparc3_lightning.neuron_list import NeuronList
from sparc3_lightning.neurons import Neuron, check_neurons, mask, prune_
from sparc3_lightning.relevance import find_targets
from sparc3_lightning.scores import ScoreFile
from sparc3_lightning.targets import largest_logit
from sparc3_lightning.variants import neurons_of, plan

O_PROJ = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
HEADS = {O_PROJ[0]: {1: 1.0}, O_PROJ[1]: {0: 1.0, 1: 1.0, 2: 1.0}}  # of 4 heads, two to a value head
AS_NEURONS = [Neuron(name, index, 0.0) for name, indices in HEADS.items() for index in indices]
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
D = 4  # dimensions of a head
FORMS = ("magnitude", "signed", "absolute", "squared", "wanda")
# Every family whose attention has an o_proj, and a LLaMA whose attention has biases.
WITHOUT_HEADS = {"gpt2": "transformer.h.0.attn", "opt": "model.decoder.layers.0.self_attn"}
MODELS: list[dict[str, Any]] = [{"family": family} for family in sorted(FAMILIES - WITHOUT_HEADS.keys())]
MODELS += [{"family": "llama", "attention_bias": True}]
all_models = pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s{n}", torch.randint(4, 100, (n,), generator=draw).tolist()) for n in (9, 3, 6)]


def accumulated(model: Any, samples: list[Sample], form: str) -> dict[str, Tensor]:
    modules = {name: model.get_submodule(name) for name in O_PROJ}
    accumulator = ScoreAccumulator(modules, form, granularity="head", head_dims=head_dims(model, O_PROJ))
    for part in (samples[:2], samples[2:]):
        batch = pad_right(part, 0)
        mask_BT = batch["attention_mask"] if batch["is_padded"] else None
        with lrp(model), accumulator.recording(mask_BT, batch["sample_ids"]):
            target = largest_logit(model, batch["input_ids"], mask_BT).sum()
            if form != "wanda":
                target.backward()
    return accumulator.compute()


def oracle(model: Any, samples: list[Sample], form: str) -> dict[str, Tensor]:
    """One sample at a time, with the gradients of o_proj's input and of its weight, and loops over heads and tokens."""
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in O_PROJ}
    squares = {name: torch.zeros(16, dtype=torch.float64) for name in O_PROJ}
    for sample in samples:
        inputs: list[Tensor] = []

        def keep(module: Any, args: tuple[Tensor], inputs: list[Tensor] = inputs) -> tuple[Tensor]:
            inputs.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
            inputs[-1].retain_grad()
            return (inputs[-1],)

        handles = [model.get_submodule(name).register_forward_pre_hook(keep) for name in O_PROJ]
        for name in O_PROJ:
            model.get_submodule(name).weight.requires_grad_().grad = None
        with lrp(model):
            model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max().backward()
        for handle in handles:
            handle.remove()
        for name, Z_BTI in zip(O_PROJ, inputs, strict=True):
            weight, Z_TI = model.get_submodule(name).weight, Z_BTI[0]
            of_input = (Z_TI * Z_BTI.grad[0]).detach()
            of_weight = (weight * weight.grad).detach()
            squares[name] += Z_TI.detach().square().sum(dim=0)
            for h in range(4):
                inside = slice(D * h, D * (h + 1))
                sums[name][h] += {
                    "magnitude": of_weight[:, inside].abs().sum(),
                    "signed": of_input[:, inside].sum(),
                    "absolute": of_input[:, inside].sum().abs(),
                    "squared": sum(of_input[t, inside].sum() ** 2 for t in range(len(Z_TI))),
                    "wanda": torch.tensor(0.0),
                }[form]
            weight.requires_grad_(False)
    if form != "wanda":
        return {name: total / len(samples) for name, total in sums.items()}
    score = {name: model.get_submodule(name).weight.abs() * squares[name].sqrt() for name in O_PROJ}
    return {name: torch.stack([score[name][:, D * h : D * h + D].sum() for h in range(4)]) for name in O_PROJ}


# Relevance.


@pytest.mark.parametrize("form", FORMS)
@all_models
def test_scores_of_heads_are_those_of_one_sample_head_and_token_at_a_time(make_model, samples, options, form):
    model = make_model(**options)
    found, expected = accumulated(model, samples, form), oracle(model, samples, form)
    for name in O_PROJ:
        assert found[name].shape == (4,)
        torch.testing.assert_close(found[name], expected[name].float(), rtol=1e-5, atol=1e-7)


def test_the_signed_relevance_of_a_head_is_the_sum_over_its_weights(make_model, samples):
    model = make_model()
    modules = {name: model.get_submodule(name) for name in O_PROJ}
    of_weights = ScoreAccumulator(modules, "signed", granularity="weight")
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with lrp(model), of_weights.recording(None, [sample.id]):
            largest_logit(model, ids).sum().backward()
    found = accumulated(model, samples, "signed")
    for name, R_OI in of_weights.compute().items():
        torch.testing.assert_close(found[name], R_OI.view(-1, 4, D).sum(dim=(0, 2)), rtol=1e-5, atol=1e-6)


def test_heads_are_of_o_proj_only(make_model):
    modules = {"model.layers.0.mlp.up_proj": make_model().model.layers[0].mlp.up_proj}
    with pytest.raises(ValueError, match=r"--model\.granularity head .*--model\.targets '\[o_proj\]'"):
        ScoreAccumulator(modules, "signed", granularity="head")
    with pytest.raises(ValueError, match=r"--model\.targets '\[o_proj\]', got \['up_proj'\]"):
        Attribution("tiny", granularity="head", targets=["up_proj"])
    with pytest.raises(ValueError, match=r"--model\.targets '\[o_proj\]', got none"):
        Attribution("tiny", granularity="head")


@pytest.mark.parametrize(("family", "attention"), WITHOUT_HEADS.items())
def test_an_attention_without_o_proj_has_no_heads_and_says_so(make_model, family, attention):
    model = make_model(family)
    with pytest.raises(ValueError, match=r"--model\.targets: the model has no linear layer 'o_proj'; it has \["):
        find_targets(model, ["o_proj"])
    for name in ("o_proj", "out_proj", "c_proj"):
        with pytest.raises(ValueError, match=r"not a layer of attention heads of this model: expected .* an o_proj"):
            head_dims(model, [f"{attention}.{name}"])


@pytest.mark.parametrize("method", ["lrp", "wanda"])
def test_attribute_writes_scores_of_heads(tiny_checkpoint, tmp_path: Path, method):
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(sentence(i, 20) for i in range(4)) + "\n")
    model = Attribution(tiny_checkpoint, method=method, granularity="head", targets=["o_proj"])
    trainer().predict(model, datamodule=C4(str(path), num_samples=3, seq_len=12), return_predictions=False)
    found = ScoreFile.load(Path("out") / SCORES)
    assert found.provenance.granularity == "head"
    assert {name: len(score) for name, score in found.scores.items()} == dict.fromkeys(O_PROJ, 4)
    assert all((score > 0).all() for score in found.scores.values())


# Masking and pruning.


def by_hand(model: Any, heads: dict[str, dict[int, float]], strength: float = 1.0) -> Any:
    """Return a copy in which the columns of each head are smaller."""
    other = copy.deepcopy(model)
    for name, strengths in heads.items():
        for h, of_head in strengths.items():
            other.get_submodule(name).weight[:, D * h : D * h + D] *= 1 - strength * of_head
    return other


@all_models
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_mask_makes_the_columns_of_a_head_smaller_by_its_strength(make_model, options, strength):
    model = make_model(**options)
    before = logits(model)
    with mask_heads(model, HEADS, strength):
        found = logits(model)
    torch.testing.assert_close(found, logits(by_hand(model, HEADS, strength)), rtol=1e-9, atol=1e-9)
    assert (found - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)


def test_each_head_has_a_strength_of_its_own_in_a_mask_and_in_the_weights(make_model):
    model, heads = make_model(), {O_PROJ[0]: {0: 1.0, 3: 0.25}, O_PROJ[1]: {1: 0.5, 2: 1.0}}
    as_neurons = [Neuron(name, h, 0.0, strength=s) for name, of in heads.items() for h, s in of.items()]
    half, expected = logits(by_hand(model, heads, 0.5)), logits(by_hand(model, heads))
    with mask(model, as_neurons, 0.5):
        torch.testing.assert_close(logits(model), half, rtol=1e-9, atol=1e-9)
    before = weights(model)
    prune_(model, as_neurons)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    values = [name for name in before if "v_proj" in name]  # each is needed by a head that is not off
    assert all(torch.equal(weights(model)[name], before[name]) for name in values)


def test_a_head_has_no_constant(make_model):
    for use in (_masked, prune_, check_neurons):
        with pytest.raises(ValueError, match=r"Head 1 of .* has a constant"):
            use(make_model(), [Neuron(O_PROJ[0], 1, 0.0, constant=0.5)])


@all_models
def test_pruned_heads_are_masked_heads(make_model, options):
    model = make_model(**options)
    with mask(model, AS_NEURONS):
        masked = logits(model)
    prune_(model, AS_NEURONS)
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


@all_models
def test_the_rows_of_a_value_head_are_zero_only_where_no_head_needs_them(make_model, options):
    model = make_model(**options)
    before = weights(model)
    prune_heads_(model, HEADS)
    expected = {name: value.clone() for name, value in before.items()}
    for name, indices in HEADS.items():
        for h in indices:
            expected[f"{name}.weight"][:, D * h : D * h + D] = 0
    # The heads 0 and 1 of the second layer share its value head 0, and both are off; head 3 still needs value head 1.
    for kind in ("weight", "bias"):
        value = f"model.layers.1.self_attn.v_proj.{kind}"
        if value in expected:
            expected[value][:D] = 0
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())


def test_neurons_and_heads_can_be_off_together(make_model):
    model = make_model()
    both = [*AS_NEURONS, Neuron("model.layers.0.mlp.up_proj", 3, 0.0)]
    check_neurons(model, both)
    with mask(model, both):
        masked = logits(model)
    with mask(model, both[-1:]), mask_heads(model, HEADS):
        assert torch.equal(logits(model), masked)
    prune_(model, both)
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


def _masked(model: Any, neurons: list[Neuron]) -> None:
    with mask(model, neurons):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("use", [_masked, prune_, check_neurons])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Neuron(O_PROJ[1], 4, 0.0), "Head 4 of .* the layer has 4 heads"),
        (Neuron(O_PROJ[1], -1, 0.0), "Head -1 of "),
        (Neuron("model.layers.2.self_attn.o_proj", 0, 0.0), "not a layer of attention heads"),
        (Neuron("o_proj", 0, 0.0), "not a layer of attention heads"),
        (Neuron("model.layers.0.mlp.up_proj", 24, 0.0), "24 neurons"),
    ],
)
def test_a_head_that_is_not_there_is_refused_and_nothing_is_changed(make_model, use: Callable, bad, complaint):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=complaint):
        use(model, [*AS_NEURONS, bad])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# As controls of an evaluation.


def test_the_norm_of_a_head_is_that_of_its_columns(make_model):
    model = make_model()
    W_OI = model.get_submodule(O_PROJ[0]).weight.float()
    expected = torch.stack([W_OI[:, D * h : D * h + D].norm() for h in range(4)])
    torch.testing.assert_close(head_norms(model, O_PROJ[0]), expected)
    assert num_heads(model, O_PROJ[0]) == 4


def test_controls_of_heads_are_heads(make_model):
    model = make_model()
    pruned = NeuronList([Neuron(O_PROJ[0], 1, -1.0), Neuron(O_PROJ[1], 2, -1.0)])
    variants = plan({"": pruned}, 1, controls=3)
    lists = neurons_of(variants, {"": pruned}, model, seed=0)
    controls = [variant for variant in variants if variant.kind in ("random", "largest_weights")]
    assert len(controls) == 6
    for variant in controls:
        check_neurons(model, lists[variant.name])
        assert [neuron.module for neuron in lists[variant.name]] == O_PROJ
        assert not {(n.module, n.index) for n in lists[variant.name]} & {(n.module, n.index) for n in pruned.neurons}


def test_evaluate_switches_heads_off_as_the_exported_checkpoint_is_without_them(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    write_inputs(tmp_path)
    path = save_neurons(tiny_checkpoint, AS_NEURONS, {"sample_ids": []})
    both = run(evaluation(tiny_checkpoint, path, controls=1), folder="both")
    export_pruned(tiny_checkpoint, AS_NEURONS, Path("pruned"), dtype=torch.float32)
    alone = run(evaluation("pruned"), folder="alone")
    del both["pruned"]["kl"]  # of the model as it is there is none
    assert alone["baseline"] == pytest.approx(both["pruned"], rel=1e-5)
    assert both["pruned"]["perplexity"] != pytest.approx(both["baseline"]["perplexity"], rel=1e-3)
    assert (Path("both") / "report.html").is_file()
