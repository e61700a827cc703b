"""Every decoder architecture of transformers: what the tool does for it is right, and stands in architectures.md."""

import re

import pytest
import transformers
from decoders import ENCODERS, EXAMPLES, EXTRA, MULTIMODAL, NOT_BUILT, WITH_TEXT, architectures
from support import DOCUMENT, is_same, last_line, measure, read_rows
from transformers import CONFIG_MAPPING

from sparc3_lightning.models.architectures import check_is_text

BUILT = [name for name in architectures() if name not in NOT_BUILT]
of_this_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in DOCUMENT.read_text(),
    reason="the document is of another version of transformers",
)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BUILT)
def test_an_architecture_is_scored_pruned_and_exported_or_refused_by_a_sentence(model_type):
    row = measure(model_type)
    if f"transformers {transformers.__version__}," in DOCUMENT.read_text():
        written = read_rows(DOCUMENT.read_text())[model_type]
        assert is_same(row, written), f"{row}: write the document again, by `python tests/support.py`"


@of_this_version
def test_the_document_has_a_row_for_every_architecture_that_is_built_and_counts_them():
    text = DOCUMENT.read_text()
    rows = read_rows(text)
    assert list(rows) == BUILT
    assert text.splitlines()[-1] == last_line(list(rows.values()))
    assert len(rows) >= 150


@of_this_version
def test_what_is_not_built_since_it_has_other_parts_is_refused_by_its_config():
    no_input_by_layer = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    options = {"gemma4_assistant": {"text_config": {**no_input_by_layer, "num_kv_shared_layers": 30}}}
    for name in (*WITH_TEXT, *MULTIMODAL, *ENCODERS):
        with pytest.raises(ValueError, match="an encoder and a decoder" if name in ENCODERS else "is multimodal"):
            check_is_text(name, CONFIG_MAPPING[name](**options.get(name, {})))
    assert {f"{name}_text" for name in WITH_TEXT} <= set(BUILT)


@of_this_version
def test_all_that_is_said_of_architectures_is_of_those_there_are():
    assert {*EXTRA, *EXAMPLES} <= set(BUILT)
    assert set(NOT_BUILT) <= set(architectures())


def test_the_readme_counts_them_as_the_document_does():
    with_lrp, with_experts, *_ = re.findall(r"\d+", DOCUMENT.read_text().splitlines()[-1])
    said = f"[{with_lrp} architectures](configs/architectures.md), {with_experts} of them with experts"
    assert said in " ".join((DOCUMENT.parents[1] / "README.md").read_text().split())
