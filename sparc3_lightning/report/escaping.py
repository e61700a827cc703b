"""What others named or wrote, as text that does nothing but be read in the place it is put to: one function a place.

A page escapes by itself (jinja's autoescape); ``for_terminal`` then shows what a browser would not.
"""

import csv
import hashlib
import io
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence

# Control characters, with them the escape sequences of terminals; what turns the direction of writing; other ends of
# lines; halves of characters, which no file can hold; and tags that nobody sees.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|~$&@]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
_BLOCK = re.compile(r"(\d*)([#+=-](?=[\s#+=-]|$)|(?<=\d)[.)](?=\s|$))(.*)")  # a heading, a list, a rule
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # of both widths
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def for_terminal(text: object, keep: str = "") -> str:
    r"""Return a text in which characters that a terminal would obey, or hide, are shown as escapes.

    Args:
        text: Any value.
        keep: Characters to leave as they are: ``"\n\t"`` for a message of several lines.

    Example:
        >>> print(for_terminal("red \x1b[31m, \u202eturned"))
        red \x1b[31m, \u202eturned
    """
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def _escape(character: str) -> str:
    number = ord(character)
    if character in "\n\t\r":
        return repr(character)[1:-1]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def for_shell(words: Iterable[object]) -> str:
    r"""Return a command that bash or zsh reads as these words; what a terminal would obey, or hide, is in escapes.

    Args:
        words: The program and its arguments.

    Example:
        >>> print(for_shell(["sparc3", "report", "my runs", "red\x1b[31m"]))
        sparc3 report 'my runs' $'red\x1b[31m'
    """
    return " ".join(_in_shell(str(word)) for word in words)


def _in_shell(word: str) -> str:
    if not _UNSEEN.search(word):
        return shlex.quote(word)

    def escape(found: re.Match[str]) -> str:
        number = ord(found[0])
        if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name that is no UTF-8
            return f"\\x{number - 0xDC00:02x}"
        return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    word = re.sub(r"[\\']", r"\\\g<0>", word)
    return f"$'{_UNSEEN.sub(escape, word)}'"


def for_markdown(text: object, begins_line: bool = False) -> str:
    r"""Return a text as one line of Markdown that shows it: no markup, link, formula or HTML comes of it.

    Args:
        text: Any value.
        begins_line: Whether it begins a line, where it could also become a heading or a list.

    Example:
        >>> print(for_markdown("a|b <img src=x> [c](http://d)"))
        a\|b \<img src=x\> \[c\](http:\//d)
    """
    line = for_terminal(" ".join(str(text).split()))
    block = _BLOCK.fullmatch(line) if begins_line else None
    before, mark, line = block.groups() if block else ("", "", line)
    return before + (f"\\{mark}" if mark else "") + _MARKDOWN.sub(r"\\\g<0>", line)


def for_picture(text: object, longest: int = 60) -> str:
    r"""Return a text as matplotlib draws it as it is: no formula between ``$``; a long one is cut in its middle.

    Example:
        >>> print(for_picture("$x_1$"), for_picture("a long name of a model", longest=11))
        \$x_1\$ a lon…model
    """
    line = " ".join(for_terminal(text, keep="\n\t").split())
    if len(line) > longest:
        line = f"{line[: longest // 2]}…{line[len(line) - (longest - 1) // 2 :]}"
    return line.replace("$", r"\$")


def for_file_name(text: object) -> str:
    """Return a text as a part of a file's name: letters, digits, ``.``, ``_`` and ``-`` of ASCII alone.

    Letters that are left out are told apart by a hash.

    Example:
        >>> for_file_name("lrp, signed"), for_file_name("../é")
        ('lrp-signed', '--9cd7743f')
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).lstrip(".")[:100]
    if str(text).isascii() and name and len(str(text)) <= 100:
        return name
    return f"{name}-{hashlib.sha256(str(text).encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as CSV. Text that a spreadsheet would compute gets an apostrophe; what is not finite is empty.

    Example:
        >>> csv_text([["=1+1", -0.5, float("nan")]])
        "'=1+1,-0.5,\n"
    """
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_csv_cell(value) for value in row] for row in rows)
    return file.getvalue()


def _csv_cell(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str):
        return value
    is_formula = value.startswith(_FORMULA) and not _NUMBER.fullmatch(value)
    return ("'" if is_formula else "") + for_terminal(value, keep="\n\t")


def public_name(place: object) -> str:
    """Return what may be told to others of a checkpoint, a source or a scorer: of a path on this machine its last part.

    A Hugging Face id, a ``pypi:`` source and a short relative path stay as they are.

    Example:
        >>> public_name("/home/ann/models/mine/"), public_name("org/model"), public_name("~/a.jsonl#toxic")
        ('mine', 'org/model', 'a.jsonl#toxic')
    """
    text, mark, label = str(place).partition("#")
    parts = [part for part in re.split(r"[/\\]+", text) if part not in ("", ".")]
    begins_elsewhere = re.match(r"[/\\~]|file:|[A-Za-z]:[/\\]", text)
    if not text.startswith("pypi:") and (begins_elsewhere or ".." in parts or len(parts) > 2):
        text = next((part for part in reversed(parts) if part not in ("..", "~")), "a folder")
    return text + mark + label


def told_apart(names: Iterable[str], shorten: Callable[[str], str] = public_name) -> dict[str, str]:
    r"""Return what different names are called in short; of two that would be called alike one gets a number.

    Args:
        names: Each once.
        shorten: Shortens one. A name that stays as it is gets no number.

    Example:
        >>> list(told_apart(["/home/ann/a/scorer", "/home/bob/scorer", "small"]).values())
        ['scorer', 'scorer (2)', 'small']
    """
    names = list(names)
    found = {name: name for name in names if shorten(name) == name}
    for name in names:
        if name not in found:
            short = shorten(name)
            others = (short, *(f"{short} ({number})" for number in range(2, len(names) + 2)))
            found[name] = next(other for other in others if other not in found.values())
    return {name: found[name] for name in names}
