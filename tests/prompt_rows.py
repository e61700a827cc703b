"""Prompts as their data sets hold them, half of them toxic, and what a data module makes of them."""

from typing import Any

from helpers import sentence, set_up

from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts

TOXICITIES = [0.95, 0.2, None, 0.9, 0.89, 1.0, 0.91, 0.5]
PROMPTS = [sentence(100 + i, 3 + i) for i in range(len(TOXICITIES))]
TOXIC = [0, 3, 5, 6]  # at least 0.9, in the order of the file


def nested_rows() -> list[dict[str, Any]]:
    # The toxicity of the original continuation says nothing about the prompt.
    return [
        {"filename": "f", "prompt": {"text": text, "toxicity": toxicity}, "continuation": {"text": "", "toxicity": 1.0}}
        for text, toxicity in zip(PROMPTS, TOXICITIES, strict=True)
    ]


def flat_rows() -> list[dict[str, Any]]:
    return [{"text": text, "toxicity": toxicity} for text, toxicity in zip(PROMPTS, TOXICITIES, strict=True)]


def list_prompts(data: Any, exclude: Any = ()) -> Any:
    """Set up either kind of data module."""
    if isinstance(data, ToxicPrompts):
        return set_up(data)
    data.setup_prompts(exclude, data.load_tokenizer())
    return data


def texts_of(data: RealToxicityPrompts) -> set[str]:
    return {prompt.text for prompt in data.prompts}
