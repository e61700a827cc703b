"""The pictures: what they show, and that nothing in them is cut off or covered."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import replaced_at
from made_up import NEURONS, SELECTION, SELECTION_OF_NEURONS, made_up
from pages import check_texts, reported

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.models.architectures import layer_of
from sparc3_lightning.report import figures
from sparc3_lightning.report.figures import (
    AFTER,
    CONTROL,
    Row,
    change_rows,
    draw_changes,
    draw_differential,
    draw_doses,
    draw_layers,
    draw_scatter,
)
from sparc3_lightning.report.page import write_report

PNG = b"\x89PNG\r\n\x1a\n"
WIDTH = 960  # pixels: sharp on a phone of 390 with two pixels each


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that a test draws, instead of files."""
    found: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


def bars(axes: Any) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the ends of all error bars of a picture."""
    segments = [collection.get_segments() for collection in axes.collections if hasattr(collection, "get_segments")]
    return [tuple(map(tuple, segment)) for segment in itertools.chain(*segments) if len(segment)]


def points(axes: Any, marker: str = "o") -> list[tuple[float, float]]:
    """Return the points that are drawn with a marker."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [point for line in lines for point in zip(*(map(float, data) for data in line.get_data()), strict=True)]


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.31.mlp.up_proj", 31),
        ("model.language_model.layers.7.mlp.gate_proj", 7),
        ("transformer.h.11.mlp.c_fc", 11),
        ("lm_head", 0),
    ],
)
def test_the_layer_is_read_off_the_name_of_the_module(module, layer):
    assert layer_of(module) == layer


def test_a_report_comes_with_all_its_pictures_as_png():
    results, rows = made_up()
    SELECTION_OF_NEURONS.save(Path("prune/selection.json"))
    write_report(Path("out/report.html"), reported(results, rows, NEURONS, Path("prune")), rows)
    pictures = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    assert set(pictures) == {
        f"{name}.png" for name in ("layers", "differential", "toxicity", "perplexity", "doses", "scatter")
    }
    for content in pictures.values():
        assert content.startswith(PNG)
        assert int.from_bytes(content[16:20], "big") == WIDTH


# The changes


def test_a_change_is_a_point_with_its_interval(drawn):
    draw_changes([Row("a", AFTER, Interval(-40.0, -80.0, 60.0)), Row("b", CONTROL, Interval(5.0, 1.0, 9.0))], Path("x"))
    axes = drawn[0].axes[0]
    assert points(axes) == [(-40.0, 0.0), (5.0, 1.0)]
    assert bars(axes) == [((-80.0, 0.0), (60.0, 0.0)), ((1.0, 1.0), (9.0, 1.0))]
    assert points(axes, "<") == points(axes, ">") == []
    left, right = axes.get_xlim()
    assert left < -80
    assert right > 60
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    low, high = axes.get_ylim()
    assert low > high, "the first row is on top"


def test_an_interval_that_need_not_hold_its_figure_has_no_negative_bar(drawn):
    draw_changes([Row("a", AFTER, Interval(5.0, 6.0, 9.0))], Path("x"))
    assert bars(drawn[0].axes[0]) == [((5.0, 0.0), (9.0, 0.0))]


@pytest.mark.parametrize("high", [math.nan, math.inf, 900.0])
def test_an_interval_without_an_end_or_a_far_one_runs_into_an_arrow(drawn, high):
    draw_changes([Row("a", AFTER, Interval(-40.0, -80.0, high))], Path("x"))
    axes = drawn[0].axes[0]
    right = axes.get_xlim()[1]
    assert 100 < right < 150, "far enough to see that it is long, and near enough to read the figure"
    assert points(axes, ">") == [(right, 0.0)]
    assert bars(axes)[0][0] == (-80.0, 0.0)
    assert bars(axes)[0][1] == pytest.approx((right, 0.0))


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_a_change_that_is_not_known_is_a_row_without_a_point(drawn, unknown):
    rows = [Row("a", AFTER, Interval(unknown, unknown, unknown)), Row("b", AFTER, Interval(5.0, unknown, unknown))]
    draw_changes(rows, Path("x"))
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    assert len(axes.get_yticklabels()) == 2
    assert [point for point in points(axes) if math.isfinite(point[0])] == [(5.0, 1.0)]
    assert all(a == b for a, b in bars(axes) if math.isfinite(a[0]))


def test_a_picture_of_no_change_at_all_has_a_width(drawn):
    draw_changes([Row("a", AFTER, Interval(0.0, 0.0, 0.0))], Path("x"))
    left, right = drawn[0].axes[0].get_xlim()
    assert left < 0 < right


