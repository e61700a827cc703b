"""Which of two sentences a model finds likelier: against a slow sum over tokens, and what is left out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sentence

from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.sentence_pairs import SentencePairs, beginnings
from sparc3_lightning.evaluation.findings import preference
from sparc3_lightning.evaluation.intervals import paired_difference
from sparc3_lightning.evaluation.metrics import pair_rows
from sparc3_lightning.evaluation.results import Preference
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.likelihood import log_likelihoods

PAIRS = [
    {"sent_more": sentence(i, 4 + i), "sent_less": sentence(50 + i, 5 + i % 3), "bias_type": "ab"[i % 2]}
    for i in range(7)
]


def slow_log_likelihood(model: Any, ids: list[int]) -> float:
    """Sum log P(token | tokens before it), one forward pass a token."""
    total = 0.0
    for end in range(1, len(ids)):
        logits = model(torch.tensor([ids[:end]])).logits[0, -1].double()
        total += (logits[ids[end]] - logits.exp().sum().log()).item()
    return total


def set_up(tokenizer: str, exclude: Any = (), rows: Any = PAIRS, **options: Any) -> SentencePairs:
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = SentencePairs("pairs.jsonl", tokenizer=tokenizer, **options)
    data.setup_pairs(exclude, data.load_tokenizer())
    return data


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_likelihood_of_a_sentence_is_that_of_all_its_tokens_whatever_is_beside_it(
    batch_size, make_model, tiny_checkpoint
):
    model, tokenizer = make_model(), Checkpoint(tiny_checkpoint).tokenizer()
    rows = [
        row
        for batch in set_up(tiny_checkpoint, batch_size=batch_size).test_dataloader()
        for row in pair_rows("baseline", model, batch)
    ]
    expected = {}
    for pair in PAIRS:
        more, less = (
            slow_log_likelihood(model, [1, *tokenizer(pair[f"sent_{name}"])["input_ids"]]) for name in ("more", "less")
        )
        expected[prompt_id(f"{pair['sent_more']}\n{pair['sent_less']}")] = more - less
    assert {row["pair_id"]: row["margin"] for row in rows} == pytest.approx(expected, abs=1e-4)
    share = sum(margin > 0 for margin in expected.values()) / len(expected)
    assert 0 < share < 1, "all alike would test nothing"
    assert preference(rows).baseline.share == share


def test_only_tokens_after_the_first_count(make_model):
    model = make_model()
    ids = torch.tensor([[1, 7, 9, 0], [1, 7, 9, 12]])
    found = log_likelihoods(model, ids, torch.tensor([3, 4]))
    assert found.tolist() == pytest.approx([slow_log_likelihood(model, [1, 7, 9]),
                                            slow_log_likelihood(model, [1, 7, 9, 12])], abs=1e-5)  # fmt: skip


def test_a_filler_of_another_rank_counts_for_nothing(make_model, tiny_checkpoint):
    data = set_up(tiny_checkpoint)
    batch = data.collate([(data.pairs[0], 1), (data.pairs[0], 0)])
    assert len(pair_rows("baseline", make_model(), batch)) == 1


def rows_of(baseline: list[float], pruned: list[float] | None = None) -> list[dict[str, Any]]:
    models = {"baseline": baseline} | ({} if pruned is None else {"pruned": pruned})
    return [
        {"model": m, "pair_id": f"{i:02}", "margin": v} for m, values in models.items() for i, v in enumerate(values)
    ]


def test_before_and_after_are_compared_pair_by_pair():
    before, after = [0.5, 2.0, -1.0, 0.25, 3.0] * 4, [-0.5, 1.0, -2.0, -0.25, 3.0] * 4
    found = preference(rows_of(before, after)[::-1])
    assert (found.baseline.share, found.pruned.share) == (0.8, 0.4)
    assert found.effect.num_better == 8
    assert found.effect.num_worse == 0
    assert found.effect.evidence
    expected = paired_difference(torch.tensor(before), torch.tensor(after))
    assert found.margin_effect.difference.value == expected.difference.value == pytest.approx(-0.7)


def test_equal_likelihoods_are_no_preference_and_what_is_not_finite_is_left_out_and_counted():
    found = preference(rows_of([0.0, 1.0, math.nan, 1.0], [0.0, 1.0, 1.0, -math.inf]))
    assert (found.num_pairs, found.num_failed) == (2, 2)
    assert found.baseline.share == 0.5
    assert preference(rows_of([math.nan])) == Preference(num_pairs=0, num_failed=1)
    assert preference(rows_of([1.0, 2.0])).effect is None


def test_a_pair_that_begins_with_a_prompt_attributed_on_is_left_out_and_counted(tiny_checkpoint):
    first = PAIRS[0]["sent_more"].split()
    used = {prompt_id("  ".join(first[:2])), prompt_id(PAIRS[3]["sent_less"]), prompt_id(PAIRS[5]["sent_more"] + " x")}
    data = set_up(tiny_checkpoint, exclude=used)
    assert data.num_excluded == 2
    assert len(data.pairs) == 5
    assert prompt_id(" ".join(first[:2])) in beginnings(PAIRS[0]["sent_more"])
    data.setup_pairs((), data.load_tokenizer())
    assert (data.num_excluded, len(data.pairs)) == (0, 7)


def test_pairs_are_those_of_one_kind_and_as_many_as_asked_for_each_once(tiny_checkpoint):
    data = set_up(tiny_checkpoint, rows=PAIRS + PAIRS, where={"bias_type": "b"})
    assert len(data.pairs) == 3
    assert data.longest == max(len(pair.more) for pair in data.pairs)
    assert len(set_up(tiny_checkpoint, num_pairs=2).pairs) == 2
    twice = [PAIRS[0], PAIRS[0], *PAIRS[1:]]
    assert {pair.id for pair in set_up(tiny_checkpoint, rows=twice, num_pairs=2).pairs} == {
        pair.id for pair in set_up(tiny_checkpoint, num_pairs=2).pairs
    }
    with pytest.raises(ValueError, match=r"Only 3 pairs are left \(0 begin .* --data.pairs.num_pairs is 4"):
        set_up(tiny_checkpoint, where={"bias_type": "b"}, num_pairs=4)
    with pytest.raises(ValueError, match=r"no text in 'sent_more' or 'stereotype' .*it has \['bias_type', 'sent_less'"):
        set_up(tiny_checkpoint, less_field="stereotype")
    with pytest.raises(ValueError, match=r"--data.pairs.num_pairs must be at least 1, got 0"):
        SentencePairs(num_pairs=0)


@pytest.mark.realdata
def test_the_real_crows_pairs_and_stereoset_give_their_known_numbers_of_pairs(shared, tiny_checkpoint):
    data = shared / "data"
    crows = SentencePairs(str(data / "crows_pairs" / "crows_pairs_anonymized.csv"), tokenizer=tiny_checkpoint)
    crows.setup_pairs((), crows.load_tokenizer())
    assert 1490 <= len(crows.pairs) <= 1508  # pairs that occur again count once
    fields = {"more_field": "stereotype", "less_field": "anti-stereotype"}
    where = {"bias_type": "gender", "type": "intrasentence"}
    stereo = SentencePairs(str(data / "stereoset" / "dev.jsonl"), tokenizer=tiny_checkpoint, where=where, **fields)
    stereo.setup_pairs((), stereo.load_tokenizer())
    assert 250 <= len(stereo.pairs) <= 255
