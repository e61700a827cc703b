"""What a terminal shows at the end of an evaluation: a table of at most 100 columns, the verdict, and commands."""

import dataclasses
import math
import shlex
from pathlib import Path

import pytest
from helpers import replaced_at
from made_up import made_up

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import PairMeasures, Preference
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.tables import closing, next_commands

PATHS = ("effects/toxic/behavior_mean/percent", "second_scorer/effects/toxic/behavior_mean/percent")


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 99_999_999.9, 999_999_999_999.9, -12.3])
@pytest.mark.parametrize("behavior", ["toxicity", "a behaviour with a name that is far too long " * 5])
def test_the_table_has_at_most_100_columns(value, behavior):
    results, _ = made_up()
    results = dataclasses.replace(results, behavior=behavior)
    pairs = Preference(7, 0, PairMeasures(0.625, value), PairMeasures(0.5, -value))
    effect = dataclasses.replace(results.main_effect, difference=Interval(value, -abs(value), abs(value)))
    results = replaced_at(results, "preference", dataclasses.replace(pairs, effect=effect, margin_effect=effect))
    for path in (*PATHS, "perplexity_change/sliding"):
        results = replaced_at(results, path, Interval(value, -abs(value), abs(value)))
    results = replaced_at(results, "pruned/perplexity/sliding/value", value)
    table = summary_table(results)
    assert widest(table) <= 100
    names = [line[:17].strip() for line in table.splitlines()[2:]]
    assert all(names)
    assert "nan" not in table


def test_a_name_that_fits_is_not_cut():
    results, _ = made_up()
    assert "Mean toxicity, second scorer, non-toxic prompts" in summary_table(results)


def test_a_longer_name_keeps_its_beginning_and_its_end():
    results, _ = made_up()
    rows = [line.partition("  ")[0] for line in summary_table(results).splitlines() if "…" in line]
    assert rows
    assert all(row.startswith(("Prompts with a toxic", "Expected maximum")) for row in rows)
    assert all(row.endswith("second scorer, non-toxic prompts") or row.endswith("toxic prompts") for row in rows)


def test_the_verdict_is_wrapped_and_the_commands_are_not():
    command = "sparc3 chat --model.neurons " + "x" * 200
    text = closing("the table", "Mean toxicity fell by 3.5 % and so on. " * 9, ["Results: here"], [command])
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 100] == [f"  {command}"]
    assert lines.index("the table") < lines.index("Results: here") < lines.index("What to do next:")
    assert " ".join(text.split()).count("Mean toxicity fell by 3.5 % and so on.") == 9


@pytest.mark.parametrize("name", ["neurons.json", "it's a name; rm -rf $HOME.json", "-x.json"])
def test_the_commands_can_be_pasted(name):
    opened, chat = next_commands(Path("a folder/version_0/report.html"), Path("b c", name))
    assert shlex.split(opened)[1:] == ["a folder/version_0/report.html"]
    assert shlex.split(chat) == ["sparc3", "chat", "--model.neurons", f"b c/{name}"]


def test_without_neurons_or_a_page_there_is_nothing_to_do_with_them():
    assert next_commands(None, None) == []
    assert "next" not in closing("table", "verdict", [], [])