def test_the_rows_are_the_pruned_model_by_every_judge_and_the_controls_with_their_values():
    results, _ = made_up()
    toxicity, perplexity = change_rows(results)
    effects, second = results.effects, results.judges["other"].effects
    assert [row.label.split("\n")[0] for row in toxicity] == [
        "2 chosen",
        "by other",
        "random",
        "least relevant",
        "largest weights",
    ]
    assert [row.change for row in toxicity[:2]] == [of["toxic"].behavior_mean.percent for of in (effects, second)]
    for row, control in zip(toxicity[2:], results.controls.values(), strict=True):
        assert row.change == control.outcome.effect_percent
        assert list(row.draws) == [draw.effect.percent.value for draw in control.draws]
    mean = results.main_effect
    assert toxicity[0].label.split("\n")[1] == f"{mean.before:.3f} to {mean.after:.3f}"
    both = [model.perplexity["sliding"].value for model in (results.baseline, results.pruned)]
    assert perplexity[0].label == f"2 chosen\n{both[0]:.2f} to {both[1]:.2f}"
    assert perplexity[0].change == results.perplexity_change["sliding"]
    assert [row.label.split("\n")[0] for row in perplexity[1:]] == ["random", "least relevant", "largest weights"]
    draws = results.controls["random"].draws
    assert list(perplexity[1].draws) == [draw.perplexity_percent.value for draw in draws]
    assert perplexity[1].change.value == pytest.approx(results.controls["random"].outcome.perplexity_percent)


def test_there_is_no_row_for_what_was_not_scored():
    results, _ = made_up()
    results = replaced_at(results, "effects/toxic/behavior_mean", None)
    results = replaced_at(results, "judges/other/effects/toxic/behavior_mean", None)
    for kind in results.controls:
        results = replaced_at(results, f"controls/{kind}/outcome", None)
    toxicity, perplexity = change_rows(results)
    assert toxicity == []
    assert len(perplexity) == 4


# Doses, prompts, layers


def test_the_dose_curve_has_a_line_per_strength_in_order_of_number(drawn):
    results, _ = made_up()
    draw_doses(results.doses[::-1], results.controls, Path("x"))
    axes = drawn[0].axes[0]
    by_key = {(dose.num_neurons, dose.damping): dose for dose in results.doses}
    at = {key: (dose.perplexity_percent.value, dose.behavior_percent.value) for key, dose in by_key.items()}
    assert points(axes, "o") == [at[1, 1.0], at[2, 1.0], at[3, 1.0]]
    assert points(axes, "s") == [at[1, 0.5], at[3, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "1", "3"]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[:2] == ["switched off", "damped by 50 %"]
    assert labels[2:] == ["random", "least relevant", "largest weights"]
    x, y = at[2, 1.0]
    dose = by_key[2, 1.0]
    found = [bar for bar in bars(axes) if (x, y) != bar[0] and (bar[0][0] == bar[1][0] == x)]
    assert len(found) == 1
    of_all = dose.together.behavior_percent
    assert of_all.low < dose.behavior_percent.low
    assert (found[0][0][1], found[0][1][1]) == pytest.approx((of_all.low, of_all.high))


def test_each_selection_has_a_line_of_its_own_look_in_order_of_its_price(drawn):
    dose = made_up()[0].doses[0]
    prices = [3.0, math.nan, 1.0, 2.0]
    doses = [
        replace(dose, selection=f"s{i}", num_neurons=n, perplexity_percent=Interval(price, price, price))
        for i in range(7)
        for n, price in enumerate(prices)
    ]
    draw_doses(doses, {}, Path("x"))
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines if str(line.get_label()).startswith("s")}
    assert list(lines) == [f"s{i}" for i in range(7)]
    assert all(list(line.get_xdata())[:3] == [1.0, 2.0, 3.0] for line in lines.values())
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 7
    numbers = [text.get_text() for text in drawn[0].axes[0].texts]
    assert numbers[:4] == ["2", "3", "0", "1"]


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_a_dose_that_was_not_scored_is_left_out_and_an_unbounded_one_drawn_to_the_edge(drawn, unknown):
    results, _ = made_up()
    doses = sorted(results.doses, key=lambda dose: (dose.damping, dose.num_neurons))
    doses = [replace(dose, together=None) for dose in doses]
    doses = replaced_at(doses, "0/effect", None)
    doses = replaced_at(doses, "1/effect/percent/high", unknown)
    doses = replaced_at(doses, "2/perplexity_percent", Interval(unknown, unknown, unknown))
    draw_doses(doses, results.controls, Path("x"))
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    assert len(points(axes, "s")) == 1
    x, top = doses[1].perplexity_percent.value, axes.get_ylim()[1]
    assert any(bar[1][1] > top for bar in bars(axes) if bar[0][0] == bar[1][0] == x)
    assert top < 1000


