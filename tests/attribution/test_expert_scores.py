"""Scores of neurons in experts: against gradients of the fused parameters of the stock model, sample by sample."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, make_mixture
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.activations import ActivationRecorder
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.lrp_check import check_lrp
from sparc3_lightning.attribution.progress import Progress, load_progress
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.models.architectures import blocks_of, find_layers
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.experts import expert_counts, is_expert, open_experts_
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.models.sharding import checkpoint_blocks_

all_kinds = pytest.mark.parametrize("kind", MIXTURES)
RELEVANCES: list[Any] = ["magnitude", "signed", "absolute"]


def make_samples(lengths: tuple[int, ...] = (9, 2, 5, 7, 4)) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s{i}", torch.randint(4, 100, (n,), generator=draw).tolist()) for i, n in enumerate(lengths)]


def opened(kind: str) -> Any:
    model = make_mixture(kind)
    open_experts_(model)
    return model


def layers_of(model: Any, end: str = "up_proj") -> dict[str, Any]:
    return {name: layer for name, layer in find_layers(model, [end]).items() if is_expert(layer)}


def up_rows(kind: str, fused: Tensor) -> Tensor:
    """Return the rows of up of a fused parameter, shape ``[experts, neurons, hidden]``."""
    if kind == "nemotron_h":
        return fused
    if kind == "gpt_oss":
        return fused.transpose(1, 2)[:, 1::2]
    rows = fused.transpose(1, 2) if kind == "llama4_text" else fused
    return rows[:, rows.shape[1] // 2 :]


def accumulate(
    model: Any, samples: list[Sample], score: Any, batch_size: int, layers: Any = None, rule: Any = None, **options: Any
):
    """Record samples in batches, padded on the right, as the predict step does, with the plain gradient or LRP's."""
    accumulator = ScoreAccumulator(layers or layers_of(model), score, **options)
    for start in range(0, len(samples), batch_size):
        batch = pad_right(samples[start : start + batch_size], 0)
        with rules(model, rule), accumulator.recording(batch["attention_mask"], batch["sample_ids"]):
            target = largest_logit(model, batch["input_ids"], batch["attention_mask"]).sum()
            if score not in ("wanda", "activation"):
                target.backward()
    return accumulator


def rules(model: Any, rule: Any) -> Any:
    return nullcontext() if rule is None else lrp(model, rule)


def relevance_oracle(kind: str, samples: list[Sample], score: str, rule: Any = None) -> dict[str, Tensor]:
    """Return the relevance of each weight of up, by the experts' module, from gradients of the stock model."""
    model = make_mixture(kind)
    fused = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(("experts.gate_up_proj", "experts.up_proj"))
    }
    total: dict[str, Any] = dict.fromkeys(fused, 0)
    for sample in samples:
        wanted = [parameter.requires_grad_(True) for parameter in fused.values()]
        with rules(model, rule):
            logit = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max()
            grads = torch.autograd.grad(logit, wanted)
        for (name, weight), grad in zip(fused.items(), grads, strict=True):
            product = up_rows(kind, weight.detach() * grad)
            by_score = {
                "magnitude": product.abs(),
                "signed": product,
                "absolute": product.sum(dim=2, keepdim=True).abs(),
            }
            total[name] = total[name] + by_score[score]
    return {name.rpartition(".")[0]: value / len(samples) for name, value in total.items()}


def seen_by_experts(kind: str, model: Any, sample: Sample) -> dict[str, list[Tensor]]:
    """Return the inputs of each expert of the stock model, by the module of experts, each ``[rows, hidden]``."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, number: int):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if kind == "llama4_text":
                seen[name] = [x[x.any(dim=1)] for x in inputs[0].view(number, -1, inputs[0].shape[-1])]
            else:
                chosen = inputs[1]
                seen[name] = [inputs[0][(chosen == e).any(dim=1)] for e in range(number)]

        return hook

    experts = [(name, len(module.down_proj)) for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name, number)) for name, number in experts]
    model(torch.tensor([sample.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def activation_of(kind: str, experts: Any, number: int, X: Tensor) -> Tensor:
    """Return the activations of an expert's neurons, from the fused parameters."""
    if kind == "nemotron_h":
        return experts.act_fn(X @ experts.up_proj[number].T)
    W = experts.gate_up_proj[number]
    both = X @ (W if kind in ("gpt_oss", "llama4_text") else W.T)
    if kind == "gpt_oss":
        both = both + experts.gate_up_proj_bias[number]
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    gate, up = both.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


