"""A stock generate with the keyed noise draws what an evaluation draws."""

import pytest
import torch

from sparc3_lightning.evaluation.generation import PROTOCOLS, Sampling, continue_prompts, draw_keys
from sparc3_lightning.evaluation.keyed_noise import KeyedNoise

PROMPTS = [[1, 10, 20, 30], [1, 40], [1, 7, 50, 60, 70, 80, 90], [1, 33, 44]]
LONGEST = max(map(len, PROMPTS))
INPUT_IDS = torch.tensor([[0] * (LONGEST - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
ENDS = list(range(2, 30))


def stock(model, keys, sampling, do_sample):
    """Return what transformers' generate writes, each row up to its end, and how long the rows are."""
    noise = KeyedNoise([key for of_prompt in keys for key in of_prompt], LONGEST, sampling.temperature, sampling.top_p)
    repeats = len(keys[0])
    read = {"inputs": INPUT_IDS, "attention_mask": MASK}
    options = {"max_new_tokens": sampling.max_new_tokens, "do_sample": do_sample, "pad_token_id": 0}
    if do_sample:
        options["num_return_sequences"] = repeats
    else:  # which transformers refuses without sampling
        read = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in read.items()}
    written = model.generate(**read, logits_processor=[noise], **options)
    rows = [row[LONGEST:].tolist() for row in written]
    return [row[: next((i for i, token in enumerate(row) if token in ENDS), len(row))] for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(12, 0.7, 0.9), Sampling(12, 1.0, 1.0)])
def test_a_stock_generate_writes_the_continuations_of_an_evaluation(make_model, family, do_sample, sampling):
    model = make_model(family, torch.float32)
    model.generation_config.eos_token_id = ENDS
    keys = [draw_keys(5, f"prompt {i}", 4, 2) for i in range(len(PROMPTS))]
    drawn = continue_prompts(model, INPUT_IDS, MASK, keys, sampling)
    ours = [row.input_ids for of_prompt in drawn for row in of_prompt]
    assert len({len(row) for row in ours}) > 1, "some rows have ended before others"
    assert len(set(map(tuple, ours))) > len(PROMPTS)
    torch.manual_seed(int(do_sample))
    assert stock(model, keys, sampling, do_sample=do_sample) == ours


def test_at_temperature_0_it_is_greedy_decoding(make_model):
    model = make_model("llama", torch.float32)
    greedy = PROTOCOLS["greedy"]
    keys = [draw_keys(0, str(i), 1, 1) for i in range(len(PROMPTS))]
    model.generation_config.eos_token_id = ENDS
    plain = model.generate(INPUT_IDS, attention_mask=MASK, do_sample=False, max_new_tokens=50, pad_token_id=0)
    rows = [row[LONGEST:].tolist() for row in plain]
    expected = [row[: next((i for i, token in enumerate(row) if token in ENDS), len(row))] for row in rows]
    assert stock(model, keys, greedy, do_sample=False) == expected


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"sampling.top_p must be above 0"):
        KeyedNoise([1], 3, top_p=0.0)
    with pytest.raises(ValueError, match="2 keys for 1 rows: give one key a row"):
        KeyedNoise([1, 2], 1)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 9))
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            KeyedNoise([1], 1)(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.0, value]]))
