"""results.json: what is written comes back, and what is damaged or of another format is refused by its path."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import replaced_at, write_sealed
from made_up import made_up

from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.files import sealed

FORMAT = Results.FORMAT
PATH = Path("results.json")


def content() -> dict[str, Any]:
    """Return what the file of a whole evaluation holds."""
    made_up()[0].save(PATH)
    return json.loads(PATH.read_text(), parse_constant=pytest.fail)


def test_everything_comes_back_as_it_was():
    results, _ = made_up()
    results.save(PATH)
    assert repr(Results.load(PATH)) == repr(results)  # NaN is not NaN
    alone = replace(results, pruned=None, change=None, effects={}, controls={}, doses=[], fronts={}, agreement=None)
    assert repr(Results.from_json(alone.to_json())) == repr(alone)


def test_the_file_says_first_of_what_format_it_is_and_what_the_verdict_is():
    found = content()
    assert list(found)[:2] == ["format", "verdict"]
    assert found["format"] == FORMAT


def test_whether_a_difference_is_evidence_is_in_the_file():
    results, _ = made_up()
    found = content()
    assert found["effects"]["toxic"]["behavior_mean"]["evidence"] is results.main_effect.evidence
    assert [draw["effect"]["evidence"] for draw in found["controls"]["random"]["draws"]] == [
        draw.effect.evidence for draw in results.controls["random"].draws
    ]


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_what_is_not_a_number_is_null_in_the_file_and_comes_back_as_nan(unknown):
    results, _ = made_up()
    for path in ("baseline/groups/toxic/behavior_mean", "effects/toxic/behavior_mean/percent/high"):
        results = replaced_at(results, path, unknown)
    results = replaced_at(results, "change/behavior_percent", unknown)
    found = json.loads(results.to_json(), parse_constant=pytest.fail)
    assert found["baseline"]["groups"]["toxic"]["behavior_mean"] is None
    back = Results.from_json(results.to_json())
    assert math.isnan(back.baseline.groups["toxic"].behavior_mean)
    assert math.isnan(back.main_effect.percent.high)
    assert math.isnan(back.change.behavior_percent)


def test_paths_and_tuples_of_the_options_are_written_as_json_has_them():
    results = replaced_at(made_up()[0], "config/model", {"neurons": Path("a/b"), "doses": (1, 2)})
    assert Results.from_json(results.to_json()).config["model"] == {"neurons": "a/b", "doses": [1, 2]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"format": ', "Expecting value"),
        ("[]", "its format is None"),
        ("{}", "its format is None"),
        ('{"format": "sparc3_lightning results 0"}', "its format is 'sparc3_lightning results 0'"),
        (json.dumps({"format": FORMAT}), "it has no checksum"),
        (json.dumps(sealed({"format": FORMAT})), "it has no verdict"),
        ('{"format": "a", "format": "b"}', "it has the key 'format' twice"),
        ('{"format": NaN}', "it holds NaN"),
        ("[" * 100_000, "it is nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_file_of_another_format_or_a_broken_one_is_refused_by_its_path(text, reason):
    PATH.write_text(text)
    with pytest.raises(ValueError, match=f"^results.json is not a results.json of format {FORMAT!r}: {reason}"):
        Results.load(PATH)


def test_a_file_that_is_no_text_is_refused_by_its_path():
    PATH.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^results.json is not a results.json"):
        Results.load(PATH)


@pytest.mark.parametrize(
    ("path", "to", "reason"),
    [
        ("num_neurons", "two", "num_neurons cannot be 'two'"),
        ("num_neurons", True, "num_neurons cannot be True"),
        ("num_neurons", None, "num_neurons cannot be None"),
        ("baseline", None, "baseline cannot be None"),
        ("baseline/groups/toxic", {}, "baseline.groups.toxic has no behavior_mean"),
        ("effects/toxic/behavior_mean/percent/low", "x", "effects.toxic.behavior_mean.percent.low cannot be 'x'"),
        ("doses", {}, "doses cannot be {}"),
        ("doses/0/damping", [], "doses.0.damping cannot be "),
        ("versions/torch", 2, "versions.torch cannot be 2"),
        ("controls/random/zero_ablated", 0, "controls.random.zero_ablated cannot be 0"),
        ("num_failed", -1, "num_failed must be at least 0, and is -1"),
        ("doses/0/damping", 1.5, "doses.0.damping must be at least 0 and at most 1, and is 1.5"),
        ("baseline/groups/toxic/behavior_mean", -0.1, "baseline.groups.toxic.behavior_mean must be at least 0"),
        ("pruned/groups/toxic/num_prompts", 1.0, "pruned.groups.toxic.num_prompts cannot be 1.0"),
        ("change/behavior_percent", 10**400, "change.behavior_percent cannot be 1000"),
    ],
)
def test_what_is_damaged_is_named(path, to, reason):
    write_sealed(PATH, replaced_at(content(), path, to))
    with pytest.raises(ValueError, match=f"^results.json is not .*: {reason}"):
        Results.load(PATH)


@pytest.mark.parametrize("path", ["verdict", "num_neurons", "baseline/groups/toxic/behavior_mean", "versions"])
def test_what_was_changed_by_hand_is_refused(path):
    PATH.write_text(json.dumps(replaced_at(content(), path, None)))
    with pytest.raises(ValueError, match=r"its checksum does not match: it was changed or damaged after it was writ"):
        Results.load(PATH)


def test_other_white_space_and_another_order_of_the_keys_change_nothing():
    results, _ = made_up()
    found = content()
    PATH.write_text(json.dumps(dict(reversed(found.items())), indent=7))
    assert repr(Results.load(PATH)) == repr(results)  # NaN is not NaN


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_file_without_permission_to_read_is_named():
    content()
    PATH.chmod(0)
    with pytest.raises(OSError, match=r"results\.json"):
        Results.load(PATH)


def test_a_folder_or_a_link_to_itself_in_place_of_the_file_is_named():
    PATH.mkdir()
    Path("loop.json").symlink_to("loop.json")
    for path in (PATH, Path("loop.json")):
        with pytest.raises(OSError, match=path.name):
            Results.load(path)


def test_a_file_that_is_not_there_is_not_found():
    with pytest.raises(FileNotFoundError):
        Results.load(PATH)


def test_saving_replaces_the_file_whole():
    results, _ = made_up()
    PATH.write_text("before")
    results.save(PATH)
    assert repr(Results.load(PATH)) == repr(results)  # NaN is not NaN
    assert [path.name for path in Path().iterdir()] == ["results.json"]