@all_kinds
@pytest.mark.parametrize(
    "rule", ["attnlrp", *(pytest.param(rule, marks=pytest.mark.slow) for rule in (None, "cp_lrp"))]
)
@pytest.mark.parametrize("score", RELEVANCES)
@pytest.mark.few(6)
def test_relevance_is_weight_times_gradient_of_the_stock_model(kind, score, rule):
    if kind == "llama4_text" and rule is not None:
        pytest.skip("its weights are one of two factors that need a gradient, and the rule gives half to each")
    samples = make_samples()
    found = accumulate(opened(kind), samples, score, 3, rule=rule).compute()
    for experts, of_weights in relevance_oracle(kind, samples, score, rule).items():
        for number, expected in enumerate(of_weights.sum(dim=2)):
            got = found[f"{experts}.{number}.up_proj"]
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind not in ("gpt_oss", "nemotron_h")])
def test_signed_relevance_is_also_the_one_of_the_outgoing_weights_where_up_is_a_factor(kind):
    samples = make_samples()
    found = accumulate(opened(kind), samples, "signed", 5).compute()
    model = make_mixture(kind)
    fused = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name.endswith("experts.down_proj")}
    for sample in samples:
        model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max().backward()
    for name, weight in fused.items():
        product = (weight * weight.grad).detach().sum(dim=2 if kind == "llama4_text" else 1) / len(samples)
        for number, expected in enumerate(product):
            got = found[f"{name.rpartition('.')[0]}.{number}.up_proj"]
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


@all_kinds
@pytest.mark.slow
@pytest.mark.parametrize("score", ["magnitude", "signed", "squared", "wanda", "activation"])
def test_a_padded_batch_has_the_scores_of_one_sample_at_a_time_also_when_blocks_are_computed_again(kind, score):
    model, samples = opened(kind), make_samples()
    layers = layers_of(model, "down_proj" if score == "activation" else "up_proj")
    alone = accumulate(model, samples, score, 1, layers)
    together = accumulate(model, samples, score, 5, layers)
    checkpoint_blocks_(model)
    again = accumulate(model, samples, score, 2, layers)
    for other in (together, again):
        assert other.expert_tokens.keys() == alone.expert_tokens.keys() == expert_counts(model).keys()
        for name, counts in alone.expert_tokens.items():
            assert torch.equal(other.expert_tokens[name], counts)
        for name, value in alone.compute().items():
            torch.testing.assert_close(other.compute()[name], value, rtol=1e-5, atol=1e-7)


@all_kinds
def test_wanda_and_activations_are_those_of_the_tokens_that_an_expert_sees(kind):
    samples, stock, model = make_samples(), make_mixture(kind), opened(kind)
    wanda = accumulate(model, samples, "wanda", 3).compute()
    columns = columns_of(model, layers_of(model))
    magnitude = accumulate(model, samples, "activation", 3, columns)
    recorder = ActivationRecorder(columns)
    batch = pad_right(samples, 0)
    with recorder.recording(batch["attention_mask"], [1] * len(samples)):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    rows = recorder.rows()
    seen = [seen_by_experts(kind, stock, sample) for sample in samples]
    for name in seen[0]:
        module = stock.get_submodule(name)
        fused = module.up_proj if kind == "nemotron_h" else module.gate_up_proj
        for number, up in enumerate(up_rows(kind, fused)):
            layer = f"{name}.{number}.up_proj"
            inputs = torch.cat([of_sample[name][number] for of_sample in seen])
            torch.testing.assert_close(wanda[layer].double(), up.abs() @ inputs.norm(dim=0), rtol=1e-5, atol=1e-7)
            acts = [activation_of(kind, module, number, of_sample[name][number]) for of_sample in seen]
            sums = zip(acts, samples, strict=True)
            means = torch.stack([act.sum(dim=0) / len(sample.input_ids) for act, sample in sums])
            torch.testing.assert_close(rows[layer].double(), means, rtol=1e-5, atol=1e-7)
            sums = zip(acts, samples, strict=True)
            expected = torch.stack([act.abs().sum(dim=0) / len(sample.input_ids) for act, sample in sums]).mean(dim=0)
            torch.testing.assert_close(magnitude.compute()[layer].double(), expected, rtol=1e-5, atol=1e-7)
        number_seen = [sum(len(of_sample[name][e]) for of_sample in seen) for e in range(len(module.down_proj))]
        assert magnitude.expert_tokens[name].tolist() == number_seen


