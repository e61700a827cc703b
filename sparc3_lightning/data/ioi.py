"""Indirect object identification: sentences after which the name that was mentioned once is right, not the other."""

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparc3_lightning.data.base import ReferenceSamples, Sample
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import BatchSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A and B stand for the names, in the order of their first mention; the giver comes a second time as S. None begins with
# a name, which many tokenizers give another token there than after a blank: its second mention would not be the same.
TEMPLATES = (
    "When {A} and {B} arrived at the {place}, {S} passed a {object} to",
    "After {A} and {B} had met at the {place}, {S} lent a {object} to",
    "While {A} and {B} were waiting at the {place}, {S} offered a {object} to",
    "Yesterday {A} and {B} walked to the {place}, and {S} brought a {object} to",
    "Because {A} and {B} were late for the {place}, {S} handed a {object} to",
    "Once {A} and {B} were inside the {place}, {S} showed a {object} to",
    "Before {A} and {B} left the {place}, {S} gave a {object} to",
    "As soon as {A} and {B} got to the {place}, {S} threw a {object} to",
    "The day {A} and {B} visited the {place}, {S} sold a {object} to",
    "Friends since childhood, {A} and {B} went to the {place}, where {S} gave a {object} to",
    "Then {A} and {B} had lunch near the {place}. Afterwards {S} sent a {object} to",
    "Last week {A} and {B} spent a morning at the {place}. There {S} mailed a {object} to",
    "Late at night {A} and {B} were alone in the {place}. Without a word {S} slid a {object} to",
    "It rained when {A} and {B} came out of the {place}, so {S} took a {object} to",
    "On the way to the {place} {A} and {B} stopped, because {S} wanted to return a {object} to",
)
PLACES = (
    "station", "market", "library", "school", "park", "museum", "office", "hospital", "restaurant", "beach", "garden",
    "airport", "bakery", "theater", "stadium", "church",
)  # fmt: skip
OBJECTS = (
    "book", "letter", "ticket", "map", "drink", "ring", "pencil", "photograph", "basket", "phone", "sandwich", "key",
    "coin", "hat", "gift", "camera",
)  # fmt: skip
NAMES = (
    "Adam", "Alice", "Andrew", "Anna", "Anthony", "Ben", "Carl", "Charles", "Claire", "Daniel", "David", "Diana",
    "Edward", "Emily", "Emma", "Eric", "Eva", "Frank", "George", "Grace", "Helen", "Henry", "Jack", "James", "Jane",
    "Jason", "John", "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura", "Lisa", "Lucy", "Maria", "Mark", "Martin",
    "Mary", "Michael", "Nancy", "Nick", "Paul", "Peter", "Rachel", "Richard", "Robert", "Rose", "Ryan", "Sam", "Sarah",
    "Simon", "Sophie", "Steven", "Susan", "Thomas", "Tom", "Victoria", "Walter", "William",
)  # fmt: skip
MIN_NAMES = 10


class IOI(ReferenceSamples):
    """Sentences of two people, one of whom gives something to the other: the next word is the other's name.

    Sentences of both orders alternate: ABBA, "When Mary and John ..., John gave a drink to", and BABA, "When John and
    Mary ..., John gave a drink to". For ``--model.target logit_difference`` the right token is the indirect object, the
    wrong one the subject. Names are used that are one token of the tokenizer after the sentence.

    Source: Wang et al. 2022, arXiv:2211.00593, appendix E; the templates and lists of words here are its own.

    Args:
        num_samples: Number of sentences, all different.
        seed: Of the draw of templates, names, places and objects.
        order: ``abba``, ``baba``, or ``both`` in turn.
        batch_size: Samples in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    def __init__(
        self,
        num_samples: int = 128,
        seed: int = 0,
        order: Literal["both", "abba", "baba"] = "both",
        batch_size: BatchSize = 32,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(None, tokenizer, batch_size)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.save_hyperparameters(logger=False)
        self.num_samples = num_samples
        self.seed = seed
        self.orders = ("abba", "baba") if order == "both" else (order,)

    def prepare_data(self) -> None:
        """Fetch nothing: the sentences are made here."""

    def fetched_files(self) -> list[Path]:
        """Return no files."""
        return []

    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Draw the sentences, and tokenize them.

        Raises:
            ValueError: If too few names are one token, or there are fewer sentences than were asked for.
        """
        tokens = self.tokens_of(tokenizer)
        name_of = name_tokens(tokens)
        self.notes["num_names"] = len(name_of)
        per_order = len(TEMPLATES) * len(PLACES) * len(OBJECTS) * len(name_of) * (len(name_of) - 1)
        if self.num_samples > per_order // 2:  # a draw without repetition must still find new ones
            raise ValueError(f"num_samples must be at most {per_order // 2:,}, got {self.num_samples:,}.")
        draw = random.Random(self.seed)
        names = sorted(name_of)
        drawn: dict[str, tuple[str, str]] = {}
        while len(drawn) < self.num_samples:
            indirect, subject = draw.sample(names, 2)
            first, second = (
                (indirect, subject) if self.orders[len(drawn) % len(self.orders)] == "abba" else (subject, indirect)
            )
            places = {"place": draw.choice(PLACES), "object": draw.choice(OBJECTS)}
            drawn[draw.choice(TEMPLATES).format(A=first, B=second, S=subject, **places)] = (indirect, subject)
        return [
            Sample(sentence_id(text), input_ids, contrast=(name_of[indirect], name_of[subject]))
            for (text, (indirect, subject)), input_ids in zip(
                drawn.items(), tokens.encode_documents(list(drawn)), strict=True
            )
        ]


def sentence_id(text: str) -> str:
    """Return an id that tells a sentence from others, whatever set it is drawn for."""
    return f"ioi-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def name_tokens(tokens: Tokens) -> dict[str, int]:
    """Return the names that are one known token after a sentence of this kind, and that token.

    Raises:
        ValueError: If they are fewer than ``MIN_NAMES``.
    """
    text = TEMPLATES[0].format(A="they", B="others", S="one", place=PLACES[0], object=OBJECTS[0])
    (before,) = tokens.encode_documents([text])
    found: dict[str, int] = {}
    for name, ids in zip(NAMES, tokens.encode_documents([f"{text} {name}" for name in NAMES]), strict=True):
        # Not every tokenizer gives a name alone the token that it has in a sentence.
        added = ids[len(before) :] if ids[: len(before)] == before else []
        if len(added) == 1 and added[0] != tokens.tokenizer.unk_token_id:
            found[name] = added[0]
    if len(found) < MIN_NAMES:
        raise OptionError(
            "checkpoint",
            f"Only {len(found)} of {len(NAMES)} names are one token of the tokenizer, and {MIN_NAMES} are needed: "
            "indirect object identification compares the logits of two names. Choose another --.checkpoint.",
        )
    return found
