"""Decoders written out by hand, from the embeddings to the logits, and relevance passed back through them by hand.

Of a model only the config and the parameters are used. All is in float64, of one sample at a time.

Shape letters: T tokens, E experts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from explicit_rules import (
    Activation,
    Attention,
    LayerNorm,
    Linear,
    Part,
    Plus,
    Product,
    Reshaped,
    RmsNorm,
    Rotated,
    Scattered,
    Softmax,
    Sum,
    Times,
    Value,
)
from torch import Tensor


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _silu(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def _gelu_of_bloom(x: Tensor) -> Tensor:
    return x * (1 + (0.79788456 * x * (1 + 0.044715 * x * x)).tanh()) / 2


class ExplicitDecoder:
    """A model for one sample: ``layers`` holds all its linear layers but the head, after ``propagate`` with relevance.

    Args:
        model: Of transformers, in float64.
        attention: The rule of each softmax, ``attnlrp`` or ``cp_lrp``.
        gates: The rule of products with an activation.
        input_ids: Shape ``[T]``.
    """

    def __init__(self, model: Any, attention: str, gates: str, input_ids: Tensor) -> None:
        self.config = model.config
        self.softmax_passes, self.gates_pass = attention == "attnlrp", gates == "attnlrp"
        self.family = model.config.model_type
        self.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.operations: list[Any] = []
        self.layers: dict[str, Linear] = {}
        with torch.no_grad():
            x = self.embedded = Value(model.get_input_embeddings().weight.detach()[input_ids])
            hidden = FAMILIES[self.family](self, x)
            logits = self.add(Linear(hidden, model.get_output_embeddings().weight.detach()))
            if self.family == "granite":
                logits = self.add(Times(logits, 1 / self.config.logits_scaling))
            if self.family == "gemma2":
                cap = self.config.final_logit_softcapping
                logits = self.add(Times(logits, 1 / cap))
                logits = self.add(Times(self.add(Activation(logits, torch.tanh)), cap))
        self.logits = logits

    def propagate(self, token: int) -> None:
        """Pass back the relevance of one of the last logits, which is this logit."""
        with torch.no_grad():
            self.logits.m[-1, token] = 1
            for operation in reversed(self.operations):
                operation.backward()

    def on_tokens(self) -> float:
        """Return the relevance that arrives at the embeddings."""
        return (self.embedded.x * self.embedded.m).sum().item()

    def kept(self) -> float:
        """Return the relevance that constants keep which are added to something."""
        return sum(operation.kept() for operation in self.operations if hasattr(operation, "kept"))

    def add(self, operation: Any) -> Value:
        self.operations.append(operation)
        return operation.out

    def linear(self, name: str, x: Value) -> Value:
        weight = self.parameters[f"{name}.weight"]
        if self.family == "gpt2":
            weight = weight.T
        return self.linear_of(name, x, weight, self.parameters.get(f"{name}.bias"))

    def linear_of(self, name: str, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
        self.layers[name] = Linear(x, weight, bias)
        return self.add(self.layers[name])

    def norm(self, name: str, x: Value) -> Value:
        gain = self.parameters[f"{name}.weight"] + (1 if self.family == "gemma2" else 0)
        return self.add(RmsNorm(x, gain, self.config.rms_norm_eps))

    def layer_norm(self, name: str, x: Value) -> Value:
        eps = self.config.layer_norm_eps if self.family == "gpt_neox" else self.config.layer_norm_epsilon
        return self.add(LayerNorm(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], eps))

    def residual(self, x: Value, *branches: Value) -> Value:
        if self.family == "granite":
            branches = tuple(self.add(Times(branch, self.config.residual_multiplier)) for branch in branches)
        return self.add(Sum(x, *branches))

    def columns(self, x: Value, start: int, stop: int) -> Value:
        return self.add(Part(x, (..., slice(start, stop))))

    # Attention, of which the families differ in how queries, keys and values come about.

    def attention(self, name: str, block: int, x: Value) -> Value:
        """Return the attention of the families with names like LLaMA's."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        size = self.config.hidden_size // heads
        if self.family == "phi3":
            fused = self.linear(f"{name}.qkv_proj", x)
            q = self.columns(fused, 0, heads * size)
            k = self.columns(fused, heads * size, (heads + groups) * size)
            v = self.columns(fused, (heads + groups) * size, (heads + 2 * groups) * size)
        else:
            q, k, v = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        if self.family in ("olmo2", "minimax_m2"):  # over all heads
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k, v = (self.add(Reshaped(part, len(x.x), -1, size)) for part in (q, k, v))
        if self.family == "qwen3_moe":  # head by head
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        theta = self.config.rope_parameters["rope_theta"]
        q, k = (self.add(Rotated(part, size, theta)) for part in (q, k))
        scale = size**-0.5
        if self.family == "gemma2":
            scale = self.config.query_pre_attn_scalar**-0.5
        elif self.family == "granite":
            scale = self.config.attention_multiplier
        kinds = getattr(self.config, "layer_types", None)
        is_local = self.family == "mistral" or (kinds is not None and kinds[block] == "sliding_attention")
        window = self.config.sliding_window if is_local else None
        cap = self.config.attn_logit_softcapping if self.family == "gemma2" else None
        sinks = self.parameters.get(f"{name}.sinks")
        mixed = self.add(Attention(q, k, v, self.softmax_passes, scale, window, cap, sinks=sinks))
        return self.linear(f"{name}.o_proj", self.add(Reshaped(mixed, len(x.x), heads * size)))

    def attention_of_fused_heads(self, name: str, x: Value) -> Value:
        """Return the attention of GPT-NeoX and BLOOM, whose layer gives q, k and v of one head after the other."""
        heads = self.config.num_attention_heads
        size = self.config.hidden_size // heads
        fused = self.add(Reshaped(self.linear(f"{name}.query_key_value", x), len(x.x), heads, 3 * size))
        q, k, v = (self.columns(fused, i * size, (i + 1) * size) for i in range(3))
        slopes = None
        if self.family == "bloom":
            slopes = [2 ** (-8 * (head + 1) / heads) for head in range(heads)]  # of 2, 4, 8... heads
        else:
            rope = self.config.rope_parameters
            turned = int(size * rope["partial_rotary_factor"])
            q, k = (self.add(Rotated(part, turned, rope["rope_theta"])) for part in (q, k))
        mixed = self.add(Attention(q, k, v, self.softmax_passes, size**-0.5, slopes=slopes))
        return self.linear(f"{name}.dense", self.add(Reshaped(mixed, len(x.x), heads * size)))

    def attention_of_gpt2(self, name: str, x: Value) -> Value:
        heads, width = self.config.n_head, self.config.n_embd
        fused = self.linear(f"{name}.c_attn", x)
        q, k, v = (self.columns(fused, i * width, (i + 1) * width) for i in range(3))
        q, k, v = (self.add(Reshaped(part, len(x.x), heads, width // heads)) for part in (q, k, v))
        mixed = self.add(Attention(q, k, v, self.softmax_passes, (width // heads) ** -0.5))
        return self.linear(f"{name}.c_proj", self.add(Reshaped(mixed, len(x.x), width)))

    # MLPs.

    def plain_mlp(self, rows: str, columns: str, function: Callable[[Tensor], Tensor], x: Value) -> Value:
        return self.linear(columns, self.add(Activation(self.linear(rows, x), function)))

    def gated(self, gate: Value, up: Value) -> Value:
        """By AttnLRP half to the gate and half to up, by CP-LRP all to up."""
        function = _gelu_by_tanh if self.family == "gemma2" else _silu
        return self.add(Product(up, self.add(Activation(gate, function)), self.gates_pass))

    def gated_of_gpt_oss(self, gate: Value, up: Value) -> Value:
        alpha, limit = self.config.swiglu_alpha, self.config.swiglu_limit
        gate = self.add(Activation(gate, lambda x: x.clamp(max=limit)))
        up = self.add(Activation(up, lambda x: x.clamp(-limit, limit)))
        gate = self.add(Times(gate, _sigmoid(alpha * gate.x)))
        return self.add(Product(self.add(Plus(up, 1)), gate, self.gates_pass))

    def mlp(self, name: str, x: Value) -> Value:
        """Return the MLP of the families with names like LLaMA's: of experts or not."""
        if f"{name}.experts.down_proj" in self.parameters:
            return self.experts(name, x)
        return self.gated_mlp(name, x)

    def gated_mlp(self, name: str, x: Value) -> Value:
        if self.family == "phi3":
            fused, size = self.linear(f"{name}.gate_up_proj", x), self.config.intermediate_size
            gate, up = self.columns(fused, 0, size), self.columns(fused, size, 2 * size)
        else:
            gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", self.gated(gate, up))

    def experts(self, name: str, x: Value) -> Value:
        """Return the sum of the chosen experts of each token, each times its weight, and of the shared one.

        By AttnLRP an expert and its weight have half of their product's relevance each, where the weight comes from a
        softmax; by CP-LRP, and where it comes from a sigmoid, the expert has all.
        """
        weights, chosen, is_shared = self.router(f"{name}.router" if self.family == "gpt_oss" else f"{name}.gate", x)
        terms = []
        for expert in range(chosen.shape[1]):
            tokens = chosen[:, expert].nonzero().flatten().tolist()
            y = self.expert(f"{name}.experts", expert, self.add(Part(x, tokens)))
            weight = self.add(Part(weights, (torch.tensor(tokens, dtype=torch.long)[:, None], [[expert]])))
            terms.append((tokens, self.add(Product(y, weight, is_shared))))
        routed = self.add(Scattered(terms, x.x.shape))
        if self.family != "qwen2_moe":
            return routed
        shared = self.gated_mlp(f"{name}.shared_expert", x)
        of_shared = x.x @ self.parameters[f"{name}.shared_expert_gate.weight"].T
        return self.add(Sum(routed, self.add(Times(shared, _sigmoid(of_shared)))))

    def router(self, name: str, x: Value) -> tuple[Value, Tensor, bool]:
        """Return the weights ``[T, E]``, which experts are chosen, and whether the weights have relevance."""
        scores = self.add(Linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")))
        chosen = torch.zeros_like(scores.x, dtype=torch.bool)
        for t, row in enumerate(scores.x):
            chosen[t, row.argsort(descending=True)[: self.config.num_experts_per_tok]] = True
        if self.family == "minimax_m2":
            weights = _sigmoid(scores.x)
            return Value(weights / (weights * chosen).sum(dim=-1, keepdim=True)), chosen, False
        of_softmax = chosen if self.family == "gpt_oss" else torch.ones_like(chosen)
        weights = self.add(Softmax(scores, of_softmax, self.softmax_passes))
        if self.family == "mixtral" or getattr(self.config, "norm_topk_prob", False):
            # What they are divided by is a constant.
            weights = self.add(Times(weights, 1 / (weights.x * chosen).sum(dim=-1, keepdim=True)))
        return weights, chosen, self.softmax_passes

    def expert(self, name: str, expert: int, x: Value) -> Value:
        """Return one expert of the tokens routed to it, by its part of the fused parameters."""
        fused, down = (self.parameters[f"{name}.{layer}"][expert] for layer in ("gate_up_proj", "down_proj"))
        if self.family == "gpt_oss":  # the other way round, gate and up in turn
            bias = self.parameters[f"{name}.gate_up_proj_bias"][expert]
            gate = self.linear_of(f"{name}.{expert}.gate_proj", x, fused.T[0::2], bias[0::2])
            up = self.linear_of(f"{name}.{expert}.up_proj", x, fused.T[1::2], bias[1::2])
            inner, bias = self.gated_of_gpt_oss(gate, up), self.parameters[f"{name}.down_proj_bias"][expert]
            return self.linear_of(f"{name}.{expert}.down_proj", inner, down.T, bias)
        size = len(fused) // 2
        gate = self.linear_of(f"{name}.{expert}.gate_proj", x, fused[:size])
        up = self.linear_of(f"{name}.{expert}.up_proj", x, fused[size:])
        return self.linear_of(f"{name}.{expert}.down_proj", self.gated(gate, up), down)


# The families: each takes a decoder and the embeddings, and returns what the head gets.


def _norms_before(model: ExplicitDecoder, x: Value) -> Value:
    if model.family == "granite":
        x = model.add(Times(x, model.config.embedding_multiplier))
    for k in range(model.config.num_hidden_layers):
        block = f"model.layers.{k}"
        attended = model.attention(f"{block}.self_attn", k, model.norm(f"{block}.input_layernorm", x))
        x = model.residual(x, attended)
        x = model.residual(x, model.mlp(f"{block}.mlp", model.norm(f"{block}.post_attention_layernorm", x)))
    return model.norm("model.norm", x)


def _norms_before_and_after(model: ExplicitDecoder, x: Value) -> Value:
    x = model.add(Times(x, model.config.hidden_size**0.5))
    for k in range(model.config.num_hidden_layers):
        block = f"model.layers.{k}"
        attended = model.attention(f"{block}.self_attn", k, model.norm(f"{block}.input_layernorm", x))
        x = model.residual(x, model.norm(f"{block}.post_attention_layernorm", attended))
        after = model.mlp(f"{block}.mlp", model.norm(f"{block}.pre_feedforward_layernorm", x))
        x = model.residual(x, model.norm(f"{block}.post_feedforward_layernorm", after))
    return model.norm("model.norm", x)


def _norms_after(model: ExplicitDecoder, x: Value) -> Value:
    for k in range(model.config.num_hidden_layers):
        block = f"model.layers.{k}"
        attended = model.attention(f"{block}.self_attn", k, x)
        x = model.residual(x, model.norm(f"{block}.post_attention_layernorm", attended))
        after = model.mlp(f"{block}.mlp", x)
        x = model.residual(x, model.norm(f"{block}.post_feedforward_layernorm", after))
    return model.norm("model.norm", x)


def _gpt_neox(model: ExplicitDecoder, x: Value) -> Value:
    for k in range(model.config.num_hidden_layers):
        block = f"gpt_neox.layers.{k}"
        attended = model.attention_of_fused_heads(f"{block}.attention", model.layer_norm(f"{block}.input_layernorm", x))
        rows, columns = f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h"
        if model.config.use_parallel_residual:
            normed = model.layer_norm(f"{block}.post_attention_layernorm", x)
            x = model.residual(x, attended, model.plain_mlp(rows, columns, _gelu, normed))
        else:
            x = model.residual(x, attended)
            normed = model.layer_norm(f"{block}.post_attention_layernorm", x)
            x = model.residual(x, model.plain_mlp(rows, columns, _gelu, normed))
    return model.layer_norm("gpt_neox.final_layer_norm", x)


def _bloom(model: ExplicitDecoder, x: Value) -> Value:
    x = model.layer_norm("transformer.word_embeddings_layernorm", x)
    for k in range(model.config.n_layer):
        block = f"transformer.h.{k}"
        normed = model.layer_norm(f"{block}.input_layernorm", x)
        x = model.residual(x, model.attention_of_fused_heads(f"{block}.self_attention", normed))
        normed = model.layer_norm(f"{block}.post_attention_layernorm", x)
        rows, columns = f"{block}.mlp.dense_h_to_4h", f"{block}.mlp.dense_4h_to_h"
        x = model.residual(x, model.plain_mlp(rows, columns, _gelu_of_bloom, normed))
    return model.layer_norm("transformer.ln_f", x)


def _gpt2(model: ExplicitDecoder, x: Value) -> Value:
    x = model.add(Plus(x, model.parameters["transformer.wpe.weight"][: len(x.x)]))
    for k in range(model.config.n_layer):
        block = f"transformer.h.{k}"
        x = model.residual(x, model.attention_of_gpt2(f"{block}.attn", model.layer_norm(f"{block}.ln_1", x)))
        normed = model.layer_norm(f"{block}.ln_2", x)
        x = model.residual(x, model.plain_mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", _gelu_by_tanh, normed))
    return model.layer_norm("transformer.ln_f", x)


FAMILIES: dict[str, Callable[[ExplicitDecoder, Value], Value]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "granite"), _norms_before),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "minimax_m2", "gpt_oss"), _norms_before),
    "gemma2": _norms_before_and_after,
    "olmo2": _norms_after,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "gpt2": _gpt2,
}
