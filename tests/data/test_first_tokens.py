"""The first tokens of a long text: those of the whole text, of which no more is encoded than that takes."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import WORDS, sentence, tokenizer_of
from spoken import adding, checkpoint_with
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.data.wikitext2 import WikiText2

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
AS_UNDERSCORES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def prose(seed: int, breaks: str = "\n") -> str:
    """Return a text with headings, numbers, punctuation, blank lines, and accents in two pieces."""
    draw = random.Random(seed)
    lines = []
    for _ in range(700):
        words = draw.choices(
            [*WORDS, "don't", "e\u0301te\u0301", "12345", "3.14", "(see", "it)", "\u4f60\u597d", "..."], k=9
        )
        lines.append(draw.choice(["", " ", " = ", "\t"]) + " ".join(words) + draw.choice(["", " ", ".", "  "]))
    return "".join(line + draw.choice([breaks, breaks * 2, breaks * 7]) for line in lines)


@cache
def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, or one that was trained on such a text."""
    if kind == "words":
        return tokenizer_of(WORDS)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    model, normalizer, splitter = {
        "gpt2": (models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "llama3": (models.BPE(), None, pre_tokenizers.Sequence([split, bytes_of])),
        "qwen": (models.BPE(), normalizers.NFC(), pre_tokenizers.Sequence([split, bytes_of])),
        "bert": (
            models.WordPiece(unk_token="<unk>"),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
        "t5": (models.Unigram(), normalizers.Nmt(), pre_tokenizers.Metaspace()),
        "bytes alone": (models.BPE(), None, bytes_of),
        "llama2": (models.BPE(), AS_UNDERSCORES, None),
        "gemma": (models.BPE(), normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    }[kind]
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    trainer: Any = {
        models.BPE: trainers.BpeTrainer,
        models.WordPiece: trainers.WordPieceTrainer,
        models.Unigram: trainers.UnigramTrainer,
    }[type(model)]
    options = {"unk_token": "<unk>"} if kind == "t5" else {}
    tokenizer.train_from_iterator(
        prose(99)[:20_000].splitlines(keepends=True),
        trainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, **options),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


SPLITTING = ("gpt2", "llama3", "qwen", "bert", "t5", "words")
JOINING = ("bytes alone", "llama2", "gemma")


def first(tokens: Tokens, text: str, number: int) -> tuple[list[int], int]:
    """Return the first tokens of a text, and how many of its characters were encoded, at most at a time."""
    lengths = []

    def encode(part: str) -> list[int]:
        lengths.append(len(part))
        return tokens.encode_bare([part])[0]

    return tokens.encode_first(text, number, encode)[:number], max(lengths)


@pytest.mark.parametrize("kind", [*SPLITTING, *JOINING])
def test_the_first_tokens_are_those_of_the_whole_text(kind: str) -> None:
    tokens = Tokens(tokenizer_like(kind))
    for seed, breaks in ((0, "\n"), (1, "\r\n"), (2, "\n \n")):
        text = prose(seed, breaks)
        (whole,) = tokens.encode_bare([text])
        for number in (1, 2, 50, 777, 3000, len(whole) - 1, len(whole), len(whole) + 1):
            found, characters = first(tokens, text, number)
            assert found == whole[:number]
            if number < 1000:
                assert (characters < len(text) // 2) is (kind in SPLITTING)


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_wherever_the_text_is_cut_the_tokens_before_are_the_same(cut: int) -> None:
    tokens, text = Tokens(tokenizer_like("llama3")), prose(3)[cut:]
    (whole,) = tokens.encode_bare([text])
    for number in range(1, 200, 19):
        assert first(tokens, text, number)[0] == whole[:number]


@pytest.mark.parametrize("long", ["\n" * 30_000, " \n" * 9_000, "x" * 9_000, "0123456789" * 900, "x" * 2_000 + "\n"])
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "words"])
def test_a_very_long_word_or_gap_and_a_single_line_change_no_token(kind: str, long: str) -> None:
    tokens = Tokens(tokenizer_like(kind))
    for text in (prose(4)[:3_000] + long + prose(5), long + prose(6), prose(7).replace("\n", " "), long, ""):
        (whole,) = tokens.encode_bare([text])
        for number in (1, 300, 2_000):
            assert first(tokens, text, number)[0] == whole[:number]


@pytest.mark.parametrize("adds", ["<s>", ""])
@pytest.mark.parametrize("bos", [None, "first", "every", "none"])
def test_the_windows_of_so_many_tokens_begin_those_of_all(
    tiny_checkpoint: str, tmp_path: Path, bos: Any, adds: str
) -> None:
    tokenizer = checkpoint_with(adding(adds, words=WORDS), tiny_checkpoint, tmp_path / "tiny")
    source = tmp_path / "text.txt"
    source.write_text("<s> <s> " + "\n".join(sentence(i, 12) for i in range(2000)))
    found = []
    for number in (None, 300):
        data = WikiText2(str(source), 16, 4, num_tokens=number, bos=bos, tokenizer=tokenizer)
        data.setup_windows(data.load_tokenizer())
        found.append((data.input_ids[:300].tolist(), data.has_bos, data.before))
    assert found[0] == found[1]
    assert len(data.input_ids) == 300
