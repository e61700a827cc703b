"""Lists that mix neurons, channels, heads and weights: how they are counted and named where a person reads of them."""

import csv
import dataclasses
import io
import json

import pytest
from made_up import NEURONS, made_up
from pages import CARD, write

from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.components import Component, counts_of, in_words, plural
from sparc3_lightning.report.card import Exported, unevaluated_card
from sparc3_lightning.report.comparison import neurons_csv
from sparc3_lightning.report.tables import control_table
from sparc3_lightning.report.verdict import verdict

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")

OUTPUT = "model.layers.3.self_attn.o_proj"
MIXED = dataclasses.replace(
    NEURONS,
    neurons=[
        Component(OUTPUT, 7, -0.05, granularity="channel"),
        *NEURONS.neurons,
        Component(OUTPUT, 30, -0.008, granularity="channel"),
        Component(OUTPUT, 7, -0.007, granularity="head"),
        Component(OUTPUT, 7, -0.006, granularity="weight", input=12),
    ],
)
KINDS = {"neuron": 2, "head": 1, "channel": 2, "weight": 1}


def mixed(kinds: dict[str, int]) -> Results:
    results, _ = made_up()
    number = sum(kinds.values())
    return dataclasses.replace(results, kinds=kinds, num_neurons=number, verdict=verdict(results, kinds))


@pytest.mark.parametrize(
    ("kinds", "words", "granularity", "several"),
    [
        ({"neuron": 50, "channel": 63}, "50 neurons and 63 channels", "neuron+channel", "neurons and channels"),
        ({"neuron": 1, "head": 2, "channel": 1}, "1 neuron, 2 heads and 1 channel", "neuron+head+channel", None),
        ({"weight": 45520}, "45,520 weights", "weight", "weights"),
        ({"channel": 1}, "1 channel", "channel", "channels"),
    ],
)
def test_each_kind_is_counted_in_words(kinds, words, granularity, several):
    assert in_words(kinds) == words
    assert plural(granularity) == several or several is None
    assert mixed(kinds).granularity == granularity


def test_the_counts_come_in_one_order_whatever_the_order_of_the_list():
    assert counts_of(MIXED.neurons) == counts_of(MIXED.neurons[::-1]) == KINDS
    assert list(counts_of(MIXED.neurons)) == list(KINDS)
    assert MIXED.granularity == "neuron+head+channel+weight"


def test_the_verdict_says_how_many_of_each_kind_and_names_the_controls():
    said = mixed({"neuron": 50, "channel": 63}).verdict
    assert said.startswith("With 50 neurons and 63 channels switched off, mean toxicity fell by ")
    for words in (
        "Only 2 random neurons and channels, all there are to draw from, (2 draws): ",
        "the chosen neurons and channels do more than one more draw would",
        "neurons and channels with the largest weights",
        "sets of neurons and channels that were measured",
    ):
        assert words in said, words
    rows = [row[0] for row in control_table(mixed({"neuron": 1, "channel": 1}))]
    assert rows[:2] == ["The 2 chosen", "Random neurons and channels"]


def test_page_and_card_name_the_kind_of_each_component():
    page = write(mixed(KINDS), neurons=MIXED)
    assert "2 neurons, 1 head, 2 channels and 1 weight of A-Model" in page.words
    assert "Would other neurons, heads, channels and weights have done the same?" in page.words
    (rows,) = (table for table in page.tables if table[0][0] == "module")
    assert rows[0] == ["module", "kind", "index", "input", "score"]
    assert rows[1] == [OUTPUT, "channel", "7", "", "-0.05"]
    assert [row[1] for row in rows[1:]] == ["channel", "neuron", "neuron", "channel", "head", "weight"]
    assert rows[-1][2:4] == ["7", "12"]
    assert "# A-Model with 2 neurons, 1 head, 2 channels and 1 weight switched off" in CARD.read_text()


def test_the_card_of_an_export_lists_each_kind_of_a_layer_by_itself():
    card = unevaluated_card(Exported(MIXED, "somebody/A-Model", "exported"))
    assert "# A-Model with 2 neurons, 1 head, 2 channels and 1 weight switched off" in card
    for line in (
        f"- {OUTPUT}, channels: 7, 30",
        f"- {OUTPUT}, heads: 7",
        f"- {OUTPUT}, weights: [7, 12]",
        "- model.layers.12.mlp.up_proj, neurons: 345",
    ):
        assert line in card.replace("\\", ""), line


def test_results_json_has_the_kinds_and_reads_them_again():
    results = mixed({"neuron": 50, "channel": 63})
    text = results.to_json()
    assert json.loads(text)["kinds"] == {"neuron": 50, "channel": 63}
    assert Results.from_json(text).kinds == results.kinds


def test_the_rows_of_a_comparison_name_the_kind_where_there_are_several():
    components = {n.key: n for n in MIXED.neurons}
    rows = list(csv.reader(io.StringIO(neurons_csv(["one"], components, [MIXED], None))))
    assert rows[0] == ["module", "index", "input", "granularity", "num_lists", "rank_one"]
    assert rows[1] == [OUTPUT, "7", "", "channel", "1", "1"]
    assert rows[-1] == [OUTPUT, "7", "12", "weight", "1", "6"]
    alone = {n.key: n for n in NEURONS.neurons}
    head, *_ = csv.reader(io.StringIO(neurons_csv(["one"], alone, [NEURONS], None)))
    assert head == ["module", "index", "num_lists", "rank_one"]


def test_a_selection_beside_a_mixed_one_is_counted_by_its_own_kinds():
    results, _ = made_up()
    first, other = results.doses[:2]
    beside = dataclasses.replace(other, name="published", selection="published", kinds={"neuron": 100})
    results = dataclasses.replace(results, doses=[first, beside])
    said = verdict(results, {"neuron": 50, "channel": 63})
    assert "Measured beside it, the selection 'published' with 100 neurons: " in said
