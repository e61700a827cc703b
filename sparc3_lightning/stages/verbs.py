"""The verbs of the command line, and what is said of them before any library is loaded: it takes no time."""

import shutil
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from textwrap import fill

import sparc3_lightning

WIDTH = 100  # columns of a help text, at most
OPTIONS_USAGE = "[--config FILE] ... [--<group>.<option> VALUE] ..."
# By name, each a method of the trainer, whose docstring begins with the same line.
VERBS = {
    "prepare": "Fetch everything the other verbs would download, and write a manifest of it.",
    "attribute": "Score the neurons of a model on reference samples.",
    "prune": "Select the neurons to prune from score files, and export the pruned checkpoint.",
    "evaluate": "Measure perplexity and toxicity of a model, as it is and with its neurons off.",
    "sweep": "Measure toxicity against perplexity over numbers of neurons and dampings.",
    "stress": "Measure what is left of an effect after weights were rounded or trained, and on other prompts.",
    "compare": "Compare the pruned neurons of several behaviours: which they share, and which are specific to one.",
    "circuit": "Take the least relevant components out step by step, and find the sparsest circuit that keeps a "
    "behaviour.",
    "compress": "Set the weights of the lowest scores to zero, and write the sparse checkpoint.",
    "export": "Write a list of neurons, channels, heads or weights into a plain checkpoint, and upload it if asked.",
    "chat": "Answer prompts with the model as it is and with its neurons off, side by side, from the same random "
    "draws.",
    "report": "Draw page, pictures and model card of a run again, from the files in its folder; no model is loaded.",
    "reproduce": "Measure an evaluation again from its results.json, and compare the figures; exit code 1 where one "
    "differs.",
    "run": "Carry out the whole experiment: attribute, prune, evaluate and report.",
}
OPTIONS = {
    "-h, --help": "Show this help.",
    "--version": "Show the version.",
    "-v, --verbose": "Show the messages of all libraries, too; it may also stand behind the verb.",
    "--print_completion SHELL": "Print a script that completes verbs and options: shtab-bash, shtab-zsh, ...",
}


def columns() -> int:
    """Return how wide a help text may be: as wide as the terminal, and at most ``WIDTH``."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that another one may have been meant for, or None.

    Args:
        name: Of a verb or an option. It may lack its groups, or its end.
        known: Names of verbs or options.

    Example:
        >>> nearest("evalute", VERBS), nearest("--Num-Neurons", ["--model.neurons", "--model.num_neurons"])
        ('evaluate', '--model.num_neurons')
        >>> nearest("help", VERBS)
    """
    bare = name.lower().replace("-", "_").strip("_")
    names = {one.lstrip("-").lower(): one for one in known}
    leaves = get_close_matches(_leaf(bare), {_leaf(one) for one in names}, n=9)
    alike = [one for one in names if (bare and one.startswith(bare)) or _leaf(one) in leaves]
    found = get_close_matches(bare, alike, n=1, cutoff=0.0)
    return names[found[0]] if found else None


def _leaf(option: str) -> str:
    return option.rpartition(".")[2]


def answer(arguments: Sequence[str]) -> None:
    """Answer what needs no library: ``--help``, ``--version``, no argument at all, and a verb that is unknown.

    Raises:
        SystemExit: When it has answered.
    """
    first = next((word for word in arguments if word not in ("-v", "--verbose")), None)
    if first == "--version":
        print(f"sparc3 {_version()}")
    elif first in ("-h", "--help"):
        print(_help())
    elif first is None:
        print(_help(), file=sys.stderr)
        sys.exit(2)
    elif first in VERBS or first.startswith("--print_completion"):
        return
    else:
        is_option = first.startswith("-")
        like = nearest(first, ["--help", "--version", "--verbose", "--print_completion", *([] if is_option else VERBS)])
        kind, place = ("option", "; those of a verb stand behind the verb.") if is_option else ("verb", ".")
        print(f"sparc3: error: {first!r} is no {kind}{f': did you mean {like}?' if like else place}", file=sys.stderr)
        print(fill(f"The verbs are {', '.join(VERBS)}.", columns()), file=sys.stderr)
        sys.exit(2)
    sys.exit()


def _version() -> object:
    try:
        return sparc3_lightning.__version__
    except ModuleNotFoundError:  # run from a checkout
        return "(not installed)"


def _help() -> str:
    def listed(rows: dict[str, str]) -> list[str]:
        indent = max(map(len, rows)) + 4
        return [
            fill(text, columns(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
            for name, text in rows.items()
        ]

    return "\n".join(
        [
            f"usage: sparc3 <verb> {OPTIONS_USAGE}",
            "",
            fill(str(sparc3_lightning.__doc__), columns()),
            "",
            "verbs ('sparc3 <verb> --help' explains the options of one):",
            *listed(VERBS),
            "",
            "options:",
            *listed(OPTIONS),
        ]
    )
