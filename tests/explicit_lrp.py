"""A decoder written out by hand, and relevance passed back through it by hand: there is no autograd here.

Each operation computes its result from the model's weights, and knows by a formula how the relevance of its result goes
to its inputs. What is passed back is the multiplier m = R / x of each value x with relevance R, since R / x is finite
where x is close to 0. All is in float64, of one sample at a time.

Shape letters: T tokens, H heads, D dimensions of a head, I inputs and O outputs of a linear layer, E experts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-10  # of the identity rule


class Value:
    """Numbers that depend on the tokens, and their multipliers, to which each use of them adds its part."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.m = torch.zeros_like(x)


class Linear:
    """y = W x + b. The bias keeps its part."""

    def __init__(self, x: Value, W_OI: Tensor, bias: Tensor | None = None) -> None:
        self.input, self.weight = x, W_OI
        self.without_bias = x.x @ W_OI.T
        self.out = Value(self.without_bias if bias is None else self.without_bias + bias)

    def backward(self) -> None:
        self.input.m += self.out.m @ self.weight

    def signed(self) -> Tensor:
        """Return the relevance of each neuron without that of its bias, shape ``[O]``."""
        return (self.without_bias * self.out.m).sum(dim=0)

    def magnitude(self) -> Tensor:
        """Return the sum of the magnitudes of the relevance of each neuron's weights, shape ``[O]``."""
        rows = []
        for neuron, weights in enumerate(self.weight):
            relevance_TI = self.out.m[:, neuron, None] * self.input.x * weights
            rows.append(relevance_TI.sum(dim=0).abs().sum())
        return torch.stack(rows)


