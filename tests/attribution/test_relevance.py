"""Relevance of neurons and scores of weights as pure functions, against loops over samples, neurons and tokens."""

import torch

from sparc3_lightning.attribution.relevance import (
    absolute_relevance,
    magnitude_relevance,
    signed_relevance,
    squared_norms,
    wanda_score,
)


def test_magnitude_relevance_is_the_loop_over_samples_neurons_and_weights(layer):
    W, A, G = layer["W"], layer["A"], layer["G"]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for o in range(4):
            for i in range(3):
                gradient = sum(G[b, t, o].item() * A[b, t, i].item() for t in range(5))
                expected[b, o] += abs(W[o, i].item() * gradient)
    torch.testing.assert_close(magnitude_relevance(W, A, G), expected, rtol=1e-12, atol=0)


def test_signed_relevance_is_the_loop_over_samples_neurons_and_tokens(layer):
    Z, G = layer["Z"], layer["G"]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for o in range(4):
            expected[b, o] = sum(Z[b, t, o].item() * G[b, t, o].item() for t in range(5))
    torch.testing.assert_close(signed_relevance(Z, G), expected, rtol=1e-12, atol=0)


def test_absolute_relevance_is_the_magnitude_of_the_sum_over_the_tokens_of_each_sample(layer):
    Z, G = layer["Z"], layer["G"]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for o in range(4):
            expected[b, o] = abs(sum(Z[b, t, o].item() * G[b, t, o].item() for t in range(5)))
    torch.testing.assert_close(absolute_relevance(Z, G), expected, rtol=1e-12, atol=0)


def test_squared_norms_are_the_loop_over_the_tokens_that_are_not_padding(layer):
    A = layer["A"]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for b, length in enumerate([5, 2]):
        for i in range(3):
            expected[b, i] = sum(A[b, t, i].item() ** 2 for t in range(length))
    torch.testing.assert_close(squared_norms(A, mask), expected, rtol=1e-12, atol=0)


def test_wanda_score_is_the_loop_over_weights(layer):
    W, A = layer["W"], layer["A"]
    expected = torch.zeros(4, dtype=torch.float64)
    for o in range(4):
        for i in range(3):
            expected[o] += abs(W[o, i].item()) * sum(x.item() ** 2 for x in A[:, :, i].flatten()) ** 0.5
    squares = squared_norms(A, torch.ones(2, 5)).sum(dim=0)
    torch.testing.assert_close(wanda_score(W, squares), expected, rtol=1e-12, atol=0)


def test_scores_of_bfloat16_tensors_are_summed_in_float32(layer):
    narrow = {name: tensor.bfloat16() for name, tensor in layer.items()}
    W, A, Z, G = (narrow[name] for name in "WAZG")
    exact = {name: tensor.double() for name, tensor in narrow.items()}
    magnitude, signed, squares = (
        magnitude_relevance(W, A, G),
        signed_relevance(Z, G),
        squared_norms(A, torch.ones(2, 5)),
    )
    score = wanda_score(W, squares.sum(dim=0))
    assert {tensor.dtype for tensor in (magnitude, signed, squares, score)} == {torch.float32}
    torch.testing.assert_close(
        magnitude.double(), magnitude_relevance(exact["W"], exact["A"], exact["G"]), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(signed.double(), signed_relevance(exact["Z"], exact["G"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), squared_norms(exact["A"], torch.ones(2, 5)), rtol=1e-5, atol=1e-5)
