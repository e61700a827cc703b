"""The data of an evaluation: a text and prompts in one data module."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import IDS, sentence
from prompt_rows import PROMPTS, texts_of

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.models.checkpoints import Checkpoint


@pytest.fixture
def evaluation(tiny_checkpoint: str, prompts: str, tmp_path: Path) -> EvaluationData:
    """A text and prompts."""
    (tmp_path / "words.txt").write_text(sentence(7, 100))
    text = WikiText2("words.txt", window=16, stride=4, tokenizer=tiny_checkpoint)
    return EvaluationData(text, RealToxicityPrompts(prompts, num_prompts=3, tokenizer=tiny_checkpoint))


def test_the_text_is_read_before_the_prompts_in_one_loop(evaluation: EvaluationData) -> None:
    evaluation.prepare_data()
    evaluation.setup("test")
    windows, prompts = evaluation.test_dataloader()
    assert sum(len(batch["windows"]) for batch in windows) == len(evaluation.text.windows) > 0
    assert sum(len(batch["prompts"]) for batch in prompts) == 3


def test_a_second_setup_changes_nothing(evaluation: EvaluationData) -> None:
    evaluation.setup("test")
    windows, prompts = evaluation.text.windows, evaluation.prompts.prompts
    evaluation.setup("test")
    assert evaluation.text.windows is windows
    assert evaluation.prompts.prompts is prompts


@pytest.fixture
def other_tokenizer(tiny_checkpoint: str, tmp_path: Path) -> str:
    """The words of the tiny checkpoint in reverse order."""
    file = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"), "tokenizer.json")
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {word: len(IDS) + 7 - number for word, number in IDS.items()}
    file.write_text(json.dumps(content))
    return str(file.parent)


def in_the_hands_of(data: Any, checkpoint: str, stage: str) -> Any:
    """Set data up as a trainer does for a module with a checkpoint."""
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(checkpoint=Checkpoint(checkpoint)))
    data.setup(stage)
    return data


def test_a_second_checkpoint_with_the_same_data_module_gets_tokens_of_its_own(
    evaluation: EvaluationData, prompts: str, tiny_checkpoint: str, other_tokenizer: str
) -> None:
    evaluation.text.tokenizer = evaluation.prompts.tokenizer = None
    samples = ToxicPrompts(prompts, num_samples=3)
    in_the_hands_of(evaluation, tiny_checkpoint, "test")
    in_the_hands_of(samples, tiny_checkpoint, "predict")
    text, first = evaluation.text.input_ids, [sample.input_ids for sample in samples.samples]
    in_the_hands_of(evaluation, other_tokenizer, "test")
    in_the_hands_of(samples, other_tokenizer, "predict")
    assert evaluation.text.input_ids.tolist() == [len(IDS) + 7 - i for i in text.tolist()]
    assert evaluation.prompts.tokens.tokenizer.name_or_path == other_tokenizer
    assert [sample.input_ids for sample in samples.samples] == [[len(IDS) + 7 - i for i in ids] for ids in first]
    before = samples.samples
    assert in_the_hands_of(samples, other_tokenizer, "predict").samples is before


def test_the_prompts_that_the_module_excludes_are_left_out(evaluation: EvaluationData, tiny_checkpoint: str) -> None:
    evaluation.text.tokenizer = evaluation.prompts.tokenizer = None
    excluded = {prompt_id(PROMPTS[5])}
    module = SimpleNamespace(checkpoint=Checkpoint(tiny_checkpoint), excluded_prompts=excluded)
    evaluation.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    evaluation.setup("test")
    assert texts_of(evaluation.prompts) == {PROMPTS[i] for i in (0, 3, 6)}
    assert evaluation.prompts.num_excluded == 1


def test_a_missing_file_of_either_kind_is_an_error_before_anything_is_loaded(evaluation: EvaluationData) -> None:
    for part in (evaluation.text, evaluation.prompts):
        source, part.source = part.source, "missing.txt"
        with pytest.raises(FileNotFoundError, match=r"'missing.txt' does not exist"):
            evaluation.prepare_data()
        part.source = source
