"""The parser of a verb: its help on a page, a long group by itself, and the nearest to an option that is unknown."""

import json
import re
from argparse import SUPPRESS, Action
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from pydoc import locate
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from sparc3_lightning.errors import in_one_sentence
from sparc3_lightning.stages.verbs import columns, nearest

MORE = "more"  # the group that names the folded ones
INDENT = 6  # of what is said of an option, below its name
KINDS: dict[object, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "{true, false}"}


class HelpFormatter(DefaultHelpFormatter):
    """Says of an option what its value is, in the line of its name, and below what it means and its default."""

    def __init__(self, prog: str, **_: object) -> None:
        super().__init__(prog, max_help_position=INDENT, width=columns())

    def start_section(self, heading: str | None) -> None:
        """Begin a group, with its heading in lines that are not too long."""
        super().start_section(heading and fill(heading.replace("``", "'"), self._width - 1))

    def _format_action_invocation(self, action: Action) -> str:
        names = ", ".join(name for name in action.option_strings if not name.endswith("+"))
        if not names:
            return super()._format_action_invocation(action)
        named = f"{names} {_value_of(action)}".replace(" \b", "").rstrip()
        return fill(named, self._width - 2, subsequent_indent=" " * INDENT)

    def _format_action(self, action: Action) -> str:
        said = super()._format_action(action)
        name, *meaning = said.splitlines()
        line = "  ".join([name, *map(str.strip, meaning)])
        return f"{line}\n" if len(meaning) == 1 and len(line) <= self._width else said

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("``", "'")
        if not action.option_strings or isinstance(action, ActionConfigFile):
            return text
        if action.default == SUPPRESS:
            return super()._get_help_string(action)
        classes = _classes_of(action)
        default = action.default if isinstance(action.default, str | Path) else json.dumps(action.default, default=vars)
        notes = ["required" if action.required else "" if classes and action.default is None else f"default: {default}"]
        return f"{text} ({'; '.join(filter(None, [*notes, classes]))})"


def _classes_of(action: Action) -> str:
    """Return the names of the classes that a value may be of, as jsonargparse says them; nothing if it is no class."""
    return re.sub(r"^, known sub|[\w.]+\.", "", getattr(action, "extra_help", str)())


def _value_of(action: Action) -> str:
    if action.nargs == 0:
        return ""
    if action.option_strings[0].endswith(".help"):
        return "CLASS"
    hint = getattr(action, "_typehint", action.type)  # most actions of jsonargparse have their type there
    return _kind(hint) if hint is not None else str(action.metavar or action.dest.upper())


def _kind(hint: object) -> str:
    """Return what stands for a value of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{{{', '.join(map(str, inner))}}}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in inner if one is not NoneType))
    if origin is not None and issubclass(origin, Mapping):
        return "MAPPING"
    return f"[{_kind(inner[0])}, ...]" if inner else KINDS.get(hint, "CLASS")


class Parser(LightningArgumentParser):
    """The parser of a verb: long groups are shown by themselves, and what is wrong is said in a sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {"formatter_class": HelpFormatter, "allow_abbrev": False, "usage": SUPPRESS}
        super().__init__(*args, **{**own, **kwargs})
        self.folded: list[str] = []
        self.elsewhere: dict[str, str] = {}  # options of other verbs, and the verb

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the options of a method; one that is a group or None may stand alone, for the defaults of the group."""
        added = super().add_method_arguments(*args, **kwargs)
        for action in (self._option_string_actions[f"--{name}"] for name in added):
            if any(map(is_dataclass, get_args(getattr(action, "_typehint", None)))):
                action.nargs, action.const = "?", {}
        return added

    def fold(self, name: str) -> None:
        """Show a group of options, with the groups in it, by ``--<name>.help`` alone."""
        groups = self.groups or {}
        more = groups.get(MORE) or self.add_argument_group("more options, each group by itself", name=MORE)
        more.add_argument(f"--{name}.help", action="help", help=f"{groups[name].title}.")
        self.folded.append(name)

    def format_help(self, *args: Any) -> str:
        """Return the help: of the groups that are not folded, or of the folded one that was asked for."""
        asked = [name for name in self.folded if f"--{name}.help" in getattr(self, "args", ())]
        folded = [group for name, group in (self.groups or {}).items() if _is_in(name, self.folded)]
        wanted = [group for name, group in (self.groups or {}).items() if _is_in(name, asked)]
        every = self._action_groups  # which argparse writes the help of
        self._action_groups = wanted or [group for group in every if group not in folded]
        try:
            return super().format_help(*args)
        finally:
            self._action_groups = every

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check a config, and say of an unknown option which parser does not know it."""
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            if not hasattr(error, "subcommand_parser"):  # as jsonargparse calls it
                error.subcommand_parser = self  # type: ignore[attr-defined]
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and the sentence, and exit."""
        if self.exit_on_error:  # else it is a part of the message of another parser
            parser = getattr(ex, "subcommand_parser", self)
            message = parser.said_of_unknown(message) or parser.with_classes(in_one_sentence(message))
        super().error(message, ex)

    def with_classes(self, message: str) -> str:
        """Return a sentence about an option that must be the name of a class, with the classes there are."""
        match = re.match(r"(--[\w.]+) must be the name of a class\b.*\.$", message)
        action = self._option_string_actions.get(match[1]) if match else None
        known = _classes_of(action) if action else ""
        return f"{message[:-1]}; {known}." if known else message

    def said_of_unknown(self, message: str) -> str:
        """Return what to say of the unknown options that a message of jsonargparse is about; nothing if of none."""
        if match := re.search(r"^unrecognized arguments: (.*)", message, re.DOTALL):
            words = [word.partition("=")[0] for word in match[1].split() if word.startswith("-")]
            return "\n".join(map(self._said_of, words))
        if match := re.search(r"^(?:Subcommand '\w+'|Group '(.+)') does not accept option '(.+)'$", message):
            return self._said_of("--" + ".".join(filter(None, match.groups())))
        if match := re.search(r"^Option '(.+?)' is not accepted", message):
            return self._said_of(f"--{match[1]}")
        match = re.search(r"class_path '([\w.]+)':\s+Option '(.+?)' is not accepted", message)
        if match is None or not isinstance(chosen := locate(match[1]), type):
            return ""
        key = re.findall(r'Parser key "(.+?)"', message[: match.start()])[-1]
        of_class = Parser()
        of_class.add_class_arguments(chosen, key, fail_untyped=False)
        return of_class._said_of(f"--{key}.{match[2]}", f" of {chosen.__name__}")

    def _said_of(self, option: str, owner: str = "") -> str:
        own = [name for name in self._option_string_actions if not name.endswith("+")]
        ends = [name for name in own if not option.startswith(f"{name}.")]  # all but the groups that it names itself
        like = None if option in own else nearest(option, ends)  # a config may not hold --help
        verb = self.elsewhere.get(option)
        if verb and option[option.rindex(".") :] not in (like or ""):
            return f"unrecognized option {option}: it is one of 'sparc3 {verb}'."
        return f"unrecognized option {option}{owner}" + (f": did you mean {like}?" if like else ".")


def _is_in(group: str, groups: list[str]) -> bool:
    return any(f"{group}.".startswith(f"{one}.") for one in groups)
