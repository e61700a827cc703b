"""The accumulator of scores: against slow loops, padded batches, values that are not finite, and one linear layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FAMILIES, mlp_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.attribution.accumulator import NonfiniteRelevanceError, ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.models.architectures import find_layers

SCORES: list[Any] = ["magnitude", "signed", "wanda"]
PAD = 0

all_families = pytest.mark.parametrize("family", sorted(FAMILIES))
all_scores = pytest.mark.parametrize("score", SCORES)


def in_out(module: Any, of_weight: Tensor) -> Tensor:
    """Return what has the shape of a layer's weight with a row for each output: GPT-2 has a column."""
    return of_weight.T if isinstance(module, Conv1D) else of_weight


def kinds_of(family: str) -> tuple[str, str]:
    """Return what the layers of a family's MLP are called: the scored one, and the one after the activation."""
    (row, *_), column = mlp_of(family, 0)
    return row.rpartition(".")[2], column.rpartition(".")[2]


def make_samples(num_samples: int = 5, seed: int = 0) -> list[Sample]:
    """Return samples of different lengths, 2 to 9 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [9, 2, 5, 7, 4, 3, 6, 8][:num_samples]
    return [Sample(f"sample {i}", torch.randint(4, 100, (n,), generator=draw).tolist()) for i, n in enumerate(lengths)]


def record(accumulator: ScoreAccumulator, model: Any, samples: list[Sample], rule: Any = "attnlrp", **options: Any):
    """Record one batch, padded on the right, as the predict step does."""
    batch = pad_right(samples, PAD)
    with lrp(model, rule), accumulator.recording(batch["attention_mask"], batch["sample_ids"], **options):
        target = largest_logit(model, batch["input_ids"], batch["attention_mask"]).sum()
        if accumulator.score != "wanda":
            target.backward()


def accumulate(model: Any, samples: list[Sample], score: Any, batch_size: int, layers=("up_proj",), **options: Any):
    """Record samples in batches and return the accumulator."""
    accumulator = ScoreAccumulator(find_layers(model, layers), score)
    for start in range(0, len(samples), batch_size):
        record(accumulator, model, samples[start : start + batch_size], **options)
    return accumulator


def weight_relevance(model: Any, sample: Sample, names: list[str], rule: Any = "attnlrp") -> dict[str, Tensor]:
    """Return weight times weight gradient of one sample without padding, by a backward pass to the weights."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    with lrp(model, rule):
        target = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max()
        found = torch.autograd.grad(target, weights)
    for weight in weights:
        weight.requires_grad_(False)
    products = [weight.detach() * grad for weight, grad in zip(weights, found, strict=True)]
    return {name: in_out(model.get_submodule(name), R) for name, R in zip(names, products, strict=True)}


