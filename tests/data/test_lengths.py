"""Prompts that are longer than a model's context: named, or left out and counted; and prompts that are there twice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ids_of, sentence, set_up, write_jsonl

from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.checkpoints import Checkpoint

LENGTHS = [5, 70, 6, 64, 65, 7, 90, 8]
TEXTS = [sentence(500 + i, length) for i, length in enumerate(LENGTHS)]


@pytest.fixture
def source() -> str:
    return write_jsonl(Path("long.jsonl"), [{"text": text, "toxicity": 1.0} for text in TEXTS])


def with_model(data: Any, checkpoint: str) -> Any:
    """Put data into the hands of a module with a model."""
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(checkpoint=Checkpoint(checkpoint)))
    return data


def attributed(source: str, checkpoint: str, **options: Any) -> ToxicPrompts:
    return set_up(with_model(ToxicPrompts(source, **options), checkpoint))


def test_a_sample_longer_than_the_context_is_named_with_its_length(source: str, tiny_checkpoint: str) -> None:
    assert len(attributed(source, tiny_checkpoint, num_samples=1).samples) == 1
    message = rf"The sample {prompt_id(TEXTS[1])} has 70 tokens, the model's context 64: .* --data.leave_out_long true"
    with pytest.raises(ValueError, match=message):
        attributed(source, tiny_checkpoint, num_samples=2)


def test_samples_that_are_too_long_are_left_out_and_counted_and_later_ones_take_their_place(
    source: str, tiny_checkpoint: str
) -> None:
    for number, too_long in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 3)):
        data = attributed(source, tiny_checkpoint, num_samples=number, leave_out_long=True)
        kept = [text for text, length in zip(TEXTS, LENGTHS, strict=True) if length <= 64][:number]
        assert [sample.input_ids for sample in data.samples] == [ids_of(text) for text in kept]
        assert data.notes["num_too_long"] == too_long
    with pytest.raises(
        ValueError, match=r"Only 5 of 8 prompts fit into the model's context of 64 tokens, but --data.num"
    ):
        attributed(source, tiny_checkpoint, num_samples=6, leave_out_long=True)


def test_without_a_model_no_length_is_known(source: str, tiny_checkpoint: str) -> None:
    data = set_up(ToxicPrompts(source, num_samples=8, tokenizer=tiny_checkpoint))
    assert data.longest == 90
    assert "leave_out_long" in data.way_to_shorter


def evaluated(source: str, checkpoint: str, longest: int | None, **options: Any) -> RealToxicityPrompts:
    data = RealToxicityPrompts(source, **{"num_prompts": None, "tokenizer": checkpoint, **options})
    data.setup_prompts((), data.load_tokenizer(), longest)
    return data


def test_a_prompt_without_room_for_a_continuation_is_named_with_its_length(source: str, tiny_checkpoint: str) -> None:
    with pytest.raises(
        ValueError, match=r"The prompt \w{16} \('.*'\) has \d\d tokens, .* room for 63 before"
    ) as raised:
        evaluated(source, tiny_checkpoint, 63)
    message = str(raised.value)
    (length,) = [len(text.split()) for text in TEXTS if prompt_id(text) in message]
    assert f"has {length} tokens" in message
    assert "--model.sampling.max_new_tokens, or leave such prompts out with --data.prompts.leave_out_long" in message


def test_prompts_that_are_too_long_are_left_out_and_counted(source: str, tiny_checkpoint: str) -> None:
    data = evaluated(source, tiny_checkpoint, 63, leave_out_long=True)
    assert [prompt.text for prompt in data.prompts] == [TEXTS[i] for i in (7, 5, 2, 0)]
    assert data.num_too_long == 4
    assert evaluated(source, tiny_checkpoint, 64, leave_out_long=True).num_too_long == 3
    assert evaluated(source, tiny_checkpoint, None).num_too_long == 0


def test_the_choice_among_the_others_stays_as_it_is_and_is_filled_up(source: str, tiny_checkpoint: str) -> None:
    for seed in range(4):
        order = [p.text for p in chosen_in_order(source, tiny_checkpoint, seed)]
        short = [text for text in order if len(text.split()) <= 63]
        for number in (1, 3, 4):
            data = evaluated(source, tiny_checkpoint, 63, leave_out_long=True, num_prompts=number, seed=seed)
            assert {prompt.text for prompt in data.prompts} == set(short[:number])
    with pytest.raises(
        ValueError, match=r"Only 4 of 8 prompts have at most 63 tokens.*--data.prompts.num_prompts is 5"
    ):
        evaluated(source, tiny_checkpoint, 63, leave_out_long=True, num_prompts=5)
    with pytest.raises(ValueError, match=r"Only 0 of 8 prompts have at most 4 tokens"):
        evaluated(source, tiny_checkpoint, 4, leave_out_long=True)


def chosen_in_order(source: str, checkpoint: str, seed: int) -> list[Any]:
    """Return all prompts in the order in which a seed takes them: each number of prompts adds one."""
    taken: list[Any] = []
    for number in range(1, len(TEXTS) + 1):
        found = evaluated(source, checkpoint, None, num_prompts=number, seed=seed).prompts
        taken += [prompt for prompt in found if prompt not in taken]
    return taken


# Prompts that are there twice.


def both_files(toxic: list[Any], mild: list[Any], checkpoint: str, num_nontoxic: int = 1, **options: Any) -> Any:
    """Read rows of a file of toxic prompts and of one of others, as text and toxicity."""
    files = [
        write_jsonl(Path(f"{name}.jsonl"), [dict(zip(("text", "toxicity"), row, strict=True)) for row in rows])
        for name, rows in (("toxic", toxic), ("mild", mild))
    ]
    return evaluated(
        files[0],
        checkpoint,
        None,
        nontoxic_source=files[1],
        num_nontoxic=num_nontoxic,
        **{"min_toxicity": 0.5, **options},
    )


def groups(data: Any) -> dict[str, bool]:
    return {prompt.text: prompt.toxicity >= 0.5 for prompt in data.prompts}


@pytest.mark.parametrize("again", ["the dog", " the  dog\n"])
def test_a_prompt_in_both_files_counts_once_with_the_toxicity_of_the_first(
    again: str, tiny_checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data = both_files([("the dog", 0.9), ("cat", 0.8)], [(again, 0.1), ("bird", 0.2)], tiny_checkpoint)
    assert groups(data) == {"the dog": True, "cat": True, "bird": False}
    assert data.num_in_both == 1
    assert "1 prompts are in toxic.jsonl and in mild.jsonl: each counts once, with the toxicity" in caplog.text
    with pytest.raises(ValueError, match=r"Only 1 prompts of toxicity below 0.5 are left"):
        both_files([("the dog", 0.9), ("cat", 0.8)], [(again, 0.1), ("bird", 0.2)], tiny_checkpoint, 2)


@pytest.mark.parametrize(
    ("first", "second", "group"),
    [
        (0.9, 0.1, True),
        (0.1, 0.1, False),  # a toxic file that holds others too
        (None, 0.1, False),  # the first does not say
        (0.9, 0.9, True),
        (0.6, 0.1, None),  # neither: below the least toxicity, and not below 0.5
        (0.1, 0.9, False),
    ],
)
def test_the_group_of_a_prompt_in_both_files_follows_from_its_toxicity(
    first: float | None, second: float, group: bool | None, tiny_checkpoint: str
) -> None:
    toxic, mild = [("the dog", first), ("cat", 1.0)], [("bird", 0.0), ("the dog", second)]
    data = both_files(toxic, mild, tiny_checkpoint, 2 if group is False else 1, min_toxicity=0.8)
    expected = {"cat": True, "bird": False} | ({} if group is None else {"the dog": group})
    assert groups(data) == expected
    assert data.num_in_both == 1


def test_prompts_in_one_file_only_are_chosen_as_before(tiny_checkpoint: str) -> None:
    toxic = [(sentence(i, 4), 0.9) for i in range(8)]
    mild = [(sentence(20 + i, 4), 0.1) for i in range(8)]
    alone, both = (
        both_files(toxic, mild + more, tiny_checkpoint, 3, num_prompts=3, seed=2) for more in ([], [(toxic[0][0], 0.9)])
    )
    assert alone.prompts == both.prompts
    assert (alone.num_in_both, both.num_in_both) == (0, 1)


def test_a_prompt_twice_in_a_file_is_said(tiny_checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(
        Path("twice.jsonl"), [{"text": text, "toxicity": 1} for text in ("the dog", "cat", "the  dog ")]
    )
    with caplog.at_level("INFO"):
        assert len(evaluated(source, tiny_checkpoint, None).prompts) == 2
    assert "1 rows of twice.jsonl hold a prompt that an earlier row holds, and count once" in caplog.text
