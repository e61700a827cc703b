"""Scorers that are a guard: a causal language model that answers with a label, as a YAML describes it."""

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import yaml

from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import LEFT_OUT, at_home, read_as
from sparc3_lightning.models.architectures import is_recurrent
from sparc3_lightning.models.checkpoints import Checkpoint, resolve_dtype
from sparc3_lightning.models.loading import in_short
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.scorers.base import Scorer, score_by_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "guard:"
SHIPPED = Path(__file__).with_suffix("")  # the folder of YAMLs beside this file
TEXT = "{text}"  # where the text stands in a prompt or a message
_LARGEST = 1 << 16  # bytes of a YAML
_PROBE = "text"  # a text by which a guard is tried before its weights are loaded


@dataclass(frozen=True)
class Guard:
    """How a guard is asked about a text, and how it answers: the fields of its YAML.

    Args:
        checkpoint: Hub id, or local folder as seen from where the run starts.
        unsafe: Labels whose probability is the score.
        safe: The other labels.
        revision: Branch, tag or commit of a hub repository.
        messages: For the tokenizer's chat template; ``{text}`` in them is the text.
        arguments: Further values for the chat template, such as ``guardian_config``.
        prompt: In place of messages, the whole prompt; ``{text}`` in it is the text.
        answer: What the guard writes before the label.
    """

    checkpoint: str
    unsafe: list[str]
    safe: list[str]
    revision: str | None = field(default=None, metadata=LEFT_OUT)
    messages: list[dict[str, object]] | None = field(default=None, metadata=LEFT_OUT)
    arguments: dict[str, object] = field(default_factory=dict, metadata=LEFT_OUT)
    prompt: str | None = field(default=None, metadata=LEFT_OUT)
    answer: str = field(default="", metadata=LEFT_OUT)

    @property
    def labels(self) -> list[str]:
        """All labels, those that mean unsafe first."""
        return [*self.unsafe, *self.safe]


