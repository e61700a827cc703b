"""The tables of a comparison, and its pictures: what they show, and that nothing in them is cut off or covered."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import check_texts

from sparc3_lightning.report import comparison
from sparc3_lightning.report.comparison import (
    MAX_COLUMNS,
    ComparisonResults,
    Listed,
    draw_correlation,
    draw_overlap,
    draw_profiles,
    overlaps_csv,
    p_value,
    summary,
)
from sparc3_lightning.report.drawing import draw
from sparc3_lightning.report.tables import aligned
from sparc3_lightning.selection.overlap import find_classes, find_correlations, find_overlaps, find_profiles

MODULES = {f"model.layers.{i}.mlp.up_proj": 50 for i in range(12)}


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that a test draws, instead of files."""
    found: list[Any] = []
    monkeypatch.setattr(comparison, "save_figure", lambda figure, path: found.append(figure))
    return found


def made_up(num_lists: int, name: str = "list") -> ComparisonResults:
    """Compare random lists of 40 of 100 neurons."""
    draw, names = random.Random(0), [f"{name} {i}" for i in range(num_lists)]
    pool = [(module, i) for module in MODULES for i in range(9)][:100]
    lists = [set(draw.sample(pool, 40)) for _ in names]
    keys = sorted(set().union(*lists))
    member_SN = torch.tensor([[key in held for key in keys] for held in lists])
    values = torch.randn(num_lists, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ComparisonResults(
        checkpoint=None,
        checkpoint_fingerprint=None,
        granularity="neuron",
        normalize=False,
        num_candidates=600,
        lists=[Listed(name, "neurons.json", 40, 12, None) for name in names],
        overlaps=find_overlaps(names, keys, member_SN, MODULES, 600),
        layers=find_profiles(names, keys, member_SN, MODULES),
        correlation=find_correlations(values, values.roll(1, dims=1)),
        classes={of: find_classes(names, values[:, :number]) for of, number in (("all", 600), ("pruned", 90))},
    )


@pytest.mark.parametrize(
    ("log10_p", "text"),
    [(0.0, "1"), (-1.0, "0.1"), (-2.5, "0.00316"), (-26.2, "6.3e-27"), (-408.25, "5.6e-409"), (-5.001, "1.0e-05")],
)
def test_a_p_value_is_written_however_small_it_is(log10_p, text):
    assert p_value(log10_p) == text


def test_columns_of_a_table_are_aligned():
    assert aligned([("a", "b"), ("long name", "1"), ("c", "1,000")]).splitlines() == [
        "a              b",
        "----------------",
        "long name      1",
        "c          1,000",
    ]


def test_few_lists_are_printed_in_full_and_of_many_the_pairs_and_all():
    lines = summary(made_up(3)).splitlines()
    assert sum(line.startswith("list 0 & list 1 & list 2") for line in lines) == 1
    assert sum(line.startswith("shared by") for line in lines) == 4
    results = made_up(6)
    lines = summary(results).splitlines()
    table = lines[lines.index("") + 3 :]
    table = table[: table.index("")]
    assert len(table) == 6 + 15 + 1
    assert table[-1].startswith("all lists")
    shared = [line for line in lines if line.startswith("shared by")]
    counts = dict.fromkeys(range(2, 7), 0)
    for row in results.classes["all"].shared:
        counts[len(row.lists)] += row.neurons
    assert [line.split() for line in shared] == [
        ["shared", "by", str(number), "behaviours", str(count), *line.split()[5:]]
        for (number, count), line in zip(counts.items(), shared, strict=True)
    ]
    assert len(overlaps_csv(results.overlaps).splitlines()) == 2**6


def test_a_bar_of_the_upset_plot_is_the_exclusive_size_over_the_dots_of_its_lists(drawn):
    results = made_up(3)
    draw_overlap(results.lists, results.overlaps, Path("x"))
    bars, dots = drawn[0].axes
    assert [bar.get_height() for bar in bars.patches] == [row.exclusive for row in results.overlaps]
    faint = [line for line in dots.lines if line.get_marker() == "o" and line.get_color() == comparison.FAINT]
    on = [line for line in dots.lines if line.get_marker() == "o" and line not in faint]
    found = [[f"list {int(y)}" for y in line.get_ydata()] for line in on]
    assert found == [row.lists for row in results.overlaps]
    assert [label.get_text() for label in dots.get_yticklabels()] == [f"list {i} (40)" for i in range(3)]


@pytest.mark.slow
def test_of_many_combinations_the_largest_are_drawn_and_the_rest_is_counted(drawn):
    results = made_up(8)
    draw_overlap(results.lists, results.overlaps, Path("x"))
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert len(heights) == MAX_COLUMNS
    sizes = sorted((row.exclusive for row in results.overlaps if row.exclusive), reverse=True)
    assert sorted(heights, reverse=True) == sizes[:MAX_COLUMNS]
    rest = sizes[MAX_COLUMNS:]
    assert drawn[0].get_supxlabel() == f"and {len(rest)} smaller combinations of {sum(rest)} neurons"


def test_the_heat_map_has_pearson_below_the_diagonal_and_the_partial_correlation_above(drawn):
    found = {"pearson": [[1.0, 0.25], [0.25, 1.0]], "partial": [[1.0, math.nan], [-0.5, 1.0]]}
    draw_correlation(["a", "b"], found, Path("x"))
    axes = drawn[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 1): ".25", (1, 0): "-"}
    assert axes.images[0].get_array().filled(-9).tolist() == [[1, -9], [0.25, 1]]
    assert axes.images[0].get_clim() == (-1, 1)