class RmsNorm:
    """y = gain x / rms(x). The root mean square is a constant."""

    def __init__(self, x: Value, gain: Tensor, eps: float) -> None:
        self.input = x
        self.factor = gain / (x.x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        self.out = Value(x.x * self.factor)

    def backward(self) -> None:
        self.input.m += self.out.m * self.factor


class LayerNorm:
    """y = gain (x - mean(x)) / std(x) + bias. The standard deviation is a constant; the mean is a sum as any other."""

    def __init__(self, x: Value, gain: Tensor, bias: Tensor, eps: float) -> None:
        self.input = x
        centred = x.x - x.x.mean(dim=-1, keepdim=True)
        self.factor = gain / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        self.out = Value(centred * self.factor + bias)

    def backward(self) -> None:
        of_centred = self.out.m * self.factor
        self.input.m += of_centred - of_centred.mean(dim=-1, keepdim=True)


class Activation:
    """y = f(x). All of the relevance of y is that of x."""

    def __init__(self, x: Value, function: Callable[[Tensor], Tensor]) -> None:
        self.input = x
        self.out = Value(function(x.x))

    def backward(self) -> None:
        self.input.m += self.out.m * self.out.x / (self.input.x + EPS)


class Times:
    """y = c x."""

    def __init__(self, x: Value, constant: Tensor | float) -> None:
        self.input, self.constant = x, constant
        self.out = Value(x.x * constant)

    def backward(self) -> None:
        self.input.m += self.out.m * self.constant


class Plus:
    """y = x + c. The constant keeps its part."""

    def __init__(self, x: Value, constant: Tensor | float) -> None:
        self.input = x
        self.out = Value(x.x + constant)

    def backward(self) -> None:
        self.input.m += self.out.m


class Sum:
    """y = a + b + ... Each term has the relevance that is its part of the sum."""

    def __init__(self, *terms: Value) -> None:
        self.terms = terms
        self.out = Value(sum((term.x for term in terms), torch.zeros_like(terms[0].x)))

    def backward(self) -> None:
        for term in self.terms:
            term.m += self.out.m


class Product:
    """y = a b, element by element. Half to each of them, or all to ``a``, for which ``b`` is a constant then.

    ``b`` may have one column for all those of ``a``.
    """

    def __init__(self, a: Value, b: Value, is_shared: bool) -> None:
        self.a, self.b, self.is_shared = a, b, is_shared
        self.out = Value(a.x * b.x)

    def backward(self) -> None:
        if not self.is_shared:
            self.a.m += self.out.m * self.b.x
            return
        self.a.m += self.out.m * self.b.x / 2
        of_b = self.out.m * self.a.x / 2
        self.b.m += of_b if self.b.x.shape == of_b.shape else of_b.sum(dim=-1, keepdim=True)


class Part:
    """y = x[index], where no element comes twice."""

    def __init__(self, x: Value, index: Any) -> None:
        self.input, self.index = x, index
        self.out = Value(x.x[index])

    def backward(self) -> None:
        self.input.m[self.index] += self.out.m


class Scattered:
    """Adds the rows of several values to rows of zeros."""

    def __init__(self, terms: list[tuple[list[int], Value]], shape: torch.Size) -> None:
        self.terms = terms
        self.out = Value(torch.zeros(shape, dtype=torch.float64))
        for rows, term in terms:
            for row, x in zip(rows, term.x, strict=True):
                self.out.x[row] += x

    def backward(self) -> None:
        for rows, term in self.terms:
            term.m += self.out.m[rows]


class Reshaped:
    """The same elements in another shape."""

    def __init__(self, x: Value, *shape: int) -> None:
        self.input = x
        self.out = Value(x.x.reshape(shape))

    def backward(self) -> None:
        self.input.m += self.out.m.reshape(self.input.x.shape)


class Rotated:
    """The rotary positions of queries or keys ``[T, H, D]``: linear, so they are passed back by turning back.

    Dimension i and i + ``size`` / 2 are a pair; those from ``size`` on are not turned.
    """

    def __init__(self, x_THD: Value, size: int, theta: float) -> None:
        self.input, self.half = x_THD, size // 2
        angles = [[t * theta ** (-2 * i / size) for i in range(size // 2)] for t in range(len(x_THD.x))]
        self.angles = torch.tensor(angles, dtype=torch.float64).unsqueeze(1)
        self.out = Value(self.turned(x_THD.x, self.angles))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second, rest = x.split([self.half, self.half, x.shape[-1] - 2 * self.half], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def backward(self) -> None:
        self.input.m += self.turned(self.out.m, -self.angles)


class Softmax:
    """p = softmax(x) of each row, over some of its elements; its relevance goes by its Jacobian or is none."""

    def __init__(self, x: Value, is_in: Tensor, passes: bool) -> None:
        self.input, self.passes = x, passes
        self.out = Value(x.x.masked_fill(~is_in, -math.inf).softmax(dim=-1))

    def backward(self) -> None:
        if self.passes:
            self.input.m += through_softmax(self.out.x, self.out.m)


class Attention:
    """Causal attention, head by head and token by token; several heads may share keys and values.

    By AttnLRP the values and the probabilities have half of the relevance each, and the queries and the keys half of
    that of the scores each, which is what comes through the softmax by its Jacobian. By CP-LRP the probabilities are
    constants.

    Args:
        q_THD: Queries.
        k_TGD: Keys, for as many heads or fewer.
        v_TGD: Values, for as many heads as the keys.
        rule: ``attnlrp`` or ``cp_lrp``.
        scale: Factor of the scores.
        window: How many tokens are seen, the own one among them; None if all.
        cap: If any, a score s is cap * tanh(s / cap).
        slopes: If any, what each head adds to a score is its slope times the position of the key.
        sinks: If any, a score of each head for no token at all.
    """

    def __init__(
        self,
        q_THD: Value,
        k_TGD: Value,
        v_TGD: Value,
        rule: str,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        slopes: list[float] | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v = q_THD, k_TGD, v_TGD
        self.rule, self.scale, self.cap = rule, scale, cap
        tokens, heads, _ = q_THD.x.shape
        self.sharing = heads // k_TGD.x.shape[1]
        self.out = Value(torch.zeros(tokens, heads, v_TGD.x.shape[2], dtype=torch.float64))
        self.kept: dict[tuple[int, int], tuple[slice, Tensor, Tensor]] = {}
        for head in range(heads):
            for t in range(tokens):
                seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
                raw = scale * (self.k.x[seen, head // self.sharing] @ self.q.x[t, head])
                scores = raw if cap is None else cap * (raw / cap).tanh()
                if slopes is not None:
                    scores = scores + slopes[head] * torch.arange(seen.start, seen.stop)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                probabilities = scores.softmax(dim=0)[: len(raw)]
                self.kept[head, t] = seen, raw, probabilities
                self.out.x[t, head] = probabilities @ self.v.x[seen, head // self.sharing]

    def backward(self) -> None:
        for (head, t), (seen, raw, probabilities) in self.kept.items():
            group, m = head // self.sharing, self.out.m[t, head]
            if self.rule == "cp_lrp":
                self.v.m[seen, group] += probabilities[:, None] * m
                continue
            self.v.m[seen, group] += probabilities[:, None] * m / 2
            # Without the sink, whose probability is multiplied with no value and has the multiplier 0.
            of_raw = through_softmax(probabilities, self.v.x[seen, group] @ m / 2)
            if self.cap is not None:
                of_raw = of_raw * (raw / self.cap).tanh() / (raw / self.cap + EPS)
            self.q.m[t, head] += self.scale * (of_raw @ self.k.x[seen, group]) / 2
            self.k.m[seen, group] += self.scale * of_raw[:, None] * self.q.x[t, head] / 2


def through_softmax(probabilities: Tensor, m: Tensor) -> Tensor:
    """Return J^T m with J_ij = p_i (1[i = j] - p_j), the Jacobian of a softmax."""
    return probabilities * (m - (probabilities * m).sum(dim=-1, keepdim=True))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def _gelu_of_bloom(x: Tensor) -> Tensor:
    return x * (1 + (0.79788456 * x * (1 + 0.044715 * x * x)).tanh()) / 2


class ExplicitDecoder:
    """A model for one sample: ``layers`` holds all its linear layers but the head, after ``propagate`` with relevance.

    Args:
        model: Of transformers, in float64; of it only the config and the parameters are used.
        rule: ``attnlrp`` or ``cp_lrp``.
        input_ids: Shape ``[T]``.
    """

    def __init__(self, model: Any, rule: str, input_ids: Tensor) -> None:
        self.config, self.rule = model.config, rule
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

    def propagate(self) -> None:
        """Pass back the relevance of the last token's largest logit, which is this logit."""
        with torch.no_grad():
            self.logits.m[-1, self.logits.x[-1].argmax()] = 1
            for operation in reversed(self.operations):
                operation.backward()

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
        size, heads, groups = self.config.head_dim, self.config.num_attention_heads, self.config.num_key_value_heads
        if self.family == "phi3":
            fused = self.linear(f"{name}.qkv_proj", x)
            q = self.columns(fused, 0, heads * size)
            k = self.columns(fused, heads * size, (heads + groups) * size)
            v = self.columns(fused, (heads + groups) * size, (heads + 2 * groups) * size)
        else:
            q, k, v = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        if self.family == "olmo2":  # over all heads
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
        mixed = self.add(Attention(q, k, v, self.rule, scale, window, cap, sinks=sinks))
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
        mixed = self.add(Attention(q, k, v, self.rule, size**-0.5, slopes=slopes))
        return self.linear(f"{name}.dense", self.add(Reshaped(mixed, len(x.x), heads * size)))

    def attention_of_gpt2(self, name: str, x: Value) -> Value:
        heads, width = self.config.n_head, self.config.n_embd
        fused = self.linear(f"{name}.c_attn", x)
        q, k, v = (self.columns(fused, i * width, (i + 1) * width) for i in range(3))
        q, k, v = (self.add(Reshaped(part, len(x.x), heads, width // heads)) for part in (q, k, v))
        mixed = self.add(Attention(q, k, v, self.rule, (width // heads) ** -0.5))
        return self.linear(f"{name}.c_proj", self.add(Reshaped(mixed, len(x.x), width)))

    # MLPs.

    def plain_mlp(self, rows: str, columns: str, function: Callable[[Tensor], Tensor], x: Value) -> Value:
        return self.linear(columns, self.add(Activation(self.linear(rows, x), function)))

    def gated(self, gate: Value, up: Value) -> Value:
        """By AttnLRP half to the gate and half to up, by CP-LRP all to up."""
        function = _gelu_by_tanh if self.family == "gemma2" else _silu
        return self.add(Product(up, self.add(Activation(gate, function)), self.rule == "attnlrp"))

    def gated_of_gpt_oss(self, gate: Value, up: Value) -> Value:
        alpha, limit = self.config.swiglu_alpha, self.config.swiglu_limit
        gate = self.add(Activation(gate, lambda x: x.clamp(max=limit)))
        up = self.add(Activation(up, lambda x: x.clamp(-limit, limit)))
        gate = self.add(Times(gate, 1 / (1 + (-alpha * gate.x).exp())))
        return self.add(Product(self.add(Plus(up, 1)), gate, self.rule == "attnlrp"))

    def mlp(self, name: str, x: Value) -> Value:
        """Return the MLP of the families with names like LLaMA's: gated, of fused layers or not, or of experts."""
        if self.family in ("mixtral", "qwen3_moe", "gpt_oss"):
            return self.experts(name, x)
        if self.family == "phi3":
            fused, size = self.linear(f"{name}.gate_up_proj", x), self.config.intermediate_size
            gate, up = self.columns(fused, 0, size), self.columns(fused, size, 2 * size)
        else:
            gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", self.gated(gate, up))

    def experts(self, name: str, x: Value) -> Value:
        """Return the sum of the chosen experts of each token, each times its weight, which comes from a softmax.

        By AttnLRP an expert and its weight have half of their product's relevance each, by CP-LRP the expert has all.
        """
        number = self.config.num_experts_per_tok
        router = f"{name}.router" if self.family == "gpt_oss" else f"{name}.gate"
        bias = self.parameters.get(f"{router}.bias")
        scores = self.add(Linear(x, self.parameters[f"{router}.weight"], bias))
        chosen = torch.zeros_like(scores.x, dtype=torch.bool)
        for t, row in enumerate(scores.x):
            chosen[t, row.argsort(descending=True)[:number]] = True
        is_shared = self.rule == "attnlrp"
        of_softmax = chosen if self.family == "gpt_oss" else torch.ones_like(chosen)
        weights = self.add(Softmax(scores, of_softmax, passes=is_shared))
        if self.family == "mixtral" or (self.family == "qwen3_moe" and self.config.norm_topk_prob):
            # What they are divided by is a constant.
            weights = self.add(Times(weights, 1 / (weights.x * chosen).sum(dim=-1, keepdim=True)))
        terms = []
        for expert in range(chosen.shape[1]):
            tokens = chosen[:, expert].nonzero().flatten().tolist()
            y = self.expert(f"{name}.experts", expert, self.add(Part(x, tokens)))
            weight = self.add(Part(weights, (torch.tensor(tokens, dtype=torch.long)[:, None], [[expert]])))
            terms.append((tokens, self.add(Product(y, weight, is_shared))))
        return self.add(Scattered(terms, x.x.shape))

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
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "granite", "mixtral", "qwen3_moe", "gpt_oss"), _norms_before),
    "gemma2": _norms_before_and_after,
    "olmo2": _norms_after,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "gpt2": _gpt2,
}
