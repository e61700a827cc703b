"""Models that keep a state of what they have read: they continue a prompt alike whatever else is in its batch."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sparc3_lightning.evaluation.generation import Sampling, check_can_continue, continue_prompts, draw_keys
from sparc3_lightning.models.architectures import is_recurrent

SIZES = {
    **{"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, **LINEAR},
}
PROMPTS = [[5, 9, 7], [11, 12, 13, 14, 15, 16], [8]]


def make(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def continued(model: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[list[int]]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    keys = [draw_keys(0, str(prompt), sampling.num_continuations, sampling.per_seed) for prompt in prompts]
    found = continue_prompts(model, ids, (ids > 0).long(), keys, sampling)
    return [[continuation.input_ids for continuation in of_prompt] for of_prompt in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_the_whole_text_read_anew_for_each_token(family: str) -> None:
    model = make(family)
    assert is_recurrent(model)
    check_can_continue(model)
    for prompt, found in zip(PROMPTS, continued(model, PROMPTS, Sampling(5, 0.0, 1.0)), strict=True):
        text = list(prompt)
        for _ in range(5):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert found == [text[len(prompt) :]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_continuations_of_a_prompt_do_not_depend_on_the_others_of_its_batch(family: str) -> None:
    model, sampling = make(family), Sampling(4, 1.0, 0.9, num_continuations=3)
    together = continued(model, PROMPTS, sampling)
    assert together == [continued(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert len({tuple(row) for of_prompt in together for row in of_prompt}) > 5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("recurrent_gemma", {"lru_width": 16, "head_dim": 8, "num_hidden_layers": 3}),
        ("rwkv", {"attention_hidden_size": 16}),
    ],
)
def test_a_model_that_hands_on_no_cache_is_refused(family: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ForCausalLM hands on no cache of what it has read.* cannot be evaluated"):
        check_can_continue(make(family, **options))


def test_a_model_of_attention_alone_is_not_recurrent(make_model: Any) -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        assert not is_recurrent(make_model(family))
        check_can_continue(make_model(family))