def test_the_profile_has_a_panel_for_each_list_with_what_it_shares_in_front(drawn):
    layers = {"pruned": {"a": [3, 0, 2], "b": [1, 1, 0]}, "shared": {"a": [1, 0, 0], "b": [1, 0, 0]}}
    draw_profiles(layers, Path("x"))
    for axes, name in zip(drawn[0].axes, "ab", strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == layers["pruned"][name] + layers["shared"][name]
        assert axes.get_title(loc="left") == name


@pytest.mark.parametrize("num_lists", [2, 4, 8])
@pytest.mark.parametrize("kind", ["overlap", "correlation", "profiles"])
@pytest.mark.few(2)
def test_nothing_is_cut_off_or_covered(drawn, kind, num_lists):
    results = made_up(num_lists, "a long category")
    names = [row.name for row in results.lists]
    {
        "overlap": lambda: draw_overlap(results.lists, results.overlaps, Path("x")),
        "correlation": lambda: draw_correlation(names, results.correlation, Path("x")),
        "profiles": lambda: draw_profiles(results.layers, Path("x")),
    }[kind]()
    figure = drawn[0]
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [text for text in (figure._supxlabel, figure._supylabel) if text is not None]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    check_texts(figure, texts, boxes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["$x_1$ {0}", "\x1b[2J\u202e", "=1+1", "名前 שלום", "x" * 500, "a\nb", "\ud800"])
def test_a_hostile_name_is_drawn_and_said_as_it_is(name):
    results = made_up(3, name)
    results.save(Path("out/compare.json"))
    draw(Path("out"))
    assert {path.name for path in Path("out").iterdir()} == {
        "compare.json", "overlap.csv", "overlap.png", "layers.png", "correlation.png",
    }  # fmt: skip
    said = summary(results)
    assert not set(said) & set("\x1b\u202e\ud800")
    assert len(said.splitlines()) == len(summary(made_up(3)).splitlines())


@pytest.mark.parametrize("log10_p", [math.nan, math.inf, -math.inf])
def test_a_p_value_that_is_not_finite_is_text(log10_p):
    assert p_value(log10_p) in ("-", "0", "inf")
