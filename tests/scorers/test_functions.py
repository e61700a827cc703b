"""Functions as scorers: those of Python's own library are refused, and one that fails is a sentence with its name."""

import math
from pathlib import Path

import pytest

from sparc3_lightning.errors import OptionError
from sparc3_lightning.scorers.base import Remembering
from sparc3_lightning.scorers.functions import FunctionScorer
from sparc3_lightning.scorers.registry import check_scorer
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.evaluate import Evaluation

TOYS = """
import functools, operator, os, subprocess
from pickle import loads

getoutput = subprocess.getoutput
system = os.system
run = eval
popen = subprocess.Popen
partly = functools.partial(functools.partial(os.system), "true")
upper = "".join
call = operator.methodcaller("upper")
wrapped = functools.lru_cache(os.listdir)

def own(texts, value=0.5):
    return [value for _ in texts]

quarter = functools.partial(own, value=0.25)

@functools.wraps(own)
def around(texts):
    return own(texts)

class Scorer:
    def __call__(self, texts):
        return own(texts)

    def method(self, texts):
        return own(texts)

scorer = Scorer()
method = scorer.method

def raises(texts): raise KeyError("missing")
def leaves(texts): raise AssertionError
def nothing(texts): return None
def text(texts): return "01"
def table(texts): return {name: 0.5 for name in texts}
def words(texts): return ["0.5", "0.5"]
def rows(texts): return [[0.5, 0.5], [0.5, 0.5]]
def one(texts): return 0.5
def picky(texts): return [1 / text.count("a") for text in texts]
def breaks(texts):
    yield 0.5
    raise OSError("gone")
"""


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_functions.py").write_text(TOYS)
    (tmp_path / "toy_that_fails.py").write_text("raise RuntimeError('no such driver')\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["subprocess:getoutput", "os:system", "builtins:eval", "os.path:exists", "posix:system", "json.decoder:loads"],
)
def test_a_function_of_pythons_own_library_is_refused_before_anything_is_imported(name):
    with pytest.raises(OptionError, match=rf"^--model.scorer: '{name}' is of Python's own library"):
        check_scorer(name)
    with pytest.raises(OptionError, match=r"^--model.lexicon: .* is of Python's own library"):
        Attribution("nowhere", target="lexicon", lexicon=name)
    with pytest.raises(OptionError, match=r"^--model.scorers: .* is of Python's own library"):
        Evaluation("nowhere", scorers=["small", name])
    with pytest.raises(ValueError, match="is of Python's own library"):
        FunctionScorer(name)


@pytest.mark.parametrize(
    "function", ["getoutput", "system", "run", "popen", "partly", "upper", "call", "wrapped", "loads"]
)
def test_it_is_refused_by_another_name_too(function):
    with pytest.raises(ValueError, match=rf"^The scorer 'toy_functions:{function}' is of Python's own library"):
        FunctionScorer(f"toy_functions:{function}")


@pytest.mark.parametrize(
    ("function", "score"), [("own", 0.5), ("quarter", 0.25), ("around", 0.5), ("scorer", 0.5), ("method", 0.5)]
)
def test_functions_of_a_package_score_however_they_are_made(function, score):
    assert FunctionScorer(f"toy_functions:{function}").score(["a", "b"]) == [score, score]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "KeyError: 'missing'"),
        ("leaves", "AssertionError"),
        ("nothing", "'NoneType' object is not iterable"),
        ("text", "returned a str, not a list of numbers"),
        ("table", "returned a dict, not a list of numbers"),
        ("words", "returned '0.5' for a text, not a number"),
        ("rows", r"returned \[0.5, 0.5\] for a text, not a number"),
        ("one", "'float' object is not iterable"),
        ("breaks", "OSError: gone"),
    ],
)
def test_a_function_that_fails_is_one_sentence_with_its_name(function, words):
    with pytest.raises(ValueError, match=rf"^toy_functions:{function} failed: .*{words}"):
        FunctionScorer(f"toy_functions:{function}").score(["a", "b"])


def test_a_text_on_which_a_function_raises_has_no_score_and_the_others_keep_theirs():
    found = FunctionScorer("toy_functions:picky").score(["a", "b", "aa"])
    assert found[::2] == [1.0, 0.5]
    assert math.isnan(found[1])
    with pytest.raises(ValueError, match="failed: ZeroDivisionError"):
        FunctionScorer("toy_functions:picky").score(["b", "c"])


def test_a_function_that_has_scored_texts_may_fail_on_all_of_the_next_ones():
    scorer = Remembering(FunctionScorer("toy_functions:picky"))
    assert scorer.score(["a"]) == [1.0]
    found = scorer.score(["a", "b"])
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert all(map(math.isnan, scorer.score(["c", "d"])))


def test_a_module_that_fails_to_import_is_one_sentence_with_the_name():
    with pytest.raises(ValueError, match="'toy_that_fails:score' cannot be imported: RuntimeError: no such driver"):
        FunctionScorer("toy_that_fails:score")
