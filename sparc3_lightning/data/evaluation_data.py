"""What a model is evaluated on: one or two texts for perplexity, prompts to continue, and pairs of sentences."""

from inspect import getattr_static
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import TextDataModule
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.sentence_pairs import SentencePairs
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.models.checkpoints import Checkpoint


class EvaluationData(L.LightningDataModule):
    """A text for perplexity and prompts for toxicity, read one after the other in one test loop.

    Args:
        text: Text for perplexity.
        prompts: Prompts to continue.
        pairs: Pairs of sentences, one more stereotypical than the other, to see which of them a model finds likelier;
            None for none.
        other_text: Text of another kind, whose perplexity stands beside the first one's; None for none. Budgets and
            verdict are of the first.
    """

    def __init__(
        self,
        text: WikiText2,
        prompts: RealToxicityPrompts,
        pairs: SentencePairs | None = None,
        other_text: WikiText2 | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.prompts = prompts
        self.pairs = pairs
        self.other_text = other_text
        if other_text is not None:
            other_text.group = "data.other_text"
        self._set_up: tuple[set[str], int | None, list[Checkpoint]] | None = None  # what the parts are set up for

    @property
    def parts(self) -> dict[str, TextDataModule]:
        """The texts, the prompts and, if there are any, the pairs, by name."""
        parts = {"text": self.text, "other_text": self.other_text, "prompts": self.prompts, "pairs": self.pairs}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def texts(self) -> list[WikiText2]:
        """The text and, if there is one, the other text."""
        return [self.text, *([] if self.other_text is None else [self.other_text])]

    def prepare_data(self) -> None:
        """Fetch what is not there yet."""
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        """Tokenize all parts, before any model is loaded; again for another tokenizer, or other prompts left out."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        for part in self.parts.values():
            part.trainer = self.trainer
        exclude = set(_asked_of(module, "excluded_prompts", ()))
        longest = _asked_of(module, "longest_prompt", None)
        wanted = (exclude, longest, [part.tokenizer_checkpoint for part in self.parts.values()])
        if wanted == self._set_up:
            return
        self._set_up = None
        for text in self.texts:
            text.setup_windows(text.load_tokenizer())
        self.prompts.setup_prompts(exclude, self.prompts.load_tokenizer(), longest)
        if self.pairs is not None:
            self.pairs.setup_pairs(exclude, self.pairs.load_tokenizer())
        self._set_up = wanted

    def test_dataloader(self) -> list[DataLoader]:
        """Return the windows of the texts, then the prompts, then the pairs."""
        return [part.test_dataloader() for part in self.parts.values()]


def _asked_of(module: object, name: str, default: Any) -> Any:
    """Return an attribute of a module that need not have it; an error inside a property is not taken for none."""
    missing = object()
    return default if getattr_static(module, name, missing) is missing else getattr(module, name)