def test_a_dose_that_wrecks_the_model_does_not_press_the_others_together(drawn):
    results, _ = made_up()
    draw_doses(results.doses, {}, Path("x"))
    results = replaced_at(results, "doses/1/perplexity_percent", Interval(40_000.0, 30_000.0, 50_000.0))
    draw_doses(results.doses, {}, Path("x"))
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["linear", "symlog"]
    axes = drawn[1].axes[0]
    drawn[1].draw_without_rendering()
    one, two = (axes.transData.transform(point)[0] for point in points(axes)[:2])
    assert abs(one - two) > 15


def test_a_fourth_control_and_a_ninth_have_markers_too(drawn):
    results, _ = made_up()
    control = results.controls["random"]
    for number in (4, 9):
        draw_doses(results.doses, {f"kind_{i}": control for i in range(number)}, Path("x"))
        found = [of for of in drawn[-1].axes[0].collections if str(of.get_label()).startswith("kind")]
        assert [of.get_label() for of in found] == [f"kind {i}" for i in range(number)]
        assert all(len(of.get_offsets()) == len(control.draws) for of in found)
    markers = {of.get_paths()[0].vertices.tobytes() for of in found[:4]}
    assert len(markers) == 4


def test_a_third_group_of_prompts_is_in_the_scatter_too(drawn):
    pairs = {name: [(0.1 * i, 0.2)] for i, name in enumerate(("toxic prompts", "non-toxic prompts", "others"))}
    draw_scatter(pairs, Path("x"))
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(pairs)


@pytest.mark.filterwarnings("error")
def test_no_controls_and_no_scores_can_be_drawn(drawn):
    results, _ = made_up()
    doses = [replace(dose, effect=None) for dose in results.doses]
    draw_doses(doses, {}, Path("x"))
    drawn[0].draw_without_rendering()


def test_the_scatter_tells_the_groups_of_prompts_apart(drawn):
    pairs = {"toxic prompts": [(0.9, 0.2), (0.5, 0.6)], "non-toxic prompts": [(0.1, 0.0)]}
    draw_scatter(pairs, Path("x"))
    draw_scatter({"toxic prompts": pairs["toxic prompts"]}, Path("x"))
    both, one = drawn
    found = {collection.get_label(): collection for collection in both.axes[0].collections}
    assert {name: list(map(tuple, found[name].get_offsets())) for name in pairs} == pairs
    assert len({tuple(found[name].get_edgecolor()[0][:3]) for name in pairs}) == 2
    assert [text.get_text() for text in both.legends[0].get_texts()] == list(pairs)
    assert one.legends == []


def test_the_layers_count_all_their_modules(drawn):
    draw_layers(
        {"layers.0.up_proj": 3, "layers.2.up_proj": 1, "layers.2.gate_proj": 4, "layers.3.up_proj": 0}, Path("x")
    )
    axes = drawn[0].axes[0]
    heights = {round(patch.get_x() + patch.get_width() / 2): patch.get_height() for patch in axes.patches}
    assert heights == {0: 3, 2: 5, 3: 0}


def crowded() -> list[Row]:
    names = ("100000 chosen", "by s-nlp/roberta_toxic…", "random", "least relevant", "largest weights")
    return [Row(f"{name}\n0.123 to 0.456", AFTER, Interval(-99.0, -100.0, math.inf), [-100.0, 50.0]) for name in names]


@pytest.mark.parametrize("kind", ["changes", "doses", "scatter", "layers", "differential"])
@pytest.mark.few(2)
def test_nothing_is_cut_off_or_covered(drawn, kind):
    results, _ = made_up()
    many = {f"model.layers.{i}.mlp.up_proj": 100_000 for i in range(0, 120, 3)}
    {
        "changes": lambda: draw_changes(crowded(), Path("x")),
        "doses": lambda: draw_doses(results.doses, results.controls, Path("x")),
        "scatter": lambda: draw_scatter({"toxic prompts": [(0, 1)], "non-toxic prompts": [(1, 0)]}, Path("x")),
        "layers": lambda: draw_layers(many, Path("x")),
        "differential": lambda: draw_differential(SELECTION, Path("x")),
    }[kind]()
    figure = drawn[0]
    axes = figure.axes[0]
    figure.draw_without_rendering()
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    check_texts(figure, texts, boxes)
    plot = axes.get_window_extent()
    for legend in figure.legends:
        assert not legend.get_window_extent().overlaps(plot), "the legend covers the picture"
