"""A second implementation of the models and the rules, and what it is compared with: the gradients of a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FAMILIES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EPS = 1e-10  # of the identity rule
RULES = ["attnlrp", "cp_lrp"]
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
all_families = pytest.mark.parametrize("family", sorted(FAMILIES))
all_rules = pytest.mark.parametrize("rule", RULES)


def linear_weights(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights of all linear layers but the head, and the fused ones of experts, by name."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and m is not head]
    of_experts = {name: parameter for name, parameter in model.named_parameters() if ".experts." in name}
    return {f"{name}.weight": module.weight for name, module in modules} | of_experts


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


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Compare dictionaries of tensors by the norm of the difference; ``rtol`` 0 asks for the same bits."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        difference = (value - expected[name]).norm().item()
        assert difference <= rtol * expected[name].norm().item(), f"{name}: {difference}"


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
