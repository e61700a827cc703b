"""Errors about an option: pure code names its parameter, and a verb adds the group in which the parameter stands."""

import re

_KEY = re.compile(r'( *)(.*?)Parser key "([^"]+)":')
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "dict": "a mapping, such as {name: value}",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
    "collections.abc.Sequence": "a list, such as [a, b]",
}


class OptionError(ValueError):
    """An option is missing, or has a value that cannot be used.

    Args:
        option: Name of the parameter without its group, such as ``num_neurons``. A field of a dataclass, whose options
            are a group within that group, has both names: ``sampling.top_p``.
        reason: What is wrong, and the way out. ``--.name`` is an option of the same group. A reason that names its own
            option so is a whole sentence; any other goes on after the name of the option: ``must be at least 1``.
        group: Group of the option on the command line.

    Example:
        >>> error = OptionError("top_p", "must be below 1: raise --.temperature.")
        >>> str(error)
        '--model.top_p must be below 1: raise --model.temperature.'
        >>> str(error.of("evaluate"))
        '--evaluate.top_p must be below 1: raise --evaluate.temperature.'
        >>> str(OptionError("sampling.top_p", "must be below 1: raise --.sampling.temperature."))
        '--model.sampling.top_p must be below 1: raise --model.sampling.temperature.'
    """

    def __init__(self, option: str, reason: str, group: str = "model") -> None:
        super().__init__(option, reason, group)
        self.option = option
        self.reason = reason
        self.group = group

    def __str__(self) -> str:
        own = f"--.{self.option}"
        between = "" if self.reason.startswith(":") else " "
        text = self.reason if own in self.reason else f"{own}{between}{self.reason}"
        return text.replace("--.", f"--{self.group}.")

    def of(self, group: str) -> "OptionError":
        """Return the same error about the option of another group."""
        return type(self)(self.option, self.reason, group)


class OptionFileNotFoundError(OptionError, FileNotFoundError):
    """An option names a file or folder that does not exist."""


class OptionFileExistsError(OptionError, FileExistsError):
    """An option names a file or folder that would be overwritten."""


def in_one_sentence(message: str, group: str = "") -> str:
    r"""Return what jsonargparse says of a value as a sentence: the option, what it may be, and the value.

    Args:
        message: Of several lines. One about no value comes back as it is.
        group: What stands before the name of the option, with a dot behind it.

    Example:
        >>> in_one_sentence('Parser key "model.dose":\n  Expected a <class \'int\'>. Got value: many')
        '--model.dose must be a whole number, got many.'
    """
    lines = message.splitlines()
    names: list[str] = []
    about: list[str] = []  # the lines of the innermost option, which are indented more than its own
    before, indent = "", 0
    for line in lines:
        if match := _KEY.match(line):
            before = before if names else match[2]
            # The names of an outer and an inner option, or the same name once more.
            names, about, indent = (
                ([*names, match[3]] if match[3] not in names else names),
                [line[match.end() :]],
                len(match[1]),
            )
        elif len(line) - len(line.lstrip()) > indent:
            about.append(line)
    text = "\n".join(about)
    found = re.findall(
        r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\]|(dot import path|instantiatable class))"
        r"|(?:Problem with given|Not a valid) (class_path|subclass)",
        text,
    )
    values = re.findall(r"(?:Got|Given) value: (.*)|dot import path string: (.*)", text)
    values = [one or other for one, other in values]
    name = f"--{group}{'.'.join(names)}"
    if inner := re.search(r"NestedArg\(key='([\w.]+)'", text):
        if re.search("Expected an instantiatable class|dot import path|Not a valid subclass", text):
            return f"{name} must be the name of a class, before {name}.{inner[1]}."
        return f"unrecognized option {name}.{inner[1]}: {name} is one value, with no options in it."
    if "not NestedArg" in text:
        return f"{name} is one value, with no options in it."
    if names and (group_of := re.search(r"Unable to load config ['\"]?(.*?)['\"]?$", text, re.MULTILINE)):
        return f"{name} must be a YAML file of options, got {group_of[1]:.80}: or give {name}.<option>, one by one."
    if not found or not values:
        return " ".join(message.split()) if names else message
    kinds = [
        _TYPES.get(kind, kind) if kind else f"one of {choices}" if choices else "the name of a class"
        for kind, choices, *_ in found
    ]
    wanted = " or ".join(dict.fromkeys(kinds)).replace("'", "")
    return f"{before}{name} must be {wanted}, got {values[-1]:.80}."
