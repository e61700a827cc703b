"""Evaluation of no prompts, or of no text: refused before the model is loaded."""

from pathlib import Path

import pytest
from evaluations import data, evaluation, run

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files", "no_model_is_loaded")


@pytest.mark.parametrize("num_prompts", [None, 3])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_of_prompts_is_refused(content, num_prompts, tiny_checkpoint):
    Path("empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl") as raised:
        run(evaluation(tiny_checkpoint), data(source="empty.jsonl", num_prompts=num_prompts))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("num_prompts", [None, 3])
def test_a_range_of_toxicity_that_leaves_no_prompt_is_refused(num_prompts, tiny_checkpoint):
    with pytest.raises(ValueError, match=r"^Only 0 prompts .*--data\.prompts\.num_prompts is .*: widen the range"):
        run(evaluation(tiny_checkpoint), data(num_prompts=num_prompts, min_toxicity=0.999, max_toxicity=1.0))


def test_a_filter_that_leaves_no_prompt_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="where"):
        run(evaluation(tiny_checkpoint), data(num_prompts=None, where={"kind": "none of these"}))