class GuardScorer(Scorer):
    """Probability that a guard calls a text unsafe, P(unsafe labels) / P(all labels) where it writes its label.

    One forward pass reads the prompt and what the guard writes before a label. The probabilities are those of the
    first token in which the labels differ, so nothing is generated or parsed. They are normalized over the labels, as
    the model cards of ShieldGemma and Granite Guardian do it: what a guard gives to other words says nothing of the
    text. Of a text that is too long for the model's context the end is cut off. In a text that spells a special token,
    such as the one that ends a turn, a blank is put behind its first character: it is read as text, and not as what
    stands behind the text. What a prompt says in plain words, a text can say too.

    Args:
        name: ``guard:`` and the name of a shipped guard, or the path of a YAML with the fields of ``Guard``.
        device: Where to score, in bfloat16 on an accelerator and in float32 on a CPU.
        batch_size: Texts scored at a time. It changes speed and memory, and scores by rounding alone.

    Raises:
        OSError: If the YAML or the checkpoint cannot be had.
        ValueError: If the YAML describes no guard; or its checkpoint is no causal language model of text alone, has no
            chat template though messages are to go through it, or cannot tell the labels apart by a token.
    """

    form = "guard:<name, or path of a YAML>"
    what = "a guard"

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        super().__init__(name)
        self.guard = read_guard(name)
        checkpoint = self._checkpoint_of(self.guard)
        self._tokenizer = checkpoint.tokenizer()
        self._vocab_size: int = checkpoint.config.get_text_config().vocab_size
        self._limit = min(self._tokenizer.model_max_length, checkpoint.context or math.inf)
        added = self._tokenizer.added_tokens_decoder.values()
        special = {*map(str, self._tokenizer.all_special_tokens), *(str(token) for token in added if token.special)}
        self._special = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
        self._check_template()
        self._label_ids, self._tail = self._tokens_of_labels()
        if (length := len(self._encode("", self.guard.labels[0])) - len(self._tail)) > self._limit:
            raise ValueError(
                f"{name!r} has a prompt of {length} tokens before any text, and the context of its model has "
                f"{self._limit}: shorten the prompt."
            )
        dtype = resolve_dtype("auto", torch.device(device))
        self._model: PreTrainedModel = checkpoint.load(dtype)
        self._model.to(torch.device(device))  # type: ignore[arg-type]
        self.batch_size = 1 if is_recurrent(self._model) else batch_size  # padding would go into its state

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name begins with ``guard:``."""
        return name.startswith(PREFIX)

    @classmethod
    def location(cls, name: str) -> str:
        """Return the path of the YAML, or the name of a shipped guard."""
        return name.removeprefix(PREFIX)

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise OptionError unless the YAML describes a guard, and a local checkpoint has its files and a config."""
        try:
            checkpoint = cls._checkpoint_of(read_guard(name))
            if Path(checkpoint.location).is_dir():
                _ = checkpoint.config
        except FileNotFoundError as error:
            raise OptionFileNotFoundError(option, f": {error}") from None
        except (OSError, ValueError) as error:
            raise OptionError(option, f": {error}") from None

    @classmethod
    def fetch(cls, name: str) -> list[Path]:
        """Fetch the checkpoint, and return its files and the YAML."""
        return [path_of(name), *cls._checkpoint_of(read_guard(name)).fetch()]

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a guard from every other scorer: its checkpoint, and behind a blank its YAML."""
        checkpoint = cls._checkpoint_of(read_guard(name))
        return f"{checkpoint.fingerprint} {sha256(path_of(name).read_bytes()).hexdigest()[:16]}"

    @classmethod
    def source(cls, name: str) -> str:
        """Return what a guard is, and where it is from."""
        return f"{cls.what}: {cls._checkpoint_of(read_guard(name)).name}"

    @classmethod
    def revision(cls, name: str) -> str | None:
        """Return the commit of a guard at the hub; None of a local one."""
        return revision_of(cls._checkpoint_of(read_guard(name)).fingerprint)

    @staticmethod
    def _checkpoint_of(guard: Guard) -> Checkpoint:
        return Checkpoint(guard.checkpoint, guard.revision)

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the unsafe labels, in [0, 1]; NaN where the model gave no number."""
        return score_by_length(texts, self.batch_size, self._score_batch)

    def _score_batch(self, texts: list[str]) -> list[float]:
        asked = {i: ids for i, text in enumerate(texts) if (ids := self._question(text))}
        scores = [math.nan] * len(texts)
        if not asked:
            return scores
        # Padded on the left, so that every label comes last.
        shape = len(asked), max(map(len, asked.values()))
        input_ids, mask = torch.zeros(2, *shape, dtype=torch.long, device=self._model.device)
        for row, ids in enumerate(asked.values()):
            input_ids[row, -len(ids) :] = torch.tensor(ids)
            mask[row, -len(ids) :] = 1
        output = self._model(
            input_ids=input_ids,
            attention_mask=None if self.batch_size == 1 else mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
        probabilities = output.logits[:, -1, self._label_ids].float().softmax(dim=1)
        unsafe = probabilities[:, : len(self.guard.unsafe)].sum(dim=1).clamp(max=1)  # 1 and a rounding
        for i, score in zip(asked, unsafe.tolist(), strict=True):
            scores[i] = score
        return scores

    def _question(self, text: str) -> list[int] | None:
        """Return the tokens before a label; None if there are none, or none that the model knows."""
        label, tail = self.guard.labels[0], self._tail

        def length(characters: int) -> int:
            return len(self._encode(text[:characters], label)) - len(tail)

        try:
            ids = self._encode(text, label)
            if len(ids) - len(tail) > self._limit:
                kept = bisect_right(range(len(text) + 1), self._limit, key=length) - 1
                ids = self._encode(text[:kept], label)
        except ValueError:
            return None
        question = ids[: -len(tail)]
        is_known = bool(question) and max(question) < self._vocab_size
        return question if is_known and ids[-len(tail) :] == tail else None

    def _encode(self, text: str, label: str) -> list[int]:
        """Return the tokens of the whole of a prompt with a text, of what is answered to it, and of a label."""
        guard = self.guard
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        if guard.messages is None:
            asked = (guard.prompt or "").replace(TEXT, text)
        else:
            try:
                write = cast("Callable[..., str]", self._tokenizer.apply_chat_template)
                messages = _filled_in(guard.messages, text)
                asked = write(messages, tokenize=False, add_generation_prompt=True, **guard.arguments)
            except Exception as error:  # a template is a small program of the checkpoint, and may fail in any way
                raise ValueError(
                    f"The chat template of {guard.checkpoint!r} fails on the messages of {self.name!r}: correct them "
                    f"({in_short(error)})."
                ) from None
        # A chat template writes the special tokens itself.
        tokens = self._tokenizer(asked + guard.answer + label, add_special_tokens=guard.messages is None, verbose=False)
        return list(tokens["input_ids"])

    def _check_template(self) -> None:
        if self.guard.messages is not None and not self._tokenizer.chat_template:
            raise ValueError(
                f"{self.name!r} has messages, but the tokenizer of {self.guard.checkpoint!r} has no chat template for "
                "them: give it a prompt in place of messages."
            )

    def _tokens_of_labels(self) -> tuple[list[int], list[int]]:
        """Return the token of each label in which they differ, and all tokens from there on with the first label.

        Labels that begin alike, such as ``un|safe`` and ``un|known``, differ later. What they begin with is then a part
        of what the guard reads.

        Raises:
            ValueError: If there is no such token: a label has none of its own, or some of them share one.
        """
        labels = self.guard.labels
        encoded = [self._encode(_PROBE, label) for label in labels]
        shortest = min(map(len, encoded))
        common = next((i for i in range(shortest) if len({ids[i] for ids in encoded}) > 1), shortest)
        found: dict[int, str] = {}
        for label, ids in zip(labels, encoded, strict=True):
            token = ids[common] if len(ids) > common else None
            word = "" if token is None else self._tokenizer.convert_ids_to_tokens(token)
            if token is None or token in self._tokenizer.all_special_ids or token >= self._vocab_size:
                raise ValueError(
                    f"The label {label!r} of {self.name!r} has {repr(word) if word else 'no token'} where it should "
                    f"differ from the others in the vocabulary of {self.guard.checkpoint!r}: give labels of this model."
                )
            if token in found:
                raise ValueError(
                    f"The labels {found[token]!r} and {label!r} of {self.name!r} begin with the same token {word!r}, "
                    "and others do not, so that no token tells all of them apart: give other labels."
                )
            found[token] = label
        return list(found), encoded[0][common:]


def path_of(name: str) -> Path:
    """Return the YAML of a guard.

    Args:
        name: ``guard:`` and the name of a shipped one, or a path.

    Raises:
        FileNotFoundError: If there is none.
    """
    own = GuardScorer.location(name)
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if own in shipped:
        return shipped[own]
    path = at_home(own)
    if own and path.is_file():
        return path
    like = get_close_matches(path.name.lower(), shipped, n=1)
    meant = f"did you mean guard:{like[0]}? The" if like else "the"
    raise FileNotFoundError(
        f"{name!r} names neither a file here nor a guard that is shipped: {meant} shipped ones are "
        f"{', '.join(shipped)}."
    )


def read_guard(name: str) -> Guard:
    """Read the YAML of a guard.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no YAML of plain values, or describes no guard.
    """
    path = path_of(name)

    def refusal(reason: str) -> ValueError:
        return ValueError(f"{name!r} describes no guard: {reason}.")

    if (size := path.stat().st_size) > _LARGEST:
        raise refusal(f"its YAML has {size:,} bytes, and at most {_LARGEST:,} are read")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise refusal(f"its YAML cannot be read ({in_short(error)})") from None
    if not isinstance(content, dict):
        raise refusal(f"its YAML holds a {type(content).__name__}, not fields with values")
    known = [entry.name for entry in fields(Guard)]
    if unknown := [str(key) for key in content if key not in known]:
        like = get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {like[0]}" if like else f"its fields are {', '.join(known)}"
        raise refusal(f"it has an unknown field {unknown[0]!r:.40}: {meant}")
    for kind in ("unsafe", "safe"):
        if isinstance(given := content.get(kind), list) and any(isinstance(label, bool) for label in given):
            raise refusal(f'{kind} holds true or false, as YAML reads Yes and No: put them in quotes, "Yes"')
    try:
        guard: Guard = read_as(Guard, content)
    except ValueError as error:
        raise refusal(str(error)) from None
    if problem := _problem_of(guard):
        raise refusal(problem)
    return guard


def _problem_of(guard: Guard) -> str | None:
    """Return why a guard cannot be asked; None if it can."""
    if not guard.checkpoint.strip():
        return "its checkpoint is empty"
    for kind, labels in (("unsafe", guard.unsafe), ("safe", guard.safe)):
        if not labels:
            return f"it has no label that is {kind}"
        if not all(label.strip() for label in labels):
            return f"a label that is {kind} is empty"
    if twice := [label for label in guard.labels if guard.labels.count(label) > 1]:
        return f"it has the label {twice[0]!r} twice"
    if (guard.messages is None) == (guard.prompt is None):
        return "it must have either messages or a prompt"
    asked = guard.messages if guard.prompt is None else guard.prompt
    if _filled_in(asked, "") == asked:
        return f"{TEXT}, for which the text is put, stands nowhere in its {'messages' if guard.messages else 'prompt'}"
    if guard.arguments and guard.messages is None:
        return "its arguments are for a chat template, which a prompt does not go through"
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"tools", "documents"}
    if wrong := [key for key in guard.arguments if not isinstance(key, str) or key in taken | {"messages"}]:
        return f"its argument {wrong[0]!r} cannot be given to a chat template"
    return None


def _filled_in(value: object, text: str) -> object:
    """Return messages, or a part of them, with the text in place of ``{text}``."""
    if isinstance(value, str):
        return value.replace(TEXT, text)
    if isinstance(value, dict):
        return {key: _filled_in(item, text) for key, item in value.items()}
    return [_filled_in(item, text) for item in value] if isinstance(value, list) else value


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values: no tags of Python, no aliases, which a small file can make large by, no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"it has the key {twice[0]!r:.40} twice")
        return super().construct_mapping(node, deep)
