"""Likelihoods of architectures that make more of their head's output, and what is refused before weights are loaded."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from sparc3_lightning.models.likelihood import (
    Reference,
    check_logits,
    last_hidden_state,
    log_likelihoods,
    score_windows,
)

SIZES = {
    **{"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
FAMILIES = {
    "llama": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 4.0, "head_dim": 8},
    "hyperclovax": {"logits_scaling": 0.25, "head_dim": 8},
    "falcon_h1": {"lm_head_multiplier": 0.3, "head_dim": 8, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
    | {"mamba_d_state": 4, "mamba_chunk_size": 4},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
}
INPUT_IDS = torch.tensor([[5, 17, 33, 8, 21, 40], [9, 8, 7, 6, 5, 4]])


class Shifted(LlamaForCausalLM):
    """A head whose output is shifted, which no perplexity here knows of."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **options)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def make(family: str, device: str = "cpu", model_class: Any = AutoModelForCausalLM) -> Any:
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    with torch.device(device):
        made = model_class.from_config(config) if model_class is AutoModelForCausalLM else model_class(config)
    for parameter in made.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_those_of_the_models_own_logits_scaled_or_capped(family: str) -> None:
    check_logits(make(family, "meta"))
    model = make(family)
    logs = model(INPUT_IDS).logits.double().log_softmax(dim=-1)
    expected = logs[:, :-1].gather(2, INPUT_IDS[:, 1:].unsqueeze(2)).sum(dim=(1, 2))
    found = log_likelihoods(model, INPUT_IDS, torch.tensor([6, 6]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_divergence_between_scaled_logits_is_that_of_what_the_models_predict() -> None:
    model = make("granite")
    before = last_hidden_state(model, INPUT_IDS)
    original = model(INPUT_IDS).logits.double().log_softmax(dim=-1)
    model.model.layers[0].mlp.down_proj.weight.zero_()
    changed = model(INPUT_IDS).logits.double().log_softmax(dim=-1)
    spans = torch.tensor([[1, 6], [1, 6]])
    _, found = score_windows(model, last_hidden_state(model, INPUT_IDS), INPUT_IDS, spans, Reference(before))
    expected = (original.exp() * (original - changed))[:, :-1].sum(dim=(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_made_of_the_head_otherwise_is_refused_with_weights_and_without() -> None:
    message = "The logits of Shifted are not the output of its head, scaled or capped: there is no perplexity"
    with pytest.raises(ValueError, match=message):
        check_logits(make("llama", "meta", Shifted))
    with pytest.raises(ValueError, match=message):
        last_hidden_state(make("llama", model_class=Shifted), INPUT_IDS)
