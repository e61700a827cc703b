"""A page and a model card of made-up results, and what a reader sees of the page."""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from made_up import NEURONS, Words, made_up

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.report.page import report_inputs, write_report
from sparc3_lightning.selection.neuron_list import NeuronList

PAGE = Path("out/report.html")
CARD = Path("out/model_card.md")


class Page(HTMLParser):
    """The tags of a page, its links and tables, and the text by whether it lies inside a ``<details>``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.stack: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.shown, self.hidden, self.masked, self.open_details = "", "", [], 0
        self.feed(html)
        self.shown, self.hidden = (text.replace("\xa0", " ") for text in (self.shown, self.hidden))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href", "srcset", "data", "action") if values.get(key)]
        self.open_details += tag == "details" and "open" in values
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "label" and values.get("class") == "masked":
            self.masked.append("")
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.stack[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")
        if self.stack[-2:] == ["label", "span"]:
            self.masked[-1] += data
        if "details" in self.stack and "summary" not in self.stack:
            self.hidden += data
        elif "style" not in self.stack:
            self.shown += data

    @property
    def words(self) -> str:
        return " ".join(self.shown.split())


def reported(
    results: Results,
    rows: list[Any],
    neurons: NeuronList = NEURONS,
    beside: Path | None = None,
) -> Results:
    """Return results with what a report needs, as an evaluation adds it."""
    return dataclasses.replace(results, report=report_inputs(rows, results.headline_judge, neurons, beside, Words()))


def write(results=None, completions=None, neurons: NeuronList = NEURONS, folder: Path | None = None) -> Page:
    given, rows = made_up()
    results = given if results is None else results
    rows = rows if completions is None else completions
    write_report(PAGE, reported(results, rows, neurons, folder), rows)
    page = Page(PAGE.read_text(encoding="utf-8"))
    assert page.stack == [], "a tag is left open"
    return page


def words_of(command: str) -> list[str]:
    """Return the words that bash or zsh reads in a command of the page; that those do is tested in test_closing.py."""
    escaped = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda found: shlex.quote(eval(f"'{found[1]}'")), command)
    return shlex.split(escaped)


def by_name(rows: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {row[0]: tuple(row[1:]) for row in rows}


def percent(interval: Interval) -> tuple[str, str]:
    return f"{interval.value:+.1f} %", f"{interval.low:+.1f} to {interval.high:+.1f}"


def check_texts(figure: Any, texts: list[Any], boxes: list[Any]) -> None:
    """Assert that texts are large enough, lie inside a drawn figure, and do not cover each other."""
    whole = figure.bbox.padded(1)
    for box in boxes:
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1)), "one text covers another"
    assert all(text.get_fontsize() >= 9 for text in texts if text.get_text()), "too small for a phone"
