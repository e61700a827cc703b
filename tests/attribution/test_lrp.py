import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import mlp_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.models.architectures import FAMILIES

EPS = 1e-10  # of the identity rule
RULES = ["attnlrp", "cp_lrp"]
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
# Two kinds of layer, and a window that is shorter than the input.
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}

# OPT as its model of 350 million has it: norms after the sum, and narrow embeddings.
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 8}

all_families = pytest.mark.parametrize("family", sorted(FAMILIES))
all_rules = pytest.mark.parametrize("rule", RULES)


class _Float64(TorchFunctionMode):
    """Puts float64 in place of float32, to which norms, rotations and softmax cast whatever the dtype of the model."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Compute all of a float64 model in float64, so that an oracle can be met to more than six digits."""
    with _Float64():
        yield


@pytest.fixture
def make(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of tiny models as ``make_model``, Gemma3 with both kinds of attention layer."""

    def make(family: str = "llama", **changes: Any) -> Any:
        return make_model(family, **{**(GEMMA3 if family == "gemma3_text" else {}), **changes})

    return make


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights of all linear layers but the head, by name."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and m is not head]
    return {f"{name}.weight": module.weight for name, module in modules}


def positions_of(model: Any) -> nn.Embedding | None:
    """Return the learned positions, if there are any."""
    of = {"gpt2": "transformer.wpe", "opt": "model.decoder.embed_positions"}
    return model.get_submodule(of[model.config.model_type]) if model.config.model_type in of else None


def gradients(model: Any, input_ids: Tensor = INPUT_IDS) -> dict[str, Tensor]:
    """Return the target logit, and its gradient for the embeddings and for the weight of every linear layer."""
    leaves: dict[str, Any] = linear_weights(model)
    positions = positions_of(model)
    if positions is not None:
        leaves["positions"] = positions.weight
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    for leaf in leaves.values():
        leaf.requires_grad_()
    target = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].max(dim=-1).values.sum()
    found = torch.autograd.grad(target, [embeddings, *leaves.values()], allow_unused=True)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    parts = {"embeddings": embeddings.detach(), "logit": target.detach()}
    for name, leaf, gradient in zip(["d embeddings", *leaves], [embeddings, *leaves.values()], found, strict=True):
        parts[name] = torch.zeros_like(leaf) if gradient is None else gradient
    if positions is not None:
        parts["positions"] = positions.weight.detach() * parts["positions"]
    return parts


def input_relevance(parts: dict[str, Tensor]) -> float:
    """Sum gradient times input over the embeddings, of the tokens and of the positions."""
    positions = parts["positions"].sum().item() if "positions" in parts else 0
    return (parts["embeddings"] * parts["d embeddings"]).sum().item() + positions


def zero_biases_(model: Any) -> None:
    """Set every bias to zero: a bias keeps the relevance that falls on it."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()


def logits(model: Any) -> Tensor:
    """Return all logits, without a graph."""
    with torch.no_grad():
        return model(INPUT_IDS).logits


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Compare dictionaries of tensors by the norm of the difference; ``rtol`` 0 asks for the same bits."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        difference = (value - expected[name]).norm().item()
        assert difference <= rtol * expected[name].norm().item(), f"{name}: {difference}"


# A second implementation of the models and the rules: one sample, one head, one position at a time.


def _identity(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return x * (function(x) / (x + EPS)).detach()


def _half(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def _rotate(x_TD: Tensor, theta: float) -> Tensor:
    size = x_TD.shape[1] // 2
    rows = []
    for t, row in enumerate(x_TD):
        angle = torch.tensor([t * theta ** (-i / size) for i in range(size)], dtype=torch.float64)
        first, second = row[:size], row[size:]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        rows.append(torch.cat(turned))
    return torch.stack(rows)


class SlowModel:
    """The models of all families written out, with detached factors in place of the rules."""

    def __init__(self, model: Any, attention_rule: str, mlp_rule: str) -> None:
        self.config = model.config
        self.family = model.config.model_type
        self.attention_rule = attention_rule
        self.mlp_rule = mlp_rule
        self.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.parameters["lm_head.weight"] = model.get_output_embeddings().weight.detach()
        self.leaves = {name: self.parameters[name].requires_grad_() for name in linear_weights(model)}
        self.transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self.is_gemma3 = self.family == "gemma3_text"
        positions = positions_of(model)
        first = 2 if self.family == "opt" else 0
        self.positions = None if positions is None else positions.weight.detach()[first:]

    def gradients(self, embeddings: Tensor) -> dict[str, Tensor]:
        leaf = embeddings[0].clone().requires_grad_()
        target = self.linear("lm_head", self.hidden(leaf)[-1]).max()
        found = torch.autograd.grad(target, [leaf, *self.leaves.values()], allow_unused=True)
        parts = {"embeddings": embeddings, "logit": target.detach()}
        parts["d embeddings"] = found[0].unsqueeze(0)
        for (name, weight), gradient in zip(self.leaves.items(), found[1:], strict=True):
            parts[name] = torch.zeros_like(weight) if gradient is None else gradient
        return parts

    def hidden(self, x: Tensor) -> Tensor:
        if self.family == "gpt2":
            return self.hidden_gpt2(x)
        if self.family == "opt":
            return self.hidden_opt(x)
        for k in range(self.config.num_hidden_layers):
            block = f"model.layers.{k}"
            after = self.attention(k, self.norm(f"{block}.input_layernorm", x))
            if self.is_gemma3:
                x = x + self.norm(f"{block}.post_attention_layernorm", after)
                after = self.mlp(f"{block}.mlp", self.norm(f"{block}.pre_feedforward_layernorm", x))
                x = x + self.norm(f"{block}.post_feedforward_layernorm", after)
            else:
                x = x + after
                x = x + self.mlp(f"{block}.mlp", self.norm(f"{block}.post_attention_layernorm", x))
        return self.norm("model.norm", x)

    def hidden_gpt2(self, x: Tensor) -> Tensor:
        x = x + self.positions[: len(x)]
        size = self.config.n_embd // self.config.n_head
        act = lambda z: nn.functional.gelu(z, approximate="tanh")  # noqa: E731
        for k in range(self.config.n_layer):
            block = f"transformer.h.{k}"
            fused = self.linear(f"{block}.attn.c_attn", self.layer_norm(f"{block}.ln_1", x))
            Q, K, V = (part.split(size, dim=1) for part in fused.split(self.config.n_embd, dim=1))
            heads = [self.head(*qkv, size**-0.5) for qkv in zip(Q, K, V, strict=True)]
            x = x + self.linear(f"{block}.attn.c_proj", torch.cat(heads, dim=1))
            inner = _identity(act, self.linear(f"{block}.mlp.c_fc", self.layer_norm(f"{block}.ln_2", x)))
            x = x + self.linear(f"{block}.mlp.c_proj", inner)
        return self.layer_norm("transformer.ln_f", x)

    def hidden_opt(self, x: Tensor) -> Tensor:
        is_narrow = self.config.word_embed_proj_dim != self.config.hidden_size
        first = self.config.do_layer_norm_before
        x = (self.linear("model.decoder.project_in", x) if is_narrow else x) + self.positions[: len(x)]
        size = self.config.hidden_size // self.config.num_attention_heads
        for k in range(self.config.num_hidden_layers):
            block = f"model.decoder.layers.{k}"
            normed = self.layer_norm(f"{block}.self_attn_layer_norm", x) if first else x
            Q, K, V = (self.linear(f"{block}.self_attn.{part}_proj", normed).split(size, dim=1) for part in "qkv")
            heads = [self.head(*qkv, size**-0.5) for qkv in zip(Q, K, V, strict=True)]
            x = x + self.linear(f"{block}.self_attn.out_proj", torch.cat(heads, dim=1))
            x = x if first else self.layer_norm(f"{block}.self_attn_layer_norm", x)
            normed = self.layer_norm(f"{block}.final_layer_norm", x) if first else x
            x = x + self.linear(f"{block}.fc2", _identity(torch.relu, self.linear(f"{block}.fc1", normed)))
            x = x if first else self.layer_norm(f"{block}.final_layer_norm", x)
        x = self.layer_norm("model.decoder.final_layer_norm", x) if first else x
        return self.linear("model.decoder.project_out", x) if is_narrow else x

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        y = x @ (weight if name in self.transposed else weight.T)
        bias = self.parameters.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.parameters[f"{name}.weight"] + (1 if self.is_gemma3 else 0)
        size = ((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + self.config.rms_norm_eps).sqrt()
        return x * (1 / size).detach() * gain

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.sum(dim=-1, keepdim=True) / x.shape[-1]
        size = ((centred * centred).sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt()
        return centred * (1 / size).detach() * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        act = (lambda g: nn.functional.gelu(g, approximate="tanh")) if self.is_gemma3 else nn.functional.silu
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        inner = _half(_identity(act, gate) * up) if self.mlp_rule == "attnlrp" else act(gate).detach() * up
        return self.linear(f"{name}.down_proj", inner)

    def attention(self, k: int, x: Tensor) -> Tensor:
        name = f"model.layers.{k}.self_attn"
        size = self.parameters[f"{name}.q_proj.weight"].shape[0] // self.config.num_attention_heads
        sharing = self.config.num_attention_heads // self.config.num_key_value_heads
        kind = self.config.layer_types[k] if self.is_gemma3 else None
        rope = self.config.rope_parameters[kind] if self.is_gemma3 else self.config.rope_parameters
        window = self.config.sliding_window if kind == "sliding_attention" else len(x)
        scale = (self.config.query_pre_attn_scalar if self.is_gemma3 else size) ** -0.5
        Q, K, V = (self.linear(f"{name}.{part}_proj", x).split(size, dim=1) for part in "qkv")
        outputs = []
        for head in range(self.config.num_attention_heads):
            q, key = Q[head], K[head // sharing]
            if self.family in ("gemma3_text", "qwen3"):
                q, key = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", key)
            q, key = _rotate(q, rope["rope_theta"]), _rotate(key, rope["rope_theta"])
            outputs.append(self.head(q, key, V[head // sharing], scale, window))
        return self.linear(f"{name}.o_proj", torch.cat(outputs, dim=1))

    def head(self, q: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
        rows = []
        for t in range(len(q)):
            seen = slice(max(0, t - (window or len(q)) + 1), t + 1)
            scores = scale * (key[seen] @ q[t])
            if self.attention_rule == "attnlrp":
                rows.append(_half(torch.softmax(_half(scores), dim=0) @ value[seen]))
            else:
                rows.append(torch.softmax(scores, dim=0).detach() @ value[seen])
        return torch.stack(rows)


def slow(parts: dict[str, Tensor], *of: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what both implementations tell, of the model and of the slow one: all but the relevance of positions."""
    found = {name: value for name, value in parts.items() if name != "positions"}
    return found, SlowModel(*of).gradients(parts["embeddings"])


@all_families
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_those_of_a_model_written_out_with_detached_factors(make, family, rule):
    model = make(family)
    with lrp(model, rule):
        got = gradients(model)
    assert_same(*slow(got, model, rule, rule), rtol=1e-8)


@all_rules
@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_right_with_norms_after_the_sum_and_narrow_embeddings(make, rule):
    model = make("opt", **OPT_350M)
    with lrp(model, rule):
        got = gradients(model)
    assert_same(*slow(got, model, rule, rule), rtol=1e-8)


@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_right_with_biases_everywhere(make):
    model = make("llama", attention_bias=True, mlp_bias=True)
    with lrp(model):
        got = gradients(model)
    assert_same(*slow(got, model, "attnlrp", "attnlrp"), rtol=1e-8)


@all_families
@all_rules
def test_the_rules_change_the_gradient(make, family, rule):
    model = make(family)
    before = gradients(model)
    with lrp(model, rule):
        inside = gradients(model)
    for name in linear_weights(model):
        assert (inside[name] - before[name]).norm() > 0.01 * before[name].norm(), name


@all_families
@pytest.mark.usefixtures("in_float64")
def test_cp_lrp_puts_nothing_on_what_decides_where_to_look_and_what_to_let_through(make, family):
    model = make(family)
    with lrp(model, "cp_lrp"):
        parts = gradients(model)
    for name in linear_weights(model):
        if name.endswith("c_attn.weight"):  # queries, keys and values in one
            assert not parts[name][:, : 2 * 16].any()
            assert parts[name][:, 2 * 16 :].any()
            continue
        is_bypassed = name.split(".")[-2] in ("q_proj", "k_proj", "gate_proj")
        assert (parts[name].abs().sum().item() == 0) == is_bypassed, name


@all_families
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("in_float64")
def test_cp_lrp_conserves_the_target_logit(make, family, seed):
    model = make(family, seed=seed)
    zero_biases_(model)
    with lrp(model, "cp_lrp"):
        parts = gradients(model)
    assert input_relevance(parts) == pytest.approx(parts["logit"].item(), rel=1e-6)


@all_families
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("in_float64")
def test_attnlrp_with_the_cp_rule_on_attention_conserves_the_target_logit(make, family, seed, monkeypatch):
    from lxt.efficient import patches

    monkeypatch.setattr(patches, "wrap_attention_forward", patches.cp_wrap_attention_forward)
    model = make(family, seed=seed)
    zero_biases_(model)
    with lrp(model, "attnlrp"):
        parts = gradients(model)
    assert input_relevance(parts) == pytest.approx(parts["logit"].item(), rel=1e-6)
    assert_same(*slow(parts, model, "cp_lrp", "attnlrp"), rtol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "llama", "attention_bias": True, "mlp_bias": True},
        {"family": "gpt2"},
        {"family": "opt"},
        {"family": "opt", **OPT_350M},
    ],
)
@pytest.mark.usefixtures("in_float64")
def test_biases_and_positions_keep_the_relevance_that_the_input_lacks(make, options):
    model = make(**options)
    biases = [parameter.requires_grad_() for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if positions_of(model) is not None:
        biases.append(positions_of(model).weight.requires_grad_())
    embeddings = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    with lrp(model, "cp_lrp"):
        target = model(inputs_embeds=embeddings).logits[0, -1].max()
        target.backward()
    on_input = (embeddings * embeddings.grad).sum().item()
    on_biases = sum((bias * bias.grad).sum().item() for bias in biases if bias.grad is not None)
    assert abs(on_biases) > 1e-3 * abs(target.item())
    assert on_input + on_biases == pytest.approx(target.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_attnlrp_keeps_a_part_of_the_target_logit(make, seed):
    model = make(seed=seed)
    with lrp(model, "attnlrp"):
        parts = gradients(model)
    assert 0.3 < input_relevance(parts) / parts["logit"].item() < 0.95


def _relevance_at(model: Any, rule: str, parts: list[str]) -> dict[str, Tensor]:
    """Return gradient times value at outputs ('up_proj') and inputs ('>down_proj') of layers, for every block."""
    kept: dict[str, Tensor] = {}

    def keep(key: str, value: Tensor) -> None:
        value.retain_grad()
        kept[key] = value

    handles = []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in parts:
            handles.append(module.register_forward_hook(lambda m, i, out, key=name: keep(key, out)))
        if f">{kind}" in parts:
            key = f"{name.removesuffix(kind)}>{kind}"
            handles.append(module.register_forward_pre_hook(lambda m, inputs, key=key: keep(key, inputs[0])))
    embeddings = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    with lrp(model, rule):
        model(inputs_embeds=embeddings).logits[0, -1].max().backward()
    for handle in handles:
        handle.remove()
    return {key: (value * value.grad).detach() for key, value in kept.items() if value.grad is not None}


@pytest.mark.parametrize("family", sorted(name for name, of in FAMILIES.items() if of.gated_mlp))
@pytest.mark.usefixtures("in_float64")
def test_a_gated_mlp_gives_half_of_each_neurons_relevance_to_up_proj_and_half_to_gate_proj(make, family):
    model = make(family)
    relevance = _relevance_at(model, "attnlrp", ["up_proj", "gate_proj", ">down_proj"])
    assert len(relevance) == 3 * model.config.num_hidden_layers
    for k in range(model.config.num_hidden_layers):
        up, gate, down = (relevance[f"model.layers.{k}.mlp.{part}"] for part in ("up_proj", "gate_proj", ">down_proj"))
        assert down.abs().max() > 0
        torch.testing.assert_close(up, down / 2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gate, down / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_a_plain_mlp_gives_all_of_each_neurons_relevance_to_its_row(make, family, rule):
    model = make(family)
    ((row, *_), column) = mlp_of(family, 0)
    relevance = _relevance_at(model, rule, [row.rpartition(".")[2], f">{column.rpartition('.')[2]}"])
    for k in range(model.config.num_hidden_layers):
        (row,), column = mlp_of(family, k)
        parent, _, name = column.rpartition(".")
        after = relevance[f"{parent}.>{name}"].reshape(relevance[row].shape)
        assert after.abs().max() > 0
        torch.testing.assert_close(relevance[row], after, rtol=1e-6, atol=1e-12)


@all_families
@pytest.mark.parametrize(("rule", "share"), [("attnlrp", 0.5), ("cp_lrp", 1.0)])
@pytest.mark.usefixtures("in_float64")
def test_attention_gives_its_share_of_the_relevance_to_the_values(make, family, rule, share):
    model = make(family)
    inputs, outputs = {"gpt2": ("c_attn", "c_proj"), "opt": ("v_proj", "out_proj")}.get(family, ("v_proj", "o_proj"))
    relevance = _relevance_at(model, rule, [inputs, f">{outputs}"])
    attentions = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    assert len(attentions) == model.config.num_hidden_layers
    for name in attentions:
        values = relevance[f"{name}.{inputs}"]
        if family == "gpt2":  # queries, keys and values in one
            values = values[..., 2 * 16 :]
        assert values.sum().item() == pytest.approx(share * relevance[f"{name}.>{outputs}"].sum().item(), rel=1e-9)


@all_families
@all_rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_the_same_with_and_without_the_rules(make, family, rule, dtype, implementation):
    model = make(family, dtype=dtype, attn_implementation=implementation)
    before = logits(model)
    with lrp(model, rule):
        inside = logits(model)
    assert before.dtype == dtype
    assert torch.equal(inside, before)


@all_families
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_are_the_same_with_and_without_the_rules(make, family, implementation, side):
    # Not float64, where transformers' eager attention gives NaN for a row of padding alone.
    model = make(family, dtype=torch.float32, attn_implementation=implementation)
    input_ids = torch.cat([INPUT_IDS, INPUT_IDS.flip(1)])
    mask = torch.ones_like(input_ids)
    padding = slice(0, 3) if side == "left" else slice(-3, None)
    input_ids[1, padding], mask[1, padding] = 0, 0
    with torch.no_grad():
        before = model(input_ids, attention_mask=mask).logits
        with lrp(model):
            inside = model(input_ids, attention_mask=mask).logits
    assert before.isfinite().all()
    assert torch.equal(inside, before)


@all_families
@all_rules
def test_greedy_continuations_are_the_same_with_and_without_the_rules(make, family, rule):
    model = make(family)
    options: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    before = model.generate(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), **options)
    with lrp(model, rule):
        inside = model.generate(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), **options)
    assert before.shape[1] == INPUT_IDS.shape[1] + 10
    assert torch.equal(inside, before)


@all_families
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_eager_and_sdpa_attention_give_the_same_relevance(make, family, rule):
    parts = {}
    for implementation in ("eager", "sdpa"):
        model = make(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        with lrp(model, rule):
            parts[implementation] = gradients(model)
    assert_same(parts["eager"], parts["sdpa"], rtol=1e-10)


@all_families
@all_rules
def test_relevance_in_bfloat16_is_close_to_that_in_float32(make, family, rule):
    parts = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make(family, dtype=torch.float32).to(dtype)  # random numbers of bfloat16 would be others
        with lrp(model, rule):
            parts[dtype] = gradients(model)
    wide, narrow = (parts[dtype]["d embeddings"].float().flatten() for dtype in (torch.float32, torch.bfloat16))
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 0.98


def _state(model: Any) -> list[Any]:
    """Return all that ``lrp`` may change: methods and hooks of the modules, the config, both registries."""
    methods = {name: {"forward", "_norm"} & module.__dict__.keys() for name, module in model.named_modules()}
    hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    registries = [dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)]
    return [methods, hooks, model.config.to_dict(), model.config._attn_implementation, *registries]


@all_families
@all_rules
def test_leaving_the_block_restores_the_model_bit_for_bit(make, family, rule):
    model = make(family)
    before, logits_before, gradients_before = _state(model), logits(model), gradients(model)
    with lrp(model, rule):
        assert _state(model) != before
        gradients(model)
    assert _state(model) == before
    assert torch.equal(logits(model), logits_before)
    assert_same(gradients(model), gradients_before, rtol=0)


@all_families
def test_an_exception_inside_the_block_restores_the_model_bit_for_bit(make, family):
    model = make(family)
    before, logits_before, gradients_before = _state(model), logits(model), gradients(model)
    with pytest.raises(ZeroDivisionError), lrp(model):  # noqa: PT012
        gradients(model)
        _ = 1 / 0
    assert _state(model) == before
    assert torch.equal(logits(model), logits_before)
    assert_same(gradients(model), gradients_before, rtol=0)


def test_a_forward_that_a_module_had_of_its_own_is_put_back(make):
    model = make()
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = own
    with lrp(model):
        assert mlp.forward is not own
    assert mlp.__dict__["forward"] is own


@all_families
def test_the_block_can_be_entered_again_and_with_another_rule(make, family):
    model = make(family)
    found = []
    for rule in ("attnlrp", "cp_lrp", "attnlrp"):
        with lrp(model, rule):
            found.append(gradients(model))
    assert_same(found[2], found[0], rtol=0)
    assert not torch.equal(found[1]["d embeddings"], found[0]["d embeddings"])


@all_families
def test_the_rules_of_one_model_leave_another_of_its_class_alone(make, family):
    model, other = make(family), make(family, seed=1)
    before, gradients_before = _state(other)[:4], gradients(other)
    with lrp(model):
        assert _state(other)[:4] == before
        assert_same(gradients(other), gradients_before, rtol=0)
        twin = copy.deepcopy(other)
        assert_same(gradients(twin), gradients_before, rtol=0)


def test_two_models_of_one_class_can_be_under_the_rules_at_once(make):
    model, other = make(), make(seed=1)
    with lrp(model):
        expected = gradients(model)
    with lrp(other):
        expected_of_other = gradients(other)
    with lrp(model):
        with lrp(other):
            assert_same(gradients(model), expected, rtol=0)
            assert_same(gradients(other), expected_of_other, rtol=0)
        assert_same(gradients(model), expected, rtol=0)


def _assert_refused(model: Any, match: str, rule: Any = "attnlrp") -> None:
    """Assert that the rules are refused with a message, and nothing is changed."""
    before = _state(model)
    with pytest.raises(ValueError, match=match), lrp(model, rule):
        pytest.fail("the block was entered")
    assert _state(model) == before


def test_float16_is_refused(make):
    _assert_refused(make(dtype=torch.float16), "float16.*--model.dtype")


def test_training_mode_is_refused(make):
    _assert_refused(make().train(), r"model\.eval\(\)")


def test_applying_the_rules_twice_is_refused_and_leaves_the_first_in_place(make):
    model = make()
    with lrp(model):
        expected = gradients(model)
        _assert_refused(model, "does not nest")
        _assert_refused(model, "does not nest", rule="cp_lrp")
        assert_same(gradients(model), expected, rtol=0)


def test_an_architecture_without_rules_is_refused_and_those_with_rules_are_named():
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, **sizes)).eval()
    _assert_refused(model, "'gpt_neox'.*gemma3_text, gpt2, llama, opt, qwen2, qwen3.*--model.method wanda")


def test_an_unknown_rule_is_refused_and_the_known_ones_are_named(make):
    _assert_refused(make(), "'gradient'.*'attnlrp'.*'cp_lrp'", rule="gradient")


@all_families
def test_a_module_that_no_rule_reaches_is_refused_by_name(make, family):
    model = make(family)
    name = mlp_of(family, 1)[1].rpartition(".")[0]
    model.get_submodule(name).extra = nn.GroupNorm(4, 16)
    _assert_refused(model, rf"{name}\.extra \(GroupNorm\)")


def test_softcapped_logits_are_refused(make):
    _assert_refused(make("gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping")
