"""Lists of words: read from a file or an option, found as whole words in any script, and named wherever a scorer is."""

import math
import re
from pathlib import Path

import pytest

from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.evaluation.judges import judges_of
from sparc3_lightning.scorers.base import Remembering
from sparc3_lightning.scorers.guards import GuardScorer
from sparc3_lightning.scorers.registry import check_scorer, fetch_scorer, fingerprint_of, kind_of, load_scorer
from sparc3_lightning.scorers.words import WordsScorer, check_words, counter_of, fingerprint_of_words, read_words
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.plan import digests_of


def write(text: str | bytes, name: str = "list.txt") -> Path:
    path = Path(name)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def slow_count(words: list[str], text: str) -> int:
    """Count by going from character to character, for words of ASCII letters."""
    text, found, at = text.lower(), 0, 0
    while at < len(text):
        for word in sorted(words, key=len, reverse=True):
            end = at + len(word)
            free = (at == 0 or not text[at - 1].isalnum()) and (end >= len(text) or not text[end].isalnum())
            if text.startswith(word, at) and free:
                found, at = found + 1, end - 1
                break
        at += 1
    return found


def test_a_list_has_a_word_or_phrase_a_line_and_comments():
    path = write("\ufeff# words\n\ndelve  # worn\n  a  treasure\ttrove \r\nC#\nna\u0131\u0308ve\n")
    assert read_words(path) == ["delve", "a treasure trove", "C#", "na\u0131\u0308ve"]
    assert read_words(write("cafe\u0301\n")) == ["caf\u00e9"] == check_words(["cafe\u0301"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "list.txt holds no words: give a word or phrase a line"),
        ("\n  \n\t\n", "list.txt holds no words"),
        ("# a comment\n  # another\n", "list.txt holds no words"),
        ("delve\nrealm\nDelve\n", r"list.txt, line 3 holds 'Delve', which is there already \(list.txt, line 1\)"),
        ("caf\u00e9\ncafe\u0301\n", "line 2 holds 'caf\u00e9', which is there already"),
        ("a-b\na\u2011b\n", "line 2 holds .* which is there already"),
        ("it's\nit\u2019s\n", "line 2 holds .* which is there already"),
        ("d\u00e9j\u00e0".encode("latin-1"), "line 1.* UTF-8"),
        ("delve\n".encode("utf-16"), "list.txt"),
        ("del\x07ve\n", "line 1 is no word"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_with_its_line(content, said):
    path = write(content)
    with pytest.raises(ValueError, match=said):
        read_words(path)
    with pytest.raises(OptionError, match=rf"^--model.scorer: .*{said}"):
        check_scorer("words:list.txt")
    with pytest.raises(OptionError, match=rf"^--model.scorers: .*{said}"):
        Evaluation("tiny", scorers=["words:list.txt#rate"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "The list holds no words"),
        (["delve", " "], "Word 2 of the list is no word: ''"),
        (["delve", "DELVE"], r"Word 2 of the list holds 'DELVE', which is there already \(Word 1 of the list\)"),
    ],
)
def test_a_list_of_an_option_is_checked_alike(words, said):
    with pytest.raises(ValueError, match=said):
        check_words(words)


@pytest.mark.parametrize("name", ["words:gone.txt", "words:", "words:list.txt#rates", "gone.txt", "words:folder"])
def test_a_file_that_is_not_there_is_refused_with_the_way_out(name):
    write("delve\n")
    Path("folder").mkdir()
    with pytest.raises(OptionFileNotFoundError, match=r"^--model.scorer: .* needs a text file of words, one a line"):
        check_scorer(name)


@pytest.mark.parametrize(
    ("words", "text", "number"),
    [
        (["delve"], "Delve, DELVE and delve.", 3),
        (["delve"], "delves, undelve, delve_2, delve2", 0),
        (["treasure trove"], "a Treasure \n\t Trove; a treasure-trove", 1),
        (["treasure trove"], "a treasure\u00a0trove", 1),
        (["it's important"], "It\u2019s important. it's  important", 2),
        (["testament", "testament to"], "a testament to this, a testament", 2),
        (["art", "art deco"], "art decor", 1),
        (["c++", "\u2014"], "C++ is c++11\u2014or not \u2014", 4),
        (["caf\u00e9"], "the cafe\u0301, CAF\u00c9S and CAFE\u0301", 2),
        (["cafe"], "the cafe\u0301", 0),
        (["stra\u00dfe"], "STRASSE, Stra\u00dfe", 2),
        (["\u0442\u0435\u0441\u0442"], "\u0422\u0415\u0421\u0422, \u0442\u0435\u0441\u0442\u044b", 1),
        (["\u0915"], "\u0915 \u0915\u093f", 1),
        (["ever-evolving"], "ever-evolving, ever\u2011evolving, Ever\u2010evolving, ever evolving", 3),
        (["rich history"], "", 0),
    ],
)
def test_words_are_found_as_a_whole_in_any_case_and_script(words, text, number):
    assert counter_of(words)(text) == number


def test_counting_is_as_a_slow_second_implementation_has_it():
    words = ["ab", "ab a", "b", "aab", "b b"]
    texts = [bin(number)[3:].replace("0", "ab ").replace("1", "b ") for number in range(2, 256)]
    texts += [re.sub("(ab b|b ab)", lambda match: match[1].replace(" ", ""), text) for text in texts]
    assert len(set(texts)) > 300
    count = counter_of(words)
    for text in texts:
        assert count(text) == slow_count(words, text), text


def test_a_score_is_whether_there_is_a_word_and_a_rate_how_many_a_drawn_token():
    write("delve\nrich history\n")
    texts = ["We delve and delve.", "None.", "", "Rich history"]
    tokens = [[1, 2, 3, 4, 5], [1, 2], [], [1]]
    share, rate = load_scorer("words:list.txt"), load_scorer("words:list.txt#rate")
    assert share.score(texts) == share.score_drawn(texts, tokens) == [1.0, 0.0, 0.0, 1.0]
    assert rate.score_drawn(texts, tokens) == pytest.approx([0.4, 0.0, math.nan, 1.0], nan_ok=True)
    assert rate.score(texts) == pytest.approx([0.5, 0.0, math.nan, 0.5], nan_ok=True)
    remembering = Remembering(rate)
    found = [remembering.score_drawn(texts[:1], [range(number)])[0] for number in (4, 8)]
    assert found == [0.5, 0.25], "a rate is of the tokens, and not remembered by the text"


def test_names_of_lists_are_no_names_of_other_scorers():
    write("delve\n")
    Path("lists").mkdir()
    write("realm\n", "lists/words.txt")
    write("vital\n", "noending")
    for name in ("words:list.txt", "list.txt", "words:list.txt#rate", "lists/words.txt", "words:noending", "noending"):
        assert kind_of(name) is WordsScorer
        check_scorer(name)
    assert load_scorer("lists/words.txt").score(["a realm"]) == [1.0]
    assert fetch_scorer("words:list.txt#rate") == [Path("list.txt")]


def test_the_fingerprint_is_of_the_words_and_not_of_file_and_comments():
    write("delve\nrealm\n")
    write("# worn\nDelve\nrealm # both\n", "same.txt")
    write("# worn\ndelve\n\nrealm # both\n", "other.txt")
    names = ("words:list.txt", "words:other.txt", "list.txt")
    assert len({fingerprint_of(name) for name in names}) == 1
    assert fingerprint_of("words:list.txt") != fingerprint_of("words:list.txt#rate")
    write("realm\r\ndelve", "turned.txt")
    assert fingerprint_of("words:turned.txt") == fingerprint_of("words:list.txt")
    before = fingerprint_of("words:list.txt")
    write("delve\nrealms\n")
    assert fingerprint_of("words:list.txt") != before


@pytest.mark.parametrize("content", ["realm\nit\u2019s\n", "\ufeffIt's # both\r\nREALM\r\n", "it's\nrealm"])
def test_a_list_that_finds_the_same_words_is_the_same_judge_whatever_order_and_case_they_have(content):
    lexicon = check_words(["it's", "realm"])
    write(content)
    choosers = [("a list of 2 words", fingerprint_of_words(lexicon))]
    judges = judges_of(["words:list.txt", "words:list.txt#rate"], choosers)
    assert [judge.is_chooser for judge in judges.values()] == [True, True]
    write("it's\nrealms\n")
    assert not judges_of(["words:list.txt"], choosers)["words:list.txt"].is_chooser


def test_a_name_that_is_no_path_is_no_list(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(OptionError, match=r"^--model.scorer: '~nobody-at-all/x' is neither"):
        check_scorer("~nobody-at-all/x")
    with pytest.raises(OptionError, match=r"^--model.scorer: ~nobody-at-all/x.txt: there is no such home folder"):
        check_scorer("words:~nobody-at-all/x.txt")
    assert kind_of("guard:own.txt") is GuardScorer


def test_a_changed_list_is_another_input_of_an_evaluation():
    write("delve\n")
    config = {"model": {"checkpoint": "hub/model", "scorers": ["words:list.txt"], "zero_shot": {"folder": None}}}
    before = digests_of(Evaluation, config, None)
    assert len(before) == 1
    write("# only a comment\ndelve\n")
    assert digests_of(Evaluation, config, None) == before
    write("delve\nrealm\n")
    assert digests_of(Evaluation, config, None) != before


def test_a_shipped_list_is_found_by_its_name_from_any_folder():
    assert load_scorer("words:slop.txt").score(["A rich tapestry.", "A carpet."]) == [1.0, 0.0]
    assert fetch_scorer("words:slop.txt")[0].parent.name == "configs"
    write("carpet\n", "slop.txt")
    assert load_scorer("words:slop.txt").score(["A rich tapestry.", "A carpet."]) == [0.0, 1.0], "one's own comes first"
