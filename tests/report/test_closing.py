"""What a terminal shows at the end of an evaluation: a table of at most 100 columns, the verdict, and commands."""

import dataclasses
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import replaced_at
from made_up import NEURONS, made_up, renamed
from pages import words_of

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import PairMeasures, Preference
from sparc3_lightning.report.escaping import for_shell
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.tables import closing, next_commands

PATHS = ("effects/toxic/behavior_mean/percent", "judges/other/effects/toxic/behavior_mean/percent")


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
    assert "Prompts with a toxic continuation, non-toxic prompts" in summary_table(results)


def test_a_longer_name_keeps_its_beginning_and_its_end():
    results, _ = made_up()
    results = dataclasses.replace(results, behavior="a behaviour of a long name")
    rows = [line.partition("  ")[0] for line in summary_table(results).splitlines() if "…" in line]
    assert rows
    assert all(row.startswith(("Prompts with a behaviour", "Expected maximum")) for row in rows)
    assert all(row.endswith("toxic prompts") for row in rows)


def test_a_judge_of_a_long_name_keeps_the_table_within_its_columns():
    results, rows = made_up(choosers=("small",))
    results, _ = renamed(results, rows, "/home/ann/" + "deep/" * 30 + "scorer", "owner/" + "long" * 40)
    table = summary_table(results)
    assert widest(table) <= 100
    assert [line[:14] for line in table.splitlines() if line.startswith("  by")] == ["  by /home/ann"] * 2
    assert table.count("r (chose the neurons)") == 2


def test_the_verdict_is_wrapped_and_the_commands_are_not():
    command = "sparc3 chat --model.neurons " + "x" * 200
    text = closing("the table", "Mean toxicity fell by 3.5 % and so on. " * 9, ["Results: here"], [command])
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 100] == [f"  {command}"]
    assert lines.index("the table") < lines.index("Results: here") < lines.index("What to do next:")
    assert " ".join(text.split()).count("Mean toxicity fell by 3.5 % and so on.") == 9


NAMES = (
    "neurons.json",
    "it's a name; rm -rf $HOME.json",
    "[a: b, *c] # {d} %s\\n",
    "two\nlines",
    "\x1b[31m\u202e\x9bab\\'",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_can_be_pasted(name):
    folder = Path(name)
    folder.mkdir()
    opened, *commands = next_commands(folder, f"b c/{name}", folder / "report.html")
    assert words_of(opened)[1:] == [f"{name}/report.html"]
    assert list(map(words_of, commands)) == [
        ["sparc3", "export", "--model.neurons", f"b c/{name}", "--model.export", f"{name}/pruned-model"],
        ["sparc3", "chat", "--model.neurons", f"b c/{name}"],
        ["sparc3", "reproduce", f"{name}/results.json"],
    ]
    assert all(command.isprintable() for command in (opened, *commands))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("name", [*NAMES, "no UTF-8 \udcff9"])
def test_bash_reads_the_very_words(name):
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {for_shell([name, 'b'])}"], capture_output=True, check=True)
    assert said.stdout.split(b"\0") == [os.fsencode(name), b"b", b""]


def test_a_path_is_not_taken_for_an_option_or_a_home(tmp_path):
    export, chat, reproduce = map(words_of, next_commands(Path("-run"), "~ann/neurons.json", None))
    assert export[3:] == [str(tmp_path / "~ann/neurons.json"), "--model.export", str(tmp_path / "-run/pruned-model")]
    assert (chat[-1], reproduce[-1]) == (str(tmp_path / "~ann/neurons.json"), str(tmp_path / "-run/results.json"))


def test_the_folder_to_export_to_does_not_exist_and_the_list_is_the_one_that_was_chosen():
    out = Path("out")
    (out / "pruned-model").mkdir(parents=True)
    assert next_commands(out, "neurons.json", None)[0].endswith("neurons.json --model.export out/pruned-model-2")
    (out / "pruned-model-2").write_text("mine")
    NEURONS.save(out / "chosen/neurons.json")
    chosen = "--model.neurons out/chosen/neurons.json"
    export, chat, _ = next_commands(out, "neurons.json", None)
    assert export == f"sparc3 export {chosen} --model.export out/pruned-model-3"
    assert chat == f"sparc3 chat {chosen}"


def test_without_neurons_or_a_page_only_measuring_again_is_left():
    assert next_commands(Path("out"), None, None) == ["sparc3 reproduce out/results.json"]
    assert "next" not in closing("table", "verdict", [], [])