def naive_scores(model: Any, samples: list[Sample], score: str, layers=("up_proj",), rule: Any = "attnlrp"):
    """Score one sample after the other, keeping whole matrices of relevance, and all the activations for Wanda."""
    modules = find_layers(model, layers)
    names = list(modules)
    if score == "wanda":
        tokens: dict[str, list[Tensor]] = {name: [] for name in names}
        handles = [
            module.register_forward_hook(lambda m, i, out, name=name: tokens[name].extend(i[0].flatten(0, -2)))
            for name, module in modules.items()
        ]
        for sample in samples:
            model(torch.tensor([sample.input_ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        norms = {name: torch.stack(rows).norm(dim=0) for name, rows in tokens.items()}
        return {name: (in_out(m, m.weight).abs() * norms[name]).sum(dim=1) for name, m in modules.items()}
    per_sample = [weight_relevance(model, sample, names, rule) for sample in samples]
    if score == "magnitude":
        per_sample = [{name: R.abs() for name, R in found.items()} for found in per_sample]
    return {name: torch.stack([found[name] for found in per_sample]).mean(dim=0).sum(dim=1) for name in names}


def assert_agree(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    """Compare by the norm of the difference."""
    assert list(got) == list(expected)
    for name, value in got.items():
        assert value.shape == expected[name].shape
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < rtol, f"{name}: {error}"


@all_families
@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.few(4)
def test_row_sums_of_weight_times_gradient_are_sums_over_tokens_of_output_times_gradient(make, family, rule):
    model = make(family)
    kinds = kinds_of(family)
    names = list(find_layers(model, kinds))
    for sample in make_samples():
        rows = {name: R.sum(dim=1) for name, R in weight_relevance(model, sample, names, rule).items()}
        got = accumulate(model, [sample], "signed", 1, layers=kinds, rule=rule)
        assert_agree(got.compute(), rows)
        assert_agree({name: got.sums[name] for name in rows}, rows, rtol=1e-10)


@all_families
@all_scores
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.few(12)
def test_streaming_padded_batches_gives_the_scores_of_one_sample_after_the_other(make, family, score, batch_size):
    model = make(family)
    samples = make_samples()
    layers = kinds_of(family)[:1]
    accumulator = accumulate(model, samples, score, batch_size, layers)
    assert accumulator.num_samples == len(samples)
    assert list(accumulator.modules) == [mlp_of(family, k)[0][0] for k in range(2)]
    assert_agree(accumulator.compute(), naive_scores(model, samples, score, layers))


@all_scores
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_batches_are_exact_with_eager_and_sdpa_attention(make, score, implementation):
    model = make(attn_implementation=implementation)
    samples = make_samples()
    assert_agree(accumulate(model, samples, score, 3).compute(), naive_scores(model, samples, score))


LINEAR = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),  # c_proj in the attention and in the MLP
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("family", LINEAR)
@all_scores
def test_every_kind_of_linear_layer_can_be_scored(make, family, score):
    model = make(family)
    samples = make_samples(3)
    got = accumulate(model, samples, score, 2, layers=LINEAR[family]).compute()
    assert len(got) == {"gpt2": 4, "opt": 6, "llama": 7}[family] * model.config.num_hidden_layers
    assert_agree(got, naive_scores(model, samples, score, LINEAR[family]))
    assert list(find_layers(model, ["all"])) == list(got), "every one but the head"


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (["attn.c_proj"], ["attn.c_proj"]),
        (["mlp.c_proj", "c_attn"], ["attn.c_attn", "mlp.c_proj"]),
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["transformer.h.0.mlp.c_fc"], ["mlp.c_fc"]),
    ],
)
def test_a_layer_is_found_by_the_end_of_its_name_at_a_dot(make, layers, found):
    model = make("gpt2", num_hidden_layers=1)
    assert list(find_layers(model, layers)) == [f"transformer.h.0.{name}" for name in found]
    for wrong in ("proj", "tn.c_proj", ".c_proj", "h.1.attn.c_proj", ""):
        with pytest.raises(ValueError, match=rf"no linear layer '{wrong}'; it has \['c_attn', 'c_fc', 'c_proj', 'lm_"):
            find_layers(model, [*layers, wrong])


@all_scores
def test_a_bias_is_no_weight_and_does_not_count(make, score):
    model = make("llama", mlp_bias=True, attention_bias=True)
    assert model.model.layers[0].mlp.up_proj.bias.abs().min() > 0
    samples = make_samples(3)
    layers = ("up_proj", "v_proj")
    got = accumulate(model, samples, score, 3, layers=layers).compute()
    assert_agree(got, naive_scores(model, samples, score, layers))


@pytest.mark.parametrize("score", ["magnitude", "signed"])
def test_cp_lrp_is_streamed_too(make, score):
    model = make()
    samples = make_samples(3)
    got = accumulate(model, samples, score, 2, rule="cp_lrp").compute()
    assert_agree(got, naive_scores(model, samples, score, rule="cp_lrp"))


