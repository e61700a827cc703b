"""Heads: their relevance, masks and pruning, against one head, one token and one number at a time."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import evaluation, flat, perplexity_of, run, save_neurons, write_inputs
from helpers import FAMILIES, fail_if_masked, mlp_of, sentence, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, OpenAIGPTConfig
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.cli import main
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.variants import list_variants, neurons_of
from sparc3_lightning.models.architectures import find_layers, head_layers, is_heads, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, check, mask, prune_
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.heads import head_dims, head_norms, mask_heads, num_heads, prune_heads_
from sparc3_lightning.models.sharding import load_sharded
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import SCORES, Attribution

O_PROJ = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
# The attention of a block, and its last layer, where they are called otherwise than in LLaMA.
ATTENTIONS = {"gpt2": ("transformer.h.{}.attn", "c_proj"), "opt": ("model.decoder.layers.{}.self_attn", "out_proj")}
HEADS = ({1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})  # of 4 heads in each layer, two to a value head where heads share them
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
D = 4  # dimensions of a head
FORMS = ("magnitude", "signed", "absolute", "squared", "wanda")
# Every family, and a LLaMA whose attention has biases.
MODELS: list[dict[str, Any]] = [{"family": family} for family in sorted(FAMILIES)]
MODELS += [{"family": "llama", "attention_bias": True}]
all_models = pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))


def layers_of(family: str) -> list[str]:
    """Return the names of the last layers of both attentions."""
    attention, output = ATTENTIONS.get(family, ("model.layers.{}.self_attn", "o_proj"))
    return [f"{attention.format(block)}.{output}" for block in range(2)]


def off_in(family: str) -> dict[str, dict[int, float]]:
    """Return the heads that are off in most tests."""
    return dict(zip(layers_of(family), HEADS, strict=True))


def as_neurons(family: str) -> list[Component]:
    return [
        Component(name, index, 0.0, granularity="head") for name, indices in off_in(family).items() for index in indices
    ]


def weight_at(model: Any, name: str) -> Tensor:
    return weight_of(model.get_submodule(name))


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
    modules = {name: model.get_submodule(name) for name in layers_of(model.config.model_type)}
    accumulator = ScoreAccumulator(modules, form, granularity="head", head_dims=head_dims(model, modules))
    for part in (samples[:2], samples[2:]):
        batch = pad_right(part, 0)
        mask_BT = batch["attention_mask"] if batch["is_padded"] else None
        with lrp(model), accumulator.recording(mask_BT, batch["sample_ids"]):
            target = largest_logit(model, batch["input_ids"], mask_BT).sum()
            if form != "wanda":
                target.backward()
    return accumulator.compute()


def oracle(model: Any, samples: list[Sample], form: str) -> dict[str, Tensor]:
    """One sample at a time, with the gradients of the layer's input and its weight, and loops over heads and tokens."""
    layers = layers_of(model.config.model_type)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in layers}
    squares = {name: torch.zeros(16, dtype=torch.float64) for name in layers}
    for sample in samples:
        inputs: list[Tensor] = []

        def keep(module: Any, args: tuple[Tensor], inputs: list[Tensor] = inputs) -> tuple[Tensor]:
            inputs.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
            inputs[-1].retain_grad()
            return (inputs[-1],)

        handles = [model.get_submodule(name).register_forward_pre_hook(keep) for name in layers]
        for name in layers:
            model.get_submodule(name).weight.requires_grad_().grad = None
        with lrp(model):
            model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max().backward()
        for handle in handles:
            handle.remove()
        for name, Z_BTI in zip(layers, inputs, strict=True):
            parameter, Z_TI = model.get_submodule(name).weight, Z_BTI[0]
            of_input = (Z_TI * Z_BTI.grad[0]).detach()
            R = (parameter * parameter.grad).detach()
            of_weight = R.T if isinstance(model.get_submodule(name), Conv1D) else R
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
            parameter.requires_grad_(False)
    if form != "wanda":
        return {name: total / len(samples) for name, total in sums.items()}
    score = {name: weight_at(model, name).abs() * squares[name].sqrt() for name in layers}
    return {name: torch.stack([score[name][:, D * h : D * h + D].sum() for h in range(4)]) for name in layers}


# Relevance.


