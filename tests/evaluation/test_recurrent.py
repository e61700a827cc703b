"""Models that keep a state of what they have read: they continue a prompt alike whatever else is in its batch."""

from typing import Any

import pytest
import torch
from decoders import build

from sparc3_lightning.evaluation.generation import Sampling, check_can_continue, continue_prompts, draw_keys
from sparc3_lightning.models.architectures import is_recurrent

# Their blocks have convolutions, state spaces or linear attention, all but Mamba's in turn with attention.
FAMILIES = ("granitemoehybrid", "lfm2", "mamba", "nemotron_h", "qwen3_5_text", "qwen3_next")
PROMPTS = [[5, 9, 7], [11, 12, 13, 14, 15, 16], [8]]


def make(family: str, **options: Any) -> Any:
    model = build(family, **options)
    model.generation_config.eos_token_id = None
    return model


def continued(model: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[list[int]]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    keys = [draw_keys(0, str(prompt), sampling.num_continuations, sampling.per_seed) for prompt in prompts]
    found = continue_prompts(model, ids, (ids > 0).long(), keys, sampling)
    return [[continuation.input_ids for continuation in of_prompt] for of_prompt in found]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(2)
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
@pytest.mark.few(2)
def test_greedy_continuations_are_those_of_transformers(family: str) -> None:
    model = make(family)
    for prompt, found in zip(PROMPTS, continued(model, PROMPTS, Sampling(6, 0.0, 1.0)), strict=True):
        ids, options = torch.tensor([prompt]), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert found == expected[:, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(2)
def test_the_continuations_of_a_prompt_do_not_depend_on_the_others_of_its_batch(family: str) -> None:
    model, sampling = make(family), Sampling(4, 1.0, 0.9, num_continuations=3)
    together = continued(model, PROMPTS, sampling)
    assert together == [continued(model, [prompt], sampling)[0] for prompt in PROMPTS]
    assert len({tuple(row) for of_prompt in together for row in of_prompt}) > 5


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("recurrent_gemma", {"num_hidden_layers": 3}),
        ("rwkv", {}),
    ],
)
def test_a_model_that_hands_on_no_cache_is_refused(family: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ForCausalLM hands on no cache of what it has read.* cannot be evaluated"):
        check_can_continue(make(family, **options))


def test_a_model_of_attention_alone_is_not_recurrent(make_model: Any) -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        assert not is_recurrent(make_model(family))
        check_can_continue(make_model(family))
