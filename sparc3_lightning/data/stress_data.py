"""What a stressed model is measured on, and what it is trained on before that."""

import lightning as L

from sparc3_lightning.data.base import ReferenceSamples, TextDataModule
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2


class StressData(L.LightningDataModule):
    """The text and the prompts of an evaluation, other prompts, and neutral text to train on.

    Args:
        text: Text for perplexity.
        prompts: Prompts to continue.
        other_prompts: Prompts of another kind, which the model continues as it is; None for none.
        neutral: Text that the model is trained on, see ``--model.finetune``; None for none. Its ``batch_size`` is that
            of the training.
    """

    def __init__(
        self,
        text: WikiText2,
        prompts: RealToxicityPrompts,
        other_prompts: RealToxicityPrompts | None = None,
        neutral: ReferenceSamples | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.prompts = prompts
        self.other_prompts = other_prompts
        self.neutral = neutral

    @property
    def parts(self) -> dict[str, TextDataModule]:
        """All that is given, by name."""
        parts = {
            "text": self.text,
            "prompts": self.prompts,
            "other_prompts": self.other_prompts,
            "neutral": self.neutral,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def of(self, prompts: RealToxicityPrompts) -> EvaluationData:
        """Return what an evaluation reads: the text, and the prompts or the other ones."""
        return EvaluationData(self.text, prompts)