@pytest.mark.parametrize("form", FORMS)
@all_models
@pytest.mark.few(10)
def test_scores_of_heads_are_those_of_one_sample_head_and_token_at_a_time(make_model, samples, options, form):
    model = make_model(**options)
    found, expected = accumulated(model, samples, form), oracle(model, samples, form)
    for name in layers_of(options["family"]):
        assert found[name].shape == (4,)
        torch.testing.assert_close(found[name], expected[name].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", *ATTENTIONS])
def test_the_signed_relevance_of_a_head_is_the_sum_over_its_weights(make_model, samples, family):
    model = make_model(family)
    modules = {name: model.get_submodule(name) for name in layers_of(family)}
    of_weights = ScoreAccumulator(modules, "signed", granularity="weight")
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with lrp(model), of_weights.recording(None, [sample.id]):
            largest_logit(model, ids).sum().backward()
    found = accumulated(model, samples, "signed")
    for name, R_OI in of_weights.compute().items():
        torch.testing.assert_close(found[name], R_OI.view(-1, 4, D).sum(dim=(0, 2)), rtol=1e-5, atol=1e-6)


@all_models
def test_the_layers_of_heads_are_the_last_ones_of_the_attentions(make_model, options):
    model, layers = make_model(**options), layers_of(options["family"])
    assert [name for name, _ in model.named_modules() if is_heads(name)] == layers
    (kind,) = head_layers(model)
    assert list(find_layers(model, [kind])) == layers
    assert head_dims(model, layers) == dict.fromkeys(layers, D)
    assert [num_heads(model, name) for name in layers] == [4, 4]


@pytest.mark.parametrize("target", ["up_proj", "c_proj", "mlp.c_proj", "all", "proj"])
def test_a_layer_that_is_the_last_one_of_no_attention_has_no_heads(make_model, target):
    expected = rf"--model\.granularity head .*\['o_proj', 'out_proj', .*'attn\.c_proj', .*\], .*, got \['{target}'\]"
    with pytest.raises(ValueError, match=expected):
        Attribution("tiny", granularity="head", layers=[target])
    with pytest.raises(ValueError, match=expected):
        ScoreAccumulator({target: make_model().model.layers[0].mlp.up_proj}, "signed", granularity="head")


@pytest.mark.parametrize(("family", "wrong"), [("gpt2", "o_proj"), ("opt", "attn.c_proj"), ("llama", "out_proj")])
def test_the_heads_of_another_family_are_refused_with_the_names_there_are(make_model, family, wrong):
    model = make_model(family)
    (kind,) = head_layers(model)
    with pytest.raises(ValueError, match=rf"--model\.layers: '{wrong}' is no layer .* which has \['{kind}'\]: leave"):
        head_layers(model, [kind, wrong])
    with pytest.raises(ValueError, match=r"not a layer of attention heads of this model: expected .*o_proj beside v_"):
        head_dims(model, [f"{layers_of(family)[0].rpartition('.')[0]}.{wrong}"])
    assert head_layers(model, layers_of(family)) == layers_of(family)


def test_an_attention_without_a_number_of_dimensions_has_no_heads_and_says_what_there_is():
    """The names of GPT-2."""
    config, linear = OpenAIGPTConfig(n_embd=16, n_head=4, n_layer=1), "'c_attn', 'c_fc', 'c_proj', 'lm_head'"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"The model has no attention .*{linear}.*: score its neurons, with --model"):
        head_layers(model)
    (output,) = (name for name, _ in model.named_modules() if is_heads(name))
    with pytest.raises(ValueError, match="not a layer of attention heads"):
        check(model, [Component(output, 0, 0.0, granularity="head")])


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "lrp"), ("llama", "wanda"), ("opt", "lrp"), ("gpt2", "wanda")]
)
def test_attribute_writes_scores_of_all_heads_by_default(make_checkpoint, tmp_path: Path, family, method):
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(sentence(i, 20) for i in range(4)) + "\n")
    model = Attribution(make_checkpoint(family), method=method, granularity="head")
    trainer().predict(model, datamodule=C4(str(path), num_samples=3, seq_len=12), return_predictions=False)
    found = ScoreFile.load(Path("out") / SCORES)
    assert found.provenance.spec.granularity == "head"
    assert found.provenance.spec.layers == [{"gpt2": "attn.c_proj", "opt": "out_proj"}.get(family, "o_proj")]
    assert {name: len(score) for name, score in found.scores.items()} == dict.fromkeys(layers_of(family), 4)
    assert all((score > 0).all() for score in found.scores.values())


