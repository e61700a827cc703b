"""The rules, an operation at a time: each conserves what arrives at it, and changes no value."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc3_lightning.attribution.rules import Rules

torch.manual_seed(0)
X, Y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
C = torch.rand(2, 3, 4, dtype=torch.float64) + 0.5
W = torch.randn(4, 4, dtype=torch.float64)
MASK = torch.tensor([True, False, True, True])


def in_place(name: str, *args: Any, **options: Any) -> Any:
    """Carry out an operation in place on a copy of its first operand, which depends on the tokens."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        copy = x * 1
        getattr(copy, name)(*(y if arg == "y" else arg for arg in args), **options)
        return copy

    return apply


def written(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, 1:] * y[:, 1:]
    return out


# Of two tensors that depend on the tokens: all that arrives at the result goes on to them.
CONSERVING = {
    "mul": lambda x, y: x * y,
    "mul of itself": lambda x, y: x * x + y * 0,
    "mul by keyword": lambda x, y: torch.mul(x, other=y),
    "mul by a constant": lambda x, y: (2 * x) * C + y,
    "mul_": in_place("mul_", "y"),
    "*=": in_place("__imul__", "y"),
    "div": lambda x, y: x / (1 + y.exp()),
    "div_": lambda x, y: (x * 1).div_(y.abs() + 1),
    "matmul": lambda x, y: x @ y.transpose(1, 2),
    "bmm": lambda x, y: torch.bmm(x, y.mT),
    "baddbmm": lambda x, y: torch.baddbmm(torch.zeros(2, 3, 3, dtype=torch.float64), x, y.mT, beta=0),
    "baddbmm with what depends on the tokens too": lambda x, y: torch.baddbmm(x @ W, x, y.mT @ y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
    "einsum": lambda x, y: torch.einsum("btd,bsd->bts", x, y),
    "einsum of three": lambda x, y: torch.einsum("btd,bsd,de->btse", [x, y, W]),
    "linear with computed weights": lambda x, y: F.linear(x, y[0]),
    "pow": lambda x, y: x.pow(2) + y**3,
    "square": lambda x, y: torch.square(x) + y,
    "pow_": in_place("pow_", 2),
    "rms": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + y * y.square().mean() ** -0.5,
    "normalize": lambda x, y: F.normalize(x, dim=-1) + y,
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), W[0]) + nn.LayerNorm(4, bias=False).double()(y),
    "rms_norm": lambda x, y: F.rms_norm(x, (4,), W[0], 1e-6) + nn.RMSNorm(4).double()(y),
    "silu": lambda x, y: F.silu(x) * y,
    "silu in place": lambda x, y: F.silu(x * 1, inplace=True) * y,
    "relu_": in_place("relu_"),
    "tanh": lambda x, y: 3 * torch.tanh(x / 3) + y.tanh(),
    "clamp": lambda x, y: x.clamp(min=-0.5, max=0.5) * y.clamp(max=1),
    "clamp_": in_place("clamp_", max=0.5),
    "quick gelu": lambda x, y: x * torch.sigmoid(1.702 * x) + y,
    "sigmoid gate": lambda x, y: torch.sigmoid(x) * y,
    "softplus": lambda x, y: F.softplus(x) * y,
    "solve_triangular": lambda x, y: torch.linalg.solve_triangular(x @ x.mT + torch.eye(3), y, upper=False),
    "where": lambda x, y: torch.where(MASK, x, y) * y,
    "masked_fill": lambda x, y: x.masked_fill(MASK, 0.0) * y,
    "cat": lambda x, y: torch.cat([x, y], dim=-1).chunk(2, dim=-1)[0] * y,
    "written": written,
    "sdpa": lambda x, y: (
        F.scaled_dot_product_attention(C, C, x) + F.scaled_dot_product_attention(query=C, key=C, value=y)
    ),
    "index_add": lambda x, y: torch.zeros_like(x).index_add_(1, torch.tensor([0, 0, 2]), x * y),
}


def relevance(apply: Any, *rules: Any) -> tuple[Tensor, Tensor, list[float]]:
    """Return the result without and under the rules, and what arrives at both operands, of all that the result is."""
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    with Rules(*rules):
        result = apply(x, y)
    found = torch.autograd.grad(result.sum(), (x, y), allow_unused=True)
    with torch.no_grad():
        plain = apply(X.clone(), Y.clone())
    return (
        plain,
        result.detach(),
        [0.0 if g is None else (v * g).sum().item() for v, g in zip((X, Y), found, strict=True)],
    )


@pytest.mark.parametrize("name", CONSERVING)
@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
def test_an_operation_conserves_what_arrives_and_changes_no_value(name, rule):
    plain, result, arrived = relevance(CONSERVING[name], rule, rule)
    assert torch.equal(plain, result)
    assert sum(arrived) == pytest.approx(plain.sum().item(), rel=1e-8)


@pytest.mark.parametrize(
    ("apply", "shares"),
    [
        (lambda x, y: x * y, (0.5, 0.5)),
        (lambda x, y: F.silu(x) * y, (0, 1)),
        (lambda x, y: y * F.gelu(x), (0, 1)),
        (lambda x, y: F.relu(x).to(torch.float32).double() * y, (0, 1)),
        (lambda x, y: x * torch.sigmoid(1.702 * x) * y, (0, 1)),
        (lambda x, y: y * (x * torch.sigmoid(x)), (0, 1)),
        (lambda x, y: in_place("mul_", "y")(F.silu(x), y), (0, 1)),
        (lambda x, y: in_place("mul_", "y")(F.silu(x), y) * y, (0, 1)),
        (lambda x, y: F.silu(x) * F.silu(y), (0.5, 0.5)),
        (lambda x, y: torch.softmax(x, dim=-1) * y, (0, 1)),
        (lambda x, y: x.clamp(max=1) * y, (0.5, 0.5)),
        (lambda x, y: torch.einsum("btd,btd->bt", F.silu(x), y), (0.5, 0.5)),
        (lambda x, y: F.scaled_dot_product_attention(x, x, y), (0, 1)),
    ],
)
def test_under_cp_lrp_a_gate_passes_nothing(apply, shares):
    plain, _, arrived = relevance(apply, "cp_lrp", "cp_lrp")
    for share, found in zip(shares, arrived, strict=True):
        assert found == pytest.approx(share * plain.sum().item(), rel=1e-7)


@pytest.mark.parametrize("apply", [lambda x: 1 / x, lambda x: x.sigmoid(), lambda x: x.abs().sqrt(), lambda x: 2**x])
def test_what_is_squashed_passes_nothing(apply):
    x = X.clone().requires_grad_()
    with Rules("attnlrp", "attnlrp"):
        assert not apply(x).requires_grad


def test_without_a_graph_nothing_is_done():
    with torch.no_grad(), Rules("attnlrp", "attnlrp"):
        x = X.clone().requires_grad_()
        assert torch.equal(torch.prod(x) * x, torch.prod(X) * X)
