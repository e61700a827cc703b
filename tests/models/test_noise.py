"""Tokens drawn by keyed noise: from the distribution they should come from, whatever stands in the rows beside."""

import pytest
import torch

from sparc3_lightning.models.noise import draw_key, draw_rows, gumbel_noise


@pytest.mark.parametrize("likely", [1e-5, 0.12, 0.9])
def test_tokens_are_drawn_with_their_probabilities_whichever_share_a_noise(likely):
    log = torch.tensor([2.0, 1.5, 0.3, 0.0, -0.7, -1.0, 1.1]).log_softmax(dim=0)
    keys = torch.tensor([draw_key(0, str(i)) for i in range(400)]).repeat_interleave(50)
    drawn = draw_rows(log.expand(20_000, -1), keys, torch.arange(50).repeat(400), likely)
    expected = 20_000 * log.exp()
    statistic = ((drawn.bincount(minlength=7) - expected) ** 2 / expected).sum()
    assert statistic < 22.5, "chi-square of 6 degrees of freedom is above 22.5 once in a thousand times"


def test_a_draw_belongs_to_key_and_position_and_hardly_changes_by_rounding():
    log = 3 * torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    log = log.log_softmax(dim=1)
    keys, positions = torch.arange(200) // 20 + 10**15, torch.arange(200) % 20
    drawn = draw_rows(log, keys, positions, 1e-3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw_rows(log[order], keys[order], positions[order], 1e-3), drawn[order])
    assert torch.equal(draw_rows(log + 1e-6, keys, positions, 1e-3), drawn)
    assert not torch.equal(draw_rows(log, keys, positions + 1, 1e-3), drawn)
    unlikely = log.gather(1, drawn[:, None]).exp() < 1e-3
    assert 0.1 < unlikely.double().mean() < 0.9, "both ways are taken"
    alone = log + gumbel_noise(keys[:, None], positions[:, None], torch.arange(3000))
    assert torch.equal(draw_rows(log, keys, positions, 1e-12), alone.argmax(dim=1)), "each has its own noise"