# Masking and pruning.


def by_hand(model: Any, heads: dict[str, dict[int, float]], damping: float = 1.0) -> Any:
    """Return a copy in which the columns of each head are smaller."""
    other = copy.deepcopy(model)
    for name, dampings in heads.items():
        for h, of_head in dampings.items():
            weight_at(other, name)[:, D * h : D * h + D] *= 1 - damping * of_head
    return other


@all_models
@pytest.mark.parametrize("damping", [0.25, 1.0])
def test_a_mask_makes_the_columns_of_a_head_smaller_by_its_strength(make_model, options, damping):
    model, heads = make_model(**options), off_in(options["family"])
    before = logits(model)
    with mask_heads(model, heads, damping):
        found = logits(model)
    torch.testing.assert_close(found, logits(by_hand(model, heads, damping)), rtol=1e-9, atol=1e-9)
    assert (found - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)


def test_each_head_has_a_strength_of_its_own_in_a_mask_and_in_the_weights(make_model):
    model, heads = make_model(), {O_PROJ[0]: {0: 1.0, 3: 0.25}, O_PROJ[1]: {1: 0.5, 2: 1.0}}
    damped = [
        Component(name, h, 0.0, damping=s, granularity="head") for name, of in heads.items() for h, s in of.items()
    ]
    half, expected = logits(by_hand(model, heads, 0.5)), logits(by_hand(model, heads))
    with mask(model, damped, 0.5):
        torch.testing.assert_close(logits(model), half, rtol=1e-9, atol=1e-9)
    before = weights(model)
    prune_(model, damped)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    values = [name for name in before if "v_proj" in name]  # each is needed by a head that is not off
    assert all(torch.equal(weights(model)[name], before[name]) for name in values)


def test_a_head_has_no_constant(make_model):
    for use in (fail_if_masked, prune_, check):
        with pytest.raises(ValueError, match=r"Head 1 of .* has a constant"):
            use(make_model(), [Component(O_PROJ[0], 1, 0.0, mean=0.5, granularity="head")])


@all_models
def test_pruned_heads_are_masked_heads(make_model, options):
    model, heads = make_model(**options), as_neurons(options["family"])
    with mask(model, heads):
        masked = logits(model)
    prune_(model, heads)
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


@all_models
def test_the_rows_of_a_value_head_are_zero_only_where_no_head_needs_them(make_model, options):
    model, expected, family = make_model(**options), make_model(**options), options["family"]
    before = weights(model)
    prune_heads_(model, off_in(family))
    sharing = 4 // getattr(expected.config, "num_key_value_heads", 4)
    values, first = ("c_attn", 32) if family == "gpt2" else ("v_proj", 0)  # after the queries and the keys
    for name, off in off_in(family).items():
        layer = f"{name.rpartition('.')[0]}.{values}"
        for h in range(4):
            if h in off:
                weight_at(expected, name)[:, D * h : D * h + D] = 0
            others = range(h - h % sharing, h - h % sharing + sharing)  # the heads of the same value head
            if all(other in off for other in others):
                rows = slice(first + D * (h // sharing), first + D * (h // sharing + 1))
                weight_at(expected, layer)[rows] = 0
                if expected.get_submodule(layer).bias is not None:
                    expected.get_submodule(layer).bias[rows] = 0
    found = weights(model)
    assert sum(not torch.equal(value, before[name]) for name, value in found.items()) > 2, "values of a layer too"
    assert all(torch.equal(value, found[name]) for name, value in weights(expected).items())


@pytest.mark.parametrize("family", ["llama", *ATTENTIONS])
def test_neurons_and_heads_can_be_off_together(make_model, family):
    model = make_model(family)
    both = [*as_neurons(family), Component(mlp_of(family, 0)[0][0], 3, 0.0)]
    check(model, both)
    with mask(model, both):
        masked = logits(model)
    with mask(model, both[-1:]), mask_heads(model, off_in(family)):
        assert torch.equal(logits(model), masked)
    prune_(model, both)
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Component(O_PROJ[1], 4, 0.0, granularity="head"), "Head 4 of .* the layer has 4 heads"),
        (Component(O_PROJ[1], -1, 0.0, granularity="head"), "Head -1 of "),
        (Component("model.layers.2.self_attn.o_proj", 0, 0.0, granularity="head"), "not a layer of attention heads"),
        (Component("o_proj", 0, 0.0, granularity="head"), "not a layer of attention heads"),
        (Component("model.layers.0.mlp.up_proj", 24, 0.0), "24 neurons"),
    ],
)
def test_a_head_that_is_not_there_is_refused_and_nothing_is_changed(make_model, use: Callable, bad, complaint):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=complaint):
        use(model, [*as_neurons("llama"), bad])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# As controls of an evaluation.


