"""What is kept from stage to stage: handed out only as it was loaded, and figures that do not depend on it."""

import torch
from torch import nn

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.keeping import keeping, load_kept, load_kept_tokenizer

NEURONS = [Component("model.layers.0.mlp.up_proj", i, -1.0) for i in (3, 5)]


def changes(model: nn.Module):
    """Everything that a stage might leave behind."""
    weight = model.lm_head.weight
    yield lambda: prune_(model, NEURONS)
    yield lambda: weight.data[3].mul_(2)
    yield lambda: weight.requires_grad_(True)
    yield lambda: model.train()
    yield lambda: model.model.layers[0].register_forward_hook(lambda *_: None)
    yield lambda: setattr(model.model.layers[1], "forward", lambda *_: None)
    yield lambda: setattr(model.config, "use_cache", not model.config.use_cache)
    yield lambda: model.to(torch.bfloat16)


def test_a_model_is_handed_out_again_only_as_it_was_loaded(tiny_checkpoint):
    checkpoint, tokens = Checkpoint(tiny_checkpoint), torch.arange(4, 12).unsqueeze(0)
    fresh = checkpoint.load(torch.float32)
    expected = fresh(tokens).logits
    with keeping():
        for number in range(len(list(changes(fresh)))):
            model = load_kept(checkpoint, torch.float32)
            with mask(model, NEURONS):
                assert not torch.equal(model(tokens).logits, expected)
            assert load_kept(Checkpoint(tiny_checkpoint), torch.float32) is model
            assert torch.equal(model(tokens).logits, expected)
            list(changes(model))[number]()
            again = load_kept(checkpoint, torch.float32)
            assert again is not model
            assert torch.equal(again(tokens).logits, expected)
    assert load_kept(checkpoint, torch.float32) is not again


def test_of_another_dtype_and_outside_a_run_a_model_is_loaded_anew(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint)
    assert load_kept(checkpoint, torch.float32) is not load_kept(checkpoint, torch.float32)
    with keeping():
        first = load_kept(checkpoint, torch.float32)
        assert load_kept(checkpoint, torch.bfloat16).dtype == torch.bfloat16
        assert load_kept(checkpoint, torch.float32) is not first


def test_a_tokenizer_is_handed_out_again_unless_it_was_changed(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint)
    assert load_kept_tokenizer(checkpoint) is not load_kept_tokenizer(checkpoint)
    with keeping():
        tokenizer = load_kept_tokenizer(checkpoint)
        assert load_kept_tokenizer(Checkpoint(tiny_checkpoint)) is tokenizer
        tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
        assert load_kept_tokenizer(checkpoint) is not tokenizer
