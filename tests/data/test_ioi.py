"""Sentences of indirect object identification: what is right in them, and which tokenizers and numbers are refused."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import words_tokenizer

from sparc3_lightning.attribution.targets import last_logits, logit_difference, target_of
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.ioi import IOI, NAMES, OBJECTS, PLACES, TEMPLATES, name_tokens, sentence_id
from sparc3_lightning.data.tokens import Tokens

TOKENIZER = words_tokenizer()


def read(**options: Any) -> list[Any]:
    return IOI(**options).read_samples(TOKENIZER)


def words_of(ids: list[int]) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("order", ["abba", "baba"])
def test_the_indirect_object_is_named_once_and_the_subject_twice_in_the_order_asked_for(order):
    samples = read(num_samples=60, order=order)
    for sample in samples:
        names = [word for word in words_of(sample.input_ids) if word in NAMES]
        indirect, subject = words_of(list(sample.contrast))
        assert names == ([indirect, subject, subject] if order == "abba" else [subject, indirect, subject])
        assert words_of(sample.input_ids)[-1] == "to"
        assert sample.id == sentence_id(_text(sample))


def _text(sample: Any) -> str:
    return re.sub(r" ([,.])", r"\1", " ".join(words_of(sample.input_ids)))


def test_both_orders_come_alike_often_and_every_sentence_once():
    samples = read(num_samples=300)
    orders = Counter(
        next(word for word in words_of(s.input_ids) if word in NAMES) == words_of([s.contrast[0]])[0] for s in samples
    )
    assert orders == {True: 150, False: 150}
    assert len({tuple(sample.input_ids) for sample in samples}) == len({sample.id for sample in samples}) == 300


def test_a_seed_gives_the_same_sentences_again_and_another_seed_others():
    assert read(seed=3) == read(seed=3)
    assert not {sample.id for sample in read(seed=3)} & {sample.id for sample in read(seed=4)}


def test_every_template_and_word_is_used_and_names_all_three_people():
    for template in TEMPLATES:
        assert all(template.count(f"{{{slot}}}") == 1 for slot in ("A", "B", "S", "place", "object"))
        assert template.index("{A}") < template.index("{B}") < template.index("{S}")
        assert template.endswith(" to")
    seen = {word for sample in read(num_samples=1000) for word in words_of(sample.input_ids)}
    assert {*NAMES, *PLACES, *OBJECTS} <= seen
    assert all(len(set(words)) == len(words) for words in (NAMES, PLACES, OBJECTS, TEMPLATES))


def test_no_sentence_begins_with_a_name_which_many_tokenizers_give_another_token_there():
    assert len(TEMPLATES) == 15
    assert not any(template.startswith("{") for template in TEMPLATES)
    assert all(template[template.index(slot) - 1] == " " for template in TEMPLATES for slot in ("{A}", "{B}", "{S}"))


def test_names_that_are_no_token_are_not_used_and_too_few_are_refused():
    data = IOI(num_samples=200)
    samples = data.read_samples(words_tokenizer(NAMES[:12]))
    assert data.notes["num_names"] == 12
    assert len({token for sample in samples for token in sample.contrast}) == 12
    with pytest.raises(ValueError, match=r"Only 9 of 60 names are one token .* 10 are needed"):
        name_tokens(Tokens(words_tokenizer(NAMES[:9])))


@pytest.mark.parametrize(("number", "complaint"), [(0, "at least 1, got 0"), (10**9, "at most")])
def test_a_number_of_sentences_out_of_bounds_is_refused(number, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(num_samples=number)


# The target.


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_logit_difference_is_that_of_the_two_tokens_after_the_last_word(make_model, family):
    samples = read(num_samples=6)
    model, batch = make_model(family, vocab_size=len(TOKENIZER)), pad_right(samples, 0)
    assert batch["is_padded"]
    found = logit_difference(model, batch["input_ids"], batch["attention_mask"], batch["contrast"])
    for value, sample in zip(found, samples, strict=True):
        logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(value, logits[sample.contrast[0]] - logits[sample.contrast[1]])
    by_name = target_of(model, "logit_difference", batch, batch["attention_mask"], torch.tensor([]))
    assert torch.equal(by_name, found)
    largest = last_logits(model, batch["input_ids"], batch["attention_mask"]).max(dim=-1).values
    assert torch.equal(target_of(model, "argmax", batch, batch["attention_mask"], torch.tensor([])), largest)


def test_data_without_two_tokens_to_compare_are_refused_for_that_target():
    data = C4("documents.txt", num_samples=1)
    data.samples = [Sample("a", [1, 2])]
    data.check_target("argmax")
    with pytest.raises(ValueError, match="C4 does not give a right and a wrong next token"):
        data.check_target("logit_difference")