@all_scores
def test_the_order_of_the_samples_does_not_matter(make, score):
    model = make()
    samples = make_samples()
    forwards, backwards = (accumulate(model, order, score, 2).compute() for order in (samples, samples[::-1]))
    assert_agree(backwards, forwards)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
def test_padding_gets_no_gradient(make, family, rule):
    model = make(family)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_().register_hook(lambda G: seen.__setitem__(name, G))

        return hook

    modules = find_layers(model, [*kinds_of(family), "c_attn" if family == "gpt2" else "v_proj"])
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    batch = pad_right(make_samples(), PAD)
    mask = batch["attention_mask"]
    with lrp(model, rule):
        largest_logit(model, batch["input_ids"], mask).sum().backward()
    for handle in handles:
        handle.remove()
    assert seen.keys() == modules.keys()
    for G in seen.values():
        G = G.reshape(*mask.shape, -1)  # OPT's MLP gets the tokens of all samples as one row after the other
        assert G[mask == 0].numel() > 0
        assert G[mask == 0].abs().max() == 0
        assert G[mask == 1].abs().max() > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_target_is_the_largest_logit_at_the_last_token_that_is_not_padding(make, family):
    model = make(family)
    samples = make_samples()
    batch = pad_right(samples, PAD)
    got = largest_logit(model, batch["input_ids"], batch["attention_mask"]).tolist()
    expected = [model(torch.tensor([sample.input_ids])).logits[0, -1].max().item() for sample in samples]
    assert got == pytest.approx(expected, rel=1e-6)


@all_scores
def test_samples_of_weight_zero_weigh_nothing(make, score):
    model = make()
    samples = make_samples(4)
    accumulator = ScoreAccumulator(find_layers(model, ["up_proj"]), score)
    record(accumulator, model, samples, weights=[1, 0, 1, 0])
    assert accumulator.num_samples == 2
    assert_agree(accumulator.compute(), naive_scores(model, [samples[0], samples[2]], score))


# The accumulator on one linear layer, where relevance is set by hand.


def toy(score: Any, nonfinite: Any = "error") -> tuple[nn.Linear, ScoreAccumulator]:
    """Return a layer of 2 neurons, each with the weights 1 and 2, and its accumulator."""
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight[:] = torch.tensor([1.0, 2.0])
    return layer, ScoreAccumulator({"layer": layer}, score, nonfinite)


def play(layer: nn.Linear, accumulator: ScoreAccumulator, G_BO: list[list[float]], x: float = 1.0, **options: Any):
    """Record samples of one token with input ``x``, whose output has the gradient ``G_BO``."""
    ids = [f"row {i}" for i in range(len(G_BO))]
    inputs = torch.full((len(G_BO), 1, 2), x, dtype=torch.float64, requires_grad=True)
    with accumulator.recording(torch.ones(len(G_BO), 1), ids, **options):
        layer(inputs).backward(torch.tensor(G_BO, dtype=torch.float64).unsqueeze(1))


@pytest.mark.parametrize("in_one_batch", [True, False])
def test_the_magnitude_is_taken_per_sample_and_not_of_the_mean(in_one_batch):
    layer, accumulator = toy("magnitude")
    opposite = [[1.0, 3.0], [-1.0, 1.0]]
    for rows in [opposite] if in_one_batch else [[row] for row in opposite]:
        play(layer, accumulator, rows)
    # The magnitude of the mean would be 0 and 6.
    assert accumulator.compute()["layer"].tolist() == [3.0, 6.0]
    layer, accumulator = toy("absolute")
    play(layer, accumulator, opposite)
    assert accumulator.compute()["layer"].tolist() == [3.0, 6.0]
    layer, accumulator = toy("signed")
    play(layer, accumulator, opposite)
    assert accumulator.compute()["layer"].tolist() == [0.0, 6.0]


