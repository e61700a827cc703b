"""Caches with room for the tokens to come."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparc3_lightning.models.caches import make_room


def filled() -> DynamicCache:
    cache, draw = DynamicCache(), torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.update(*(torch.randn(2, 4, 3, width, generator=draw) for width in (8, 6)), layer)
    return cache


def test_a_cache_with_room_holds_what_one_without_does_and_moves_none_of_it() -> None:
    roomy, plain, places = filled(), filled(), set()
    make_room(roomy, 3)
    for step in range(1, 4):
        new = [torch.randn(2, 4, 1, width) for width in (8, 6)]
        for layer in range(2):
            found = roomy.update(*new, layer)
            places.add(found[0].data_ptr())
            for one, other in zip(found, plain.update(*new, layer), strict=True):
                assert torch.equal(one, other)
        assert roomy.get_seq_length() == plain.get_seq_length() == 3 + step
    assert len(places) == 2, "one a layer"
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        roomy.update(*new, 0)


def test_a_layer_of_another_kind_is_left_as_it_is() -> None:
    class Other(DynamicLayer):
        pass

    cache = filled()
    other = cache.layers[1] = Other()
    make_room(cache, 5)
    assert cache.layers[1] is other
    assert type(cache.layers[0]) is not DynamicLayer
