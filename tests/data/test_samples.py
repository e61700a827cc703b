"""Samples of tokens: how they are padded, batched and told apart."""

import pytest
import torch

from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.toxic_prompts import ToxicPrompts

SAMPLES = [Sample("a", [5, 6]), Sample("b", [7, 8, 9, 10]), Sample("c", [11]), Sample("d", [12, 13, 14])]


def test_samples_are_padded_on_the_right_and_the_mask_tells_padding_apart() -> None:
    batch = pad_right(SAMPLES[:3], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2], [7, 8, 9, 10], [11, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_batches_come_longest_first_and_hold_every_sample_once(batch_size: int, tiny_checkpoint: str) -> None:
    data = ToxicPrompts("unused", batch_size=batch_size, tokenizer=tiny_checkpoint)
    data.samples = SAMPLES
    batches = list(data.predict_dataloader())
    assert [name for batch in batches for name in batch["sample_ids"]] == ["b", "d", "a", "c"]
    assert [len(batch["sample_ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        for name, row, mask in zip(batch["sample_ids"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert row[mask.bool()].tolist() == next(s.input_ids for s in SAMPLES if s.id == name)
    assert (data.longest, data.num_tokens) == (4, 10)


def test_the_fingerprint_depends_on_tokens_their_order_and_where_samples_end() -> None:
    def fingerprint(*rows: list[int]) -> str:
        data = ToxicPrompts("unused")
        data.samples = [Sample(f"name {i}", row) for i, row in enumerate(rows)]
        return data.fingerprint()

    base = fingerprint([1, 2], [3])
    others = [fingerprint([3], [1, 2]), fingerprint([1], [2, 3]), fingerprint([1, 2], [4]), fingerprint([1, 2, 3])]
    assert len({base, *others}) == 5
    data = ToxicPrompts("unused")
    data.samples = [Sample("another name", [1, 2]), Sample("", [3])]
    assert data.fingerprint() == base