def test_scores_come_in_the_order_of_the_modules_in_float32_and_without_a_graph(make):
    model = make(num_hidden_layers=3)
    scores = accumulate(model, make_samples(2), "magnitude", 2).compute()
    assert list(scores) == [f"model.layers.{k}.mlp.up_proj" for k in range(3)]
    for score in scores.values():
        assert score.dtype == torch.float32
        assert score.shape == (24,)
        assert not score.requires_grad


@pytest.mark.parametrize("score", ["magnitude", "signed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_relevance_that_is_not_finite_is_an_error_that_names_module_and_sample_and_adds_nothing(score, value):
    layer, accumulator = toy(score)
    play(layer, accumulator, [[1.0, 1.0]])
    before = accumulator.compute()["layer"]
    with pytest.raises(NonfiniteRelevanceError, match=r"layer .*'row 1'.*--model.dtype.*--model.nonfinite zero"):
        play(layer, accumulator, [[5.0, 5.0], [1.0, value], [5.0, 5.0]])
    assert accumulator.num_samples == 1
    assert accumulator.num_nonfinite == 0
    assert torch.equal(accumulator.compute()["layer"], before)


def test_an_activation_that_is_not_finite_is_an_error_for_wanda_too():
    layer, accumulator = toy("wanda")
    with pytest.raises(NonfiniteRelevanceError, match="'row 0'"):
        play(layer, accumulator, [[1.0, 1.0]], x=float("inf"))
    assert accumulator.num_samples == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_with_nonfinite_zero_a_value_is_replaced_by_zero_and_counted(value):
    layer, accumulator = toy("signed", "zero")
    play(layer, accumulator, [[1.0, 1.0], [1.0, value]])
    play(layer, accumulator, [[2.0, value]])
    assert accumulator.num_nonfinite == 2
    assert accumulator.num_samples == 3
    assert accumulator.compute()["layer"].tolist() == [3 * 4 / 3, 3 * 1 / 3]


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
def test_a_sample_of_weight_zero_may_be_anything(nonfinite):
    layer, accumulator = toy("magnitude", nonfinite)
    nan = float("nan")
    play(layer, accumulator, [[1.0, 2.0], [nan, nan]], weights=[1, 0])
    assert accumulator.num_nonfinite == 0
    assert accumulator.compute()["layer"].tolist() == [3.0, 6.0]


def test_values_of_samples_of_weight_zero_are_not_counted_beside_others_that_are():
    layer, accumulator = toy("signed", "zero")
    nan = float("nan")
    play(layer, accumulator, [[1.0, 2.0], [nan, nan], [nan, 2.0]], weights=[1, 0, 1])
    assert accumulator.num_nonfinite == 1
    assert accumulator.compute()["layer"].tolist() == [3 * 1 / 2, 3 * 4 / 2]


def test_scores_without_a_sample_are_an_error():
    layer, accumulator = toy("magnitude")
    with pytest.raises(ValueError, match="No sample"):
        accumulator.compute()
    play(layer, accumulator, [[1.0, 1.0]], weights=[0])
    with pytest.raises(ValueError, match="No sample"):
        accumulator.compute()


def test_a_layer_that_no_gradient_reaches_is_an_error_that_names_it(make):
    model = make()
    with pytest.raises(ValueError, match=r"2 module.*model\.layers\.0\.mlp\.gate_proj.* --model\.layers '\[up_proj\]'"):
        accumulate(model, make_samples(2), "magnitude", 2, layers=("up_proj", "gate_proj"), rule="cp_lrp")


def test_an_exception_while_recording_adds_nothing_and_leaves_no_hook():
    layer, accumulator = toy("magnitude")
    with pytest.raises(ZeroDivisionError), accumulator.recording(torch.ones(1, 1), ["row 0"]):  # noqa: PT012
        layer(torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)).sum().backward()
        _ = 1 / 0
    assert not layer._forward_hooks
    assert accumulator.num_samples == 0
    assert not accumulator.sums
    play(layer, accumulator, [[1.0, 1.0]])
    assert not layer._forward_hooks
    assert accumulator.compute()["layer"].tolist() == [3.0, 3.0]
