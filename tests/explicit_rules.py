"""The operations of a decoder with their rules of relevance, written out: there is no autograd here.

Each operation computes its result from the model's weights, and knows by a formula how the relevance of its result goes
to its inputs. What is passed back is the multiplier m = R / x of each value x with relevance R, since R / x is finite
where x is close to 0. All is in float64, of one sample at a time.

Shape letters: T tokens, H heads, G heads of keys and values, D dimensions of a head, I inputs and O outputs of a linear
layer.
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
        self.input, self.weight, self.bias = x, W_OI, bias
        self.without_bias = x.x @ W_OI.T
        self.out = Value(self.without_bias if bias is None else self.without_bias + bias)

    def backward(self) -> None:
        self.input.m += self.out.m @ self.weight

    def kept(self) -> float:
        return 0.0 if self.bias is None else (self.out.m * self.bias).sum().item()

    def signed(self) -> Tensor:
        """Return the relevance of each neuron without that of its bias, shape ``[O]``."""
        return (self.without_bias * self.out.m).sum(dim=0)

    def magnitude(self) -> Tensor:
        """Return the sum of the magnitudes of the relevance of each neuron's weights, shape ``[O]``."""
        relevance_TOI = self.out.m[:, :, None] * self.input.x[:, None, :] * self.weight
        return relevance_TOI.sum(dim=0).abs().sum(dim=1)


class RmsNorm:
    """y = gain x / rms(x). The root mean square is a constant."""

    def __init__(self, x: Value, gain: Tensor, eps: float) -> None:
        self.input = x
        self.factor = gain / (x.x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        self.out = Value(x.x * self.factor)

    def backward(self) -> None:
        self.input.m += self.out.m * self.factor


class LayerNorm:
    """y = gain (x - mean(x)) / deviation(x) + bias. The deviation is a constant; the mean is a sum like any other."""

    def __init__(self, x: Value, gain: Tensor, bias: Tensor, eps: float) -> None:
        self.input, self.bias = x, bias
        centred = x.x - x.x.mean(dim=-1, keepdim=True)
        self.factor = gain / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        self.out = Value(centred * self.factor + bias)

    def backward(self) -> None:
        of_centred = self.out.m * self.factor
        self.input.m += of_centred - of_centred.mean(dim=-1, keepdim=True)

    def kept(self) -> float:
        return (self.out.m * self.bias).sum().item()


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
        self.input, self.constant = x, constant
        self.out = Value(x.x + constant)

    def backward(self) -> None:
        self.input.m += self.out.m

    def kept(self) -> float:
        return (self.out.m * self.constant).sum().item()


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
    """p = softmax(x) of each row, over some of its elements: by its Jacobian, or a constant."""

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
        passes: Whether the softmax passes relevance, as by AttnLRP.
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
        passes: bool,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
        slopes: list[float] | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v = q_THD, k_TGD, v_TGD
        self.passes, self.scale, self.cap = passes, scale, cap
        tokens, heads, _ = q_THD.x.shape
        self.sharing = heads // k_TGD.x.shape[1]
        self.out = Value(torch.zeros(tokens, heads, v_TGD.x.shape[2], dtype=torch.float64))
        self.saved: dict[tuple[int, int], tuple[slice, Tensor, Tensor]] = {}
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
                self.saved[head, t] = seen, raw, probabilities
                self.out.x[t, head] = probabilities @ self.v.x[seen, head // self.sharing]

    def backward(self) -> None:
        for (head, t), (seen, raw, probabilities) in self.saved.items():
            group, m = head // self.sharing, self.out.m[t, head]
            if not self.passes:
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
