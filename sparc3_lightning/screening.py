"""The first stage of an experiment whose prompts are chosen by what the model itself makes of them.

The model continues the prompts of the group ``screen`` and the scorer scores them, as ``sparc3 evaluate`` does without
neurons; the completions.jsonl that comes out is the source of the data that ask for it by ``by: continuation``.
"""

from pathlib import Path
from typing import Any


def screening(options: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the evaluation that lets the model continue the prompts, and measures nothing else.

    Args:
        options: Config of ``sparc3 run`` with the groups ``evaluate``, ``data`` and ``screen``.
        model: Checkpoint, dtype and revision.
    """
    alone: dict[str, Any] = {"neurons": None, "second_scorer": None, "controls": 0, "lm_eval_tasks": []}
    alone |= {"doses": [], "strengths": [1.0]}
    text = options["data"]["text"]
    # An evaluation has a text for perplexity too: here its first window, which costs next to nothing.
    one_window = {"num_tokens": text["init_args"]["window"], "conventions": ["disjoint"]}
    return {
        "model": {**options["evaluate"], **model, **alone},
        "data": {
            "text": {**text, "init_args": {**text["init_args"], **one_window}},
            "prompts": options["screen"],
        },
    }


def wants_screening(data: dict[str, Any]) -> bool:
    """Whether prompts are to come from the stage ``screen``: by the model's own continuation, and from no file."""
    init = data.get("init_args", {})
    return init.get("by") == "continuation" and init.get("source") is None


def from_screening(data: dict[str, Any], completions: Path | None) -> dict[str, Any]:
    """Return the config of prompts with the stage's completions.jsonl as their source, if that is where they come from.

    Args:
        data: Class and options of a data module.
        completions: Of the stage; None if the experiment has none.

    Raises:
        ValueError: If the prompts need the stage, and there is none.
    """
    if not wants_screening(data):
        return data
    if completions is None:
        raise ValueError(
            f"{data['class_path']} chooses prompts by the model's own continuation and names no source: add the "
            "group 'screen', prompts to let the model continue first, or name a completions.jsonl of its own."
        )
    return {**data, "init_args": {**data["init_args"], "source": str(completions)}}
