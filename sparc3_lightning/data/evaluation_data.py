"""What a model is evaluated on: a text for perplexity and prompts for toxicity."""

from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2


class EvaluationData(L.LightningDataModule):
    """A text for perplexity and prompts for toxicity, read one after the other in one test loop.

    Args:
        text: Text for perplexity.
        prompts: Prompts to continue.
    """

    def __init__(self, text: WikiText2, prompts: RealToxicityPrompts) -> None:
        super().__init__()
        self.text = text
        self.prompts = prompts

    def prepare_data(self) -> None:
        """Fetch what is not there yet."""
        self.text.prepare_data()
        self.prompts.prepare_data()

    def setup(self, stage: str) -> None:
        """Tokenize the text and the prompts, before any model is loaded."""
        if self.text.windows:
            return
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        self.text.trainer = self.prompts.trainer = self.trainer
        self.text.setup_windows(self.text.load_tokenizer())
        self.prompts.setup_prompts(getattr(module, "excluded_prompts", ()), self.prompts.load_tokenizer())

    def describe(self) -> dict[str, Any]:
        """Return what the figures rest on: text, window and stride; prompts, and how many were left out."""
        return {
            "perplexity": {
                "window": self.text.window,
                "stride": self.text.stride,
                "text": self.text.source or "WikiText-2 raw test",
            },
            "prompts": {
                "source": self.prompts.source or "allenai/real-toxicity-prompts",
                "nontoxic_source": self.prompts.nontoxic_source,
                "excluded": self.prompts.num_excluded,
            },
        }

    def test_dataloader(self) -> list[DataLoader]:
        """Return the windows of the text, then the prompts."""
        return [self.text.test_dataloader(), self.prompts.test_dataloader()]
