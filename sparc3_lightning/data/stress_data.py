"""What a stressed model is measured on, and what it is trained on before that."""

import lightning as L

from sparc3_lightning.data.base import ReferenceSamples, TextDataModule
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2


class StressData(L.LightningDataModule):
    """The texts and the prompts of an evaluation, other prompts, and neutral text to train on.

    Args:
        text: Text for perplexity.
        prompts: Prompts to continue.
        other_prompts: Prompts of another kind, which the model continues as it is; None for none.
        neutral: Text that the model is trained on, see ``--model.finetune``; None for none. Its ``batch_size`` is that
            of the training.
        other_text: Text of another kind, whose perplexity stands beside the first one's; None for none.
    """

    def __init__(
        self,
        text: WikiText2,
        prompts: RealToxicityPrompts,
        other_prompts: RealToxicityPrompts | None = None,
        neutral: ReferenceSamples | None = None,
        other_text: WikiText2 | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.prompts = prompts
        self.other_prompts = other_prompts
        self.neutral = neutral
        self.other_text = other_text

    @property
    def parts(self) -> dict[str, TextDataModule]:
        """All that is given, by name."""
        parts = {
            "text": self.text,
            "other_text": self.other_text,
            "prompts": self.prompts,
            "other_prompts": self.other_prompts,
            "neutral": self.neutral,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def of(self, prompts: RealToxicityPrompts) -> EvaluationData:
        """Return what an evaluation reads: the texts, and the prompts or the other ones."""
        return EvaluationData(self.text, prompts, other_text=self.other_text)