@pytest.mark.parametrize("score", ["signed", "magnitude", "squared", "wanda", "activation"])
def test_an_expert_without_a_token_has_the_score_0(score):
    model = opened("qwen3_moe")
    layers = layers_of(model, "down_proj" if score == "activation" else "up_proj")
    accumulator = accumulate(model, make_samples((2,)), score, 1, layers)
    counts = torch.cat(list(accumulator.expert_tokens.values()))
    assert (counts == 0).any()
    assert counts.sum() == 2 * 2 * 2
    for count, value in zip(counts, accumulator.compute().values(), strict=True):
        assert not value.any() if count == 0 else score != "wanda" or value.any()


@pytest.mark.parametrize("score", RELEVANCES)
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "llama4_text"])
def test_an_expert_that_gets_no_token_of_a_sample_has_no_relevance_also_where_nothing_else_is_scored(kind, score):
    model, sample = opened(kind), make_samples((2,))
    every = accumulate(model, sample, score, 1).compute()
    unseen = next(name for name, value in every.items() if not value.any())
    assert not accumulate(model, sample, score, 1, {unseen: layers_of(model)[unseen]}).compute()[unseen].any()
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(accumulate(model, sample, score, 1, {name: layer}).compute()[name], every[name])


def test_a_layer_that_the_model_never_calls_is_still_an_error():
    model = opened("mixtral")
    layers = {**layers_of(model), "spare": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"No score arrived for 1 module.*spare"):
        accumulate(model, make_samples((3,)), "wanda", 1, layers)
    with pytest.raises(ValueError, match=r"No score arrived for \d+ module"):
        accumulate(opened("mixtral"), make_samples((3,)), "wanda", 1, layers_of(model))


@all_kinds
@pytest.mark.parametrize("score", ["magnitude", "signed", "wanda"])
@pytest.mark.few(8)
def test_scores_of_weights_in_experts_sum_up_to_those_of_their_neurons(kind, score):
    model, samples = opened(kind), make_samples()
    of_weights = accumulate(model, samples, score, 3, granularity="weight").compute()
    of_neurons = accumulate(model, samples, score, 3).compute()
    assert list(of_weights) == list(of_neurons)
    for name, value in of_neurons.items():
        torch.testing.assert_close(of_weights[name].sum(dim=1), value, rtol=1e-4, atol=1e-6)


def test_samples_that_only_fill_a_batch_weigh_nothing():
    model, samples = opened("mixtral"), make_samples()
    accumulator = ScoreAccumulator(layers_of(model), "signed")
    batch = pad_right(samples, 0)
    with accumulator.recording(batch["attention_mask"], batch["sample_ids"], [1, 0, 1, 0, 0]):
        largest_logit(model, batch["input_ids"], batch["attention_mask"]).sum().backward()
    alone = accumulate(model, [samples[0], samples[2]], "signed", 1)
    for name, counts in alone.expert_tokens.items():
        assert torch.equal(accumulator.expert_tokens[name], counts)
    for name, value in alone.compute().items():
        torch.testing.assert_close(accumulator.compute()[name], value, rtol=1e-5, atol=1e-7)


def test_the_tokens_that_experts_saw_are_saved_and_added_to_when_a_run_goes_on(tmp_path):
    model, samples = opened("mixtral"), make_samples()
    whole, first = accumulate(model, samples, "wanda", 1), accumulate(model, samples[:2], "wanda", 1)
    Progress({}, first.sums, ["s0", "s1"]).save(tmp_path, 0)
    progress = load_progress(tmp_path)
    assert progress is not None
    second = ScoreAccumulator(layers_of(model), "wanda")
    second.sums = progress.sums
    batch = pad_right(samples[2:], 0)
    with second.recording(batch["attention_mask"], batch["sample_ids"]):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for name, counts in whole.expert_tokens.items():
        assert torch.equal(second.expert_tokens[name], counts)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("score", ["magnitude", "signed", "wanda"])
@pytest.mark.few(2)
def test_a_sharded_mixture_has_the_same_scores(kind, score):
    expected = accumulate(opened(kind), make_samples(), score, 3).compute()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = opened(kind)
    checkpoint_blocks_(model)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = accumulate(model, make_samples(), score, 3).compute()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    names = list(layers_of(model))
    with mask(model, [Component(names[0], 2, -1.0)]):
        accumulate(model, make_samples(), "wanda", 3)


@all_kinds
@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.few(4)
def test_the_rules_are_checked_on_a_mixture_whichever_experts_the_last_token_sees(kind, length):
    model = opened(kind)
    (sample,) = make_samples((length,))
    check = check_lrp(model, "attnlrp", layers_of(model), torch.tensor([sample.input_ids]))
    assert check.layers_reached == check.num_layers
