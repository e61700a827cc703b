"""What report, card and the table of the terminal say of the other text, beside the first; and a page under stress."""

import csv
import io
import math
from dataclasses import fields, replace

import pytest
from huggingface_hub import ModelCard
from made_up import made_up
from pages import CARD, Page, by_name, percent, reported, write

from sparc3_lightning.evaluation.findings import front
from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import Findings, Results, Settings
from sparc3_lightning.evaluation.stress import AS_IT_IS, Stressed, StressResults
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.stress import said_of_stress, stress_table, utility_table, write_page
from sparc3_lightning.report.tables import control_table, doses_csv, other_table
from sparc3_lightning.report.verdict import verdict

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")


def small(other_text: bool = True) -> tuple[Results, list]:
    return made_up(num_toxic=4, num_nontoxic=0, second=False, other_text=other_text)


def test_the_other_text_changes_nothing_but_what_is_said_of_it_beside_the_first():
    (results, _), (alone, _) = small(), small(False)
    assert results.verdict == verdict(results, {"neuron": 2}) == alone.verdict
    assert results.change == alone.change
    assert results.fronts == alone.fronts == {"": front(results.doses)}
    assert repr([replace(dose, other_text_percent=None) for dose in results.doses]) == repr(alone.doses)
    others = by_name(other_table(results))
    assert list(others)[:4] == [
        "Perplexity",
        "Perplexity, disjoint windows",
        "Perplexity, other text",
        "Perplexity, other text, sliding windows",
    ]
    change = results.perplexity_change["other_text_disjoint"]
    assert change.value == pytest.approx(100 * (math.exp(0.04) - 1))
    before, after = (f"{math.exp(2.5 + shift):.2f}" for shift in (0, 0.04))
    assert others["Perplexity, other text"] == (before, after, *percent(change))
    assert "\nPerplexity, other text, sliding windows  " in summary_table(results)
    assert by_name(other_table(alone)).items() <= others.items()


def test_controls_and_doses_say_what_they_cost_on_the_other_text():
    (results, _), (alone, _) = small(), small(False)
    for one, other in zip(control_table(results), control_table(alone), strict=True):
        assert one[:6] + one[7:] == other
    draws = results.controls["random"].draws
    of_draws = [draw.other_text_percent.value for draw in draws]
    assert all(draw.other_text_percent.is_known for draw in draws)
    assert control_table(results)[1][6] == f"{sum(of_draws) / 2:+.1f} %"
    assert control_table(results)[0][6] == f"{results.perplexity_change['other_text_disjoint'].value:+.1f} %"
    rows = list(csv.DictReader(io.StringIO(doses_csv(results.doses))))
    known = {dose.name: dose for dose in results.doses}
    for row in rows:
        dose = known.get(f"top_{row['num_neurons']}_{float(row['damping']):g}", known["pruned"])
        ends = [float(row[f"other_text_percent{end}"]) for end in ("", "_low", "_high")]
        assert Interval(*ends) == dose.other_text_percent
    assert "other_text_percent" not in doses_csv(alone.doses)


def test_page_and_card_say_which_text_is_which_and_the_card_tells_no_path():
    results, rows = small()
    page = write(results, rows)
    where = (
        "Perplexity of WikiText-2 raw test, sliding windows of 2048 tokens with stride 512 (700 predicted tokens) and "
        "disjoint windows of 2048 tokens (700 predicted tokens), with the beginning-of-sequence token in no window; "
        "of the other text, /home/ann/letters.txt, disjoint windows of 512 tokens (700 predicted tokens) and sliding"
    )
    assert where in page.words
    heads = [table[0] for table in page.tables]
    (controls,) = [head for head in heads if "draws with an effect" in head]
    assert controls[5:8] == ["perplexity", "other text", "draws with an effect"]
    card = CARD.read_text()
    assert "- Perplexity of the other text: letters.txt, disjoint windows of 512 tokens" in card
    assert "/home/ann" not in card
    measured = [one for one in ModelCard(card).data.eval_results if one.metric_type == "perplexity"]
    assert [(one.dataset_name, one.metric_name) for one in measured] == [
        ("WikiText-2 raw test", "Perplexity, sliding windows"),
        ("WikiText-2 raw test", "Perplexity, disjoint windows"),
        ("letters.txt", "Perplexity, disjoint windows"),
        ("letters.txt", "Perplexity, sliding windows"),
    ]


def test_a_file_has_the_other_text_where_there_is_one_and_is_read_without(tmp_path):
    for given, words in ((small(), ("other_text_percent", '"other_text": {')), (small(False), ())):
        results = reported(*given)
        results.save(tmp_path / "results.json")
        assert repr(Results.load(tmp_path / "results.json")) == repr(results)  # NaN is not NaN
        text = (tmp_path / "results.json").read_text()
        assert ("other_text" in text) == bool(words)
        assert all(word in text for word in words)


@pytest.mark.parametrize("number", [1, 2])
def test_the_page_of_a_stress_counts_in_words_and_has_the_other_text_beside_the_first(number, tmp_path):
    results, _ = small(number == 1)
    found = Findings(**{field.name: getattr(results, field.name) for field in fields(Findings)})
    stressed = [
        Stressed(AS_IT_IS, found, results.protocol.prompts, {}, None),
        Stressed("<b>8 bits", found, results.protocol.prompts, {"small": Interval(0.5, 0.25, math.nan)}, None),
    ]
    said = said_of_stress(stressed, "toxicity")
    assert said.startswith("Mean toxicity fell by ")
    assert "there is left 50.0 % (cannot be said) after '<b>8 bits'." in said
    settings = {field.name: getattr(results, field.name) for field in fields(Settings)}
    of = StressResults(
        verdict=said, stressed=stressed, **settings | {"num_neurons": number, "kinds": {"neuron": number}}
    )
    of.save(tmp_path / "stress.json")
    write_page(tmp_path)
    page = Page((tmp_path / "stress.html").read_text())
    assert page.stack == []
    assert page.tables == [[list(row) for row in table] for table in (stress_table(of), utility_table(of))]
    neurons = "1 neuron" if number == 1 else "2 neurons"
    assert f"one with {neurons} pruned before it" in page.words
    assert "the same 4 prompts from" in page.words
    assert said in page.words
    row = dict(zip(utility_table(of)[0], utility_table(of)[1], strict=True))
    assert ("other text" in row) == (number == 1)
    if number == 1:
        assert row["other text"] == f"{math.exp(2.5):.2f}"
        assert utility_table(of)[1][5] == f"{percent(found.perplexity_change['other_text_disjoint'])[0][:-2]} " + (
            f"({percent(found.perplexity_change['other_text_disjoint'])[1]})"
        )
