"""What others named or wrote does nothing in the place it is put to."""

import csv
import io
import re

import pytest

from sparc3_lightning.report.escaping import (
    csv_text,
    for_file_name,
    for_markdown,
    for_picture,
    for_terminal,
    public_name,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J", r"\x9b2J"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\x08c\x00d\x7f", r"a\rb\x08c\x00d\x7f"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\ud800 \udfff", r"\ud800 \udfff"),
        ("\U000e0041", r"\U000e0041"),
        ("two\nlines\t", r"two\nlines\t"),
        ("Grüße, 世界 🙂 שלום", "Grüße, 世界 🙂 שלום"),
        (r"C:\x1b", r"C:\x1b"),
        (3.5, "3.5"),
    ],
)
def test_a_terminal_shows_what_it_would_obey(text, shown):
    assert for_terminal(text) == shown
    assert for_terminal("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


@pytest.mark.parametrize("sign", "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
def test_a_cell_of_csv_that_a_spreadsheet_would_compute_is_text(sign):
    text = f'{sign}HYPERLINK("http://x","y")'
    ((cell, *numbers),) = csv.reader(io.StringIO(csv_text([[text, -1.5, 3, float("nan"), float("-inf"), None, True]])))
    assert cell.startswith("'" + (sign if sign != "\r" else r"\r"))
    assert numbers == ["-1.5", "3", "", "", "", "True"]


@pytest.mark.parametrize("text", ["-0.5", "+3", "-1e-05", "plain", "a=b", "", 'a, "b"'])
def test_other_cells_of_csv_stay_as_they_are(text):
    assert next(csv.reader(io.StringIO(csv_text([[text, "end"]])))) == [text, "end"]


def test_a_line_of_markdown_has_no_markup():
    line = for_markdown("a|b `c` *d* _e_ [f](http://g) <h> ![i](j) $k$ ~~l~~ www.m.org n@o.p &lt; \\ # \n\n# heading")
    assert "\n" not in line
    # Every character that could begin markup stands behind a backslash.
    plain = re.sub(r"\\.", "", line)
    assert not set(plain) & set("|`*_[]<>$~&@\\")
    assert "://" not in line
    assert "www." not in line


@pytest.mark.parametrize(
    "text", ["# a", "#", "- a", "+ a", "---", "1. a", "12) a", "===", "> a", "    code", "```", "* a"]
)
def test_a_line_of_markdown_begins_no_block(text):
    assert for_markdown(text, begins_line=True).lstrip("0123456789").startswith("\\") or text == "    code"
    assert not for_markdown(text, begins_line=True).startswith(" ")


@pytest.mark.parametrize("text", ["-4.3 % (-10.9 to +4.3)", "2.5 rose", "#1 of 3", "+1"])
def test_a_line_of_markdown_that_begins_with_a_number_stays(text):
    assert for_markdown(text, begins_line=True) == text


@pytest.mark.parametrize("text", ["$x_1$", "a $ b", "$$", r"\$x$", "$\\frac{1}{0}$", "100 % $", "a\nb $c$"])
def test_a_name_in_a_picture_is_drawn_as_it_is(text):
    from matplotlib.cbook import is_math_text

    drawn = for_picture(text)
    assert not is_math_text(drawn)
    assert drawn.replace(r"\$", "$") == " ".join(text.split())


def test_a_long_name_in_a_picture_keeps_both_ends():
    drawn = for_picture("model-" + "x" * 500 + "-seed-3", 28)
    assert len(drawn) == 28
    assert drawn.startswith("model-")
    assert drawn.endswith("-seed-3")


@pytest.mark.parametrize("text", ["../../etc", "a/b\\c", "", "é", "\x00", "CON:|?*", ".hidden", "x" * 500, "名前", "ü"])
def test_a_file_name_has_letters_digits_and_three_signs(text):
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}", for_file_name(text))
    assert for_file_name("é") != for_file_name("ü")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/ann/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("C:\\Users\\ann\\mine", "mine"),
        ("\\\\host\\share\\mine", "mine"),
        ("../ann/mine", "mine"),
        ("file:///home/ann/x.txt", "x.txt"),
        ("users/ann/mine", "mine"),
        ("/home/ann/scorer#toxic", "scorer#toxic"),
        ("/", "a folder"),
        ("..", "a folder"),
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("pypi:a==1/b/c/d.gguf", "pypi:a==1/b/c/d.gguf"),
        ("package.module:function", "package.module:function"),
        ("WikiText-2 raw test", "WikiText-2 raw test"),
    ],
)
def test_of_a_path_on_this_machine_others_are_told_the_name(place, name):
    assert public_name(place) == name