@pytest.mark.parametrize("family", ["llama", *ATTENTIONS])
def test_the_norm_of_a_head_is_that_of_its_columns_sharded_or_not(make_checkpoint, family):
    model, name = load_model(make_checkpoint(family), torch.float32), layers_of(family)[0]
    expected = torch.stack([weight_at(model, name)[:, D * h : D * h + D].norm() for h in range(4)])
    torch.testing.assert_close(head_norms(model, name), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = load_sharded(Checkpoint(make_checkpoint(family)), torch.float32, mesh, torch.device("cpu"))
    torch.testing.assert_close(head_norms(sharded, name), expected)
    assert num_heads(sharded, name) == 4
    with mask_heads(model, off_in(family)), mask_heads(sharded, off_in(family)):
        torch.testing.assert_close(logits(sharded), logits(model))


@pytest.mark.parametrize("family", ["llama", *ATTENTIONS])
def test_controls_of_heads_are_heads(make_model, family):
    model, layers = make_model(family), layers_of(family)
    pruned = NeuronList(
        [Component(layers[0], 1, -1.0, granularity="head"), Component(layers[1], 2, -1.0, granularity="head")]
    )
    variants = list_variants({"": pruned}, 1, controls=Controls(3))
    lists = neurons_of(variants, {"": pruned}, model, seed=0)
    controls = [variant for variant in variants if variant.kind in ("random", "largest_weights")]
    assert len(controls) == 6
    for variant in controls:
        check(model, lists[variant.name])
        assert [neuron.module for neuron in lists[variant.name]] == layers
        assert not {(n.module, n.index) for n in lists[variant.name]} & {(n.module, n.index) for n in pruned.neurons}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluate_switches_heads_off_as_the_exported_checkpoint_is_without_them(
    make_checkpoint, tmp_path, monkeypatch, family
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    write_inputs(tmp_path)
    checkpoint, heads = make_checkpoint(family), as_neurons(family)
    path = save_neurons(checkpoint, heads, {"sample_ids": []})
    both = run(evaluation(checkpoint, path, controls=Controls(1)), folder="both")
    export_pruned(Checkpoint(checkpoint), heads, Path("pruned"), dtype=torch.float32)
    alone = run(evaluation("pruned"), folder="alone")
    del both["pruned"]["kl"], alone["baseline"]["kl"]  # of the model as it is there is none
    assert flat(alone["baseline"]) == pytest.approx(flat(both["pruned"]), rel=1e-5)
    assert perplexity_of(both, "pruned") != pytest.approx(perplexity_of(both, "baseline"), rel=1e-3)
    assert (Path("both") / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ATTENTIONS)
def test_from_the_command_line_heads_are_scored_pruned_and_exported(make_checkpoint, monkeypatch, family):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    scores = []
    for kind in range(2):
        path = Path(f"{kind}.txt").absolute()
        path.write_text("\n".join(sentence(10 * kind + i, 20) for i in range(4)) + "\n")
        data = ["--data", "C4", "--data.source", str(path), "--data.num_samples", "3", "--data.seq_len", "12"]
        options = ["--model.checkpoint", make_checkpoint(family), "--model.granularity", "head"]
        scores.append(Path(main(["attribute", *quiet, *options, *data]).trainer.log_dir) / SCORES)
    options = ["--model.general", f"[{scores[0]}]", "--model.behavior", str(scores[1]), "--model.num_neurons", "3"]
    options += ["--model.min_differential_strength", "-1000", "--model.export", "pruned"]
    neurons = Path(main(["prune", *quiet, *options]).trainer.log_dir) / "neurons.json"
    chosen = NeuronList.load(neurons).neurons
    assert {neuron.module for neuron in chosen} <= {*layers_of(family)}
    model, exported = (load_model(folder, torch.float32) for folder in (make_checkpoint(family), "pruned"))
    before = logits(model)
    with mask(model, chosen):
        torch.testing.assert_close(logits(exported), logits(model), rtol=1e-5, atol=1e-6)
    assert (logits(exported) - before).abs().max() > 1e-3
