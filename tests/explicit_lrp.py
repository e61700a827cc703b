"""The rules carried out backwards by hand, without autograd: Phi (biases, parallel blocks) and Mixtral (experts)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-10  # of the identity rule


class Value:
    """A matrix, tokens by features, and the gradient that has arrived at it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.gradient = torch.zeros_like(value)


class ExplicitModel:
    """A model of either family: each step forwards notes what its step backwards is."""

    def __init__(self, model: Any, rule: str) -> None:
        self.config = model.config
        self.passes = rule == "attnlrp"
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.of_weights = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.backwards: list[Callable[[], None]] = []

    def gradients(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the largest last logit, by the names that ``slow_lrp.gradients`` gives them."""
        x = Value(embeddings[0])
        logits = self.linear("lm_head", (self.phi if self.config.model_type == "phi" else self.mixtral)(x))
        target = logits.value[-1].argmax()
        logits.gradient[-1, target] = 1
        for step in reversed(self.backwards):
            step()
        logit = logits.value[-1, target]
        return {"embeddings": embeddings, "logit": logit, "d embeddings": x.gradient[None], **self.of_weights}

    def phi(self, x: Value) -> Value:
        for k in range(self.config.num_hidden_layers):
            block = f"model.layers.{k}"
            normed = self.layer_norm(f"{block}.input_layernorm", x)
            inner = self.activation(
                lambda z: nn.functional.gelu(z, approximate="tanh"), self.linear(f"{block}.mlp.fc1", normed)
            )
            after = self.linear(f"{block}.self_attn.dense", self.attention(f"{block}.self_attn", normed))
            x = self.sum(self.sum(after, self.linear(f"{block}.mlp.fc2", inner)), x)
        return self.layer_norm("model.final_layernorm", x)

    def mixtral(self, x: Value) -> Value:
        for k in range(self.config.num_hidden_layers):
            block = f"model.layers.{k}"
            inner = self.attention(f"{block}.self_attn", self.rms_norm(f"{block}.input_layernorm", x))
            x = self.sum(x, self.linear(f"{block}.self_attn.o_proj", inner))
            x = self.sum(x, self.experts(f"{block}.mlp", self.rms_norm(f"{block}.post_attention_layernorm", x)))
        return self.rms_norm("model.norm", x)

    def linear(self, name: str, x: Value) -> Value:
        weight = self.weights[f"{name}.weight"]
        y = Value(x.value @ weight.T + self.weights.get(f"{name}.bias", 0))

        def back() -> None:
            x.gradient += y.gradient @ weight
            self.of_weights[f"{name}.weight"] += y.gradient.T @ x.value

        self.backwards.append(back)
        return y

    def sum(self, a: Value, b: Value) -> Value:
        y = Value(a.value + b.value)

        def back() -> None:
            a.gradient += y.gradient
            b.gradient += y.gradient

        self.backwards.append(back)
        return y

    def activation(self, function: Callable[[Tensor], Tensor], x: Value) -> Value:
        y = Value(function(x.value))

        def back() -> None:
            x.gradient += y.gradient * y.value / (x.value + EPS)

        self.backwards.append(back)
        return y

    def rms_norm(self, name: str, x: Value) -> Value:
        scale = (x.value.square().mean(dim=1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        factor = scale * self.weights[f"{name}.weight"]
        y = Value(x.value * factor)

        def back() -> None:
            x.gradient += y.gradient * factor

        self.backwards.append(back)
        return y

    def layer_norm(self, name: str, x: Value) -> Value:
        centred = x.value - x.value.mean(dim=1, keepdim=True)
        scale = (centred.square().mean(dim=1, keepdim=True) + self.config.layer_norm_eps).rsqrt()
        factor = scale * self.weights[f"{name}.weight"]
        y = Value(centred * factor + self.weights[f"{name}.bias"])

        def back() -> None:
            of_centred = y.gradient * factor
            x.gradient += of_centred - of_centred.mean(dim=1, keepdim=True)

        self.backwards.append(back)
        return y

    def attention(self, name: str, x: Value) -> Value:
        """Return what the heads give, side by side."""
        number, size = self.config.num_attention_heads, self.config.hidden_size // self.config.num_attention_heads
        sharing = number // self.config.num_key_value_heads
        queries, keys, values = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        y = Value(torch.zeros(len(x.value), number * size, dtype=x.value.dtype))
        hidden = torch.ones(len(x.value), len(x.value), dtype=torch.bool).triu(1)
        turned = [self.turn(size, t) for t in range(len(x.value))]
        for head in range(number):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // sharing * size, (head // sharing + 1) * size)
            Q, K = (
                torch.stack([m @ row for m, row in zip(turned, part, strict=True)])
                for part in (queries.value[:, own], keys.value[:, shared])
            )
            A = torch.softmax((Q @ K.T / size**0.5).masked_fill(hidden, -torch.inf), dim=1)
            y.value[:, own] = A @ values.value[:, shared]

            def back(A: Tensor = A, Q: Tensor = Q, K: Tensor = K, own: slice = own, shared: slice = shared) -> None:
                part = 0.5 if self.passes else 1.0
                values.gradient[:, shared] += part * A.T @ y.gradient[:, own]
                if self.passes:
                    of_A = 0.5 * y.gradient[:, own] @ values.value[:, shared].T
                    of_scores = A * (of_A - (of_A * A).sum(dim=1, keepdim=True)) / size**0.5
                    for t, turn in enumerate(turned):
                        queries.gradient[t, own] += turn.T @ (0.5 * of_scores[t] @ K)
                        keys.gradient[t, shared] += turn.T @ (0.5 * of_scores[:, t] @ Q)

            self.backwards.append(back)
        return y

    def turn(self, size: int, t: int) -> Tensor:
        """Return the matrix that turns a query or a key at a position, or the part of it that is turned."""
        rope = self.config.rope_parameters
        part = int(size * rope.get("partial_rotary_factor", 1))
        matrix = torch.eye(size, dtype=torch.float64)
        for i in range(part // 2):
            angle = torch.tensor(t * rope["rope_theta"] ** (-2 * i / part), dtype=torch.float64)
            j = i + part // 2
            matrix[i, i] = matrix[j, j] = angle.cos()
            matrix[i, j], matrix[j, i] = -angle.sin(), angle.sin()
        return matrix

    def experts(self, name: str, x: Value) -> Value:
        y = Value(torch.zeros_like(x.value))
        router, rows, columns = (
            self.weights[f"{name}.{part}"] for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        )
        probabilities = torch.softmax(x.value @ router.T, dim=1)
        for t, row in enumerate(probabilities):
            chosen = row.topk(self.config.num_experts_per_tok).indices
            for e in chosen.tolist():
                weight = row[e] / row[chosen].sum()
                gate, up = (rows[e] @ x.value[t]).chunk(2)
                let_through = nn.functional.silu(gate)
                out = columns[e] @ (let_through * up)
                y.value[t] += weight * out
                of = (t, e, row, row[chosen].sum(), weight, gate, up, let_through, out)
                self.backwards.append(lambda of=of: self._back_through(name, x, y, *of))
        return y

    def _back_through(
        self,
        name: str,
        x: Value,
        y: Value,
        t: int,
        e: int,
        probabilities: Tensor,
        total: Tensor,
        weight: Tensor,
        gate: Tensor,
        up: Tensor,
        let_through: Tensor,
        out: Tensor,
    ) -> None:
        """Go back through one expert for one token, and through the router."""
        part = 0.5 if self.passes else 1.0
        rows, columns = self.weights[f"{name}.experts.gate_up_proj"][e], self.weights[f"{name}.experts.down_proj"][e]
        of_out = part * weight * y.gradient[t]
        self.of_weights[f"{name}.experts.down_proj"][e] += torch.outer(of_out, let_through * up)
        of_inner = part * (columns.T @ of_out)
        of_gate = of_inner * up * let_through / (gate + EPS) if self.passes else torch.zeros_like(gate)
        of_rows = torch.cat([of_gate, of_inner * let_through])
        self.of_weights[f"{name}.experts.gate_up_proj"][e] += torch.outer(of_rows, x.value[t])
        x.gradient[t] += rows.T @ of_rows
        if self.passes:
            of_probability = 0.5 * (y.gradient[t] @ out) / total
            of_scores = -probabilities * probabilities[e] * of_probability
            of_scores[e] += probabilities[e] * of_probability
            x.gradient[t] += self.weights[f"{name}.gate.weight"].T @ of_scores
