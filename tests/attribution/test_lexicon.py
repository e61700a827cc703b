"""Lexicons of words: how a word is spelled in tokens, and the target of words that the tokenizer splits."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import sentence, tokenizer_of, write_completions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparc3_lightning.attribution.lexicon import Lexicon, Spelling, spell
from sparc3_lightning.attribution.scores import ScoreFile, check_match
from sparc3_lightning.attribution.targets import lexicon_probability
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.evaluation.judges import judges_of
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.plan import digests_of

TEXTS = ["the art of a start", "an artist will delve into the art", "Art and the heart", "we delve\nArt"]


def byte_pairs(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer, as GPT-2 has it, that is trained on some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<s>"])
    tokenizer.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer whose blanks are of the tokens behind them."""
    return byte_pairs(TEXTS, 290)


def spelled(tokenizer: Any, words: list[str]) -> tuple[Lexicon, list[str]]:
    tokens = Tokens(tokenizer)
    return spell(words, tokens.encode_bare, tokens.decode, len(tokenizer))


def ends_of(lexicon: Lexicon, ids: list[int]) -> list[int]:
    """Return the positions of a text whose tokens complete a word, by the lexicon alone."""
    firsts, tokens = lexicon.firsts.tolist(), lexicon.tokens.tolist()
    found = [t for t, token in enumerate(ids) if token in tokens]
    found += [t for t, token in enumerate(ids) if token in firsts and not (t and lexicon.is_inside[ids[t - 1]].item())]
    split = lexicon.places(ids)
    found += [t + 1 for t, spelling in split if t + 1 < len(ids) and ids[t + 1] == spelling.ids[-1]]
    return sorted(found)


def test_a_word_is_spelled_behind_a_blank_and_at_the_beginning_of_a_line_in_both_cases(byte_level):
    lexicon, split = spelled(byte_level, ["art", "delve"])
    ids = {text: byte_level(text)["input_ids"] for text in (" art", "art", "Art", " Art", " delve", "delve")}
    assert len(ids[" art"]) == len(ids[" delve"]) == len(ids["art"]) == 1
    assert lexicon.tokens.tolist() == sorted(ids[" art"] + ids[" delve"])
    assert set(ids["art"]) <= set(lexicon.firsts.tolist())
    for text in ("Art", " Art", "delve"):
        assert ends_of(lexicon, ids[text]) == [len(ids[text]) - 1], text
    assert split == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the art of a start", ["the art"]),  # and not the end of start
        ("Art\nart art", ["Art", "Art\nart", "Art\nart art"]),
        ("the heart, art", ["the heart, art"]),
        ("a delve", ["a delve"]),
        ("we start", []),
    ],
)
def test_a_word_is_completed_where_it_stands_and_not_inside_another(byte_level, text, words):
    lexicon, _ = spelled(byte_level, ["art", "delve"])
    ids = byte_level(text)["input_ids"]
    assert [byte_level.decode(ids[: t + 1]) for t in ends_of(lexicon, ids)] == words


def test_a_phrase_is_its_tokens_in_their_order(byte_level):
    lexicon, split = spelled(byte_level, ["the art of"])
    assert split == ["the art of"]
    ids = byte_level("in the art of the art, the Art of")["input_ids"]
    assert [byte_level.decode(ids[: t + 1]) for t in ends_of(lexicon, ids)] == ["in the art of"]


def test_a_tokenizer_without_blanks_has_one_spelling_that_stands_anywhere():
    tokenizer = tokenizer_of(["a", "cat", "dog", "the", "good"])
    lexicon, split = spelled(tokenizer, ["cat", "the good dog"])
    assert lexicon.tokens.tolist() == tokenizer.convert_tokens_to_ids(["cat"])
    assert lexicon.split == (Spelling(tuple(tokenizer.convert_tokens_to_ids(["the", "good", "dog"])), False),)
    assert split == ["the good dog"]
    assert not len(lexicon.firsts)
    assert not len(lexicon.is_inside)


def test_a_word_counts_once_where_the_blank_before_it_is_a_token_of_its_own():
    own_blank = byte_pairs(["art\nart"], 259)
    assert own_blank.tokenize("the art") == ["t", "h", "e", "\u0120", "art"]
    lexicon, split = spelled(own_blank, ["art", "ha"])
    for text, number in (("the art", 1), ("art\nart start", 2), ("ha ha haha", 3)):
        assert len(ends_of(lexicon, own_blank(text)["input_ids"])) == number, text
    assert split == ["ha"]


def test_a_word_has_straight_and_curly_apostrophes(byte_level):
    for word in ("it's", "it\u2019s"):
        lexicon, _ = spelled(byte_level, [word])
        for text in ("so it's", "so it\u2019s", "It\u2019s"):
            assert len(ends_of(lexicon, byte_level(text)["input_ids"])) == 1, text


def test_a_token_beyond_those_of_the_tokenizer_is_not_inside_a_word(byte_level, make_model):
    tokens, size = Tokens(byte_level), len(byte_level)
    lexicon, _ = spell(["art"], tokens.encode_bare, tokens.decode, size, size + 8)
    assert lexicon.is_inside[size:].tolist() == [False] * 8
    assert len(lexicon.firsts)
    ids, model = torch.tensor([[5, size + 7, size + 7]]), make_model(vocab_size=size + 8)
    assert 0 < lexicon_probability(model, ids, None, torch.tensor([1]), lexicon).item() < 1
    assert list(lexicon.places(ids[0].tolist())) == []


def test_a_word_whose_only_token_needs_a_place_is_split_where_places_do_not_count():
    tokens = Tokens(byte_pairs(["art\nart"], 259))
    for wherever, split in ((False, []), (True, ["art"])):
        assert spell(["art"], tokens.encode_bare, tokens.decode, 259, wherever=wherever)[1] == split


def test_words_that_no_token_of_the_vocabulary_begins_are_named():
    tokenizer = tokenizer_of(["a", "cat", "dog"])
    with pytest.raises(ValueError, match=r"has no tokens that spell 'delve', 'the cat', '\u2014': remove them"):
        spelled(tokenizer, ["cat", "delve", "dog", "the cat", "\u2014"])


# The target.

WORD, OTHER, WHOLE = (2, 4), (4, 3, 2), 5


def lexicon_of_all() -> Lexicon:
    """Two words of several tokens, of which one begins with the end of the other, and one of a single token."""
    inside = torch.zeros(7, dtype=torch.bool)
    inside[3] = True  # what follows is the rest of a word
    split = (Spelling(WORD, True), Spelling(OTHER, False))
    return Lexicon(torch.tensor([WHOLE]), torch.tensor([6]), split, inside)


def count(text: tuple[int, ...], start: int) -> int:
    """Count the words that begin in a text from one position on, by looking at every slice."""
    found = 0
    for first in range(start, len(text)):
        free = first == 0 or text[first - 1] != 3
        found += text[first] == WHOLE
        found += text[first] == 6 and free
        found += text[first : first + 2] == WORD and free
        found += text[first : first + 3] == OTHER
    return found


def each_continuation(model: Any, prompt: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of a prompt with every text of a length behind it, and the probability of each."""
    drawn = torch.tensor(list(itertools.product(range(7), repeat=length)), dtype=torch.long)
    ids = torch.cat([torch.tensor([prompt]).expand(len(drawn), -1), drawn], dim=1)
    log = model(ids, use_cache=False).logits.log_softmax(dim=-1)[:, len(prompt) - 1 : -1]
    return ids, log.gather(2, drawn.unsqueeze(2)).sum(dim=(1, 2)).exp().detach()


@pytest.mark.parametrize("start", [0, 1, 2])
def test_words_of_a_text_are_counted_as_by_looking_at_every_slice(start):
    lexicon = lexicon_of_all()
    for text in itertools.product(range(7), repeat=5):
        assert lexicon.count(text, start) == count(text, start)


@pytest.mark.parametrize("prompt", [[1, 5, 2], [1, 3], [1, 4, 3]])
def test_the_target_of_own_continuations_is_the_number_of_words_expected_in_them_and_the_token_after(
    make_model, prompt
):
    model, length, lexicon = make_model(vocab_size=7), 3, lexicon_of_all()
    ids, chances = each_continuation(model, prompt, length + 1)
    numbers = torch.tensor([count(tuple(row), len(prompt)) for row in ids.tolist()])
    by_counting = (chances * numbers).sum().item() / (length + 1)
    ids, chances = each_continuation(model, prompt, length)
    start = torch.full([len(ids)], len(prompt))
    by_target = (chances * lexicon_probability(model, ids, None, start, lexicon)).sum().item()
    assert by_target == pytest.approx(by_counting, rel=1e-4)


def test_the_gradient_of_a_split_word_is_that_of_the_probability_of_all_its_tokens(make_model):
    model, prompt, length = make_model(vocab_size=7), [1, 5], 3
    lexicon = Lexicon(torch.tensor([], dtype=torch.long), split=(Spelling(OTHER, False),))
    head = model.get_output_embeddings().weight.requires_grad_(True)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(value, head)
        return found

    ids, chances = each_continuation(model, prompt, length)
    values = lexicon_probability(model, ids, None, torch.full([len(ids)], len(prompt)), lexicon)
    by_target = gradient((chances * values).sum())
    by_context = torch.zeros_like(head)
    for before in range(length + 2 - len(OTHER)):  # drawn tokens before the word
        ids, chances = each_continuation(model, prompt, before)
        whole = torch.cat([ids, torch.tensor([OTHER]).expand(len(ids), -1)], dim=1)
        log = model(whole, use_cache=False).logits.log_softmax(dim=-1)[:, -len(OTHER) - 1 : -1]
        of_word = log.gather(2, torch.tensor(OTHER).expand(len(ids), -1).unsqueeze(2)).sum(dim=(1, 2)).exp()
        by_context += gradient((chances * of_word).sum()) / (length + 1)
    torch.testing.assert_close(by_target, by_context, rtol=1e-4, atol=1e-9)


def test_padding_and_the_samples_beside_change_nothing(make_model):
    model, lexicon = make_model(vocab_size=7), lexicon_of_all()
    samples = [Sample("a", [1, 4, 3, 2, 4, 6], 1), Sample("b", [4, 3], 0), Sample("c", [1, 2, 2], 2)]
    batch = pad_right(samples, 0)
    together = lexicon_probability(model, batch["input_ids"], batch["attention_mask"], batch["start"], lexicon)
    alone = [
        lexicon_probability(model, torch.tensor([one.input_ids]), None, torch.tensor([one.start]), lexicon)
        for one in samples
    ]
    torch.testing.assert_close(together, torch.cat(alone))


# The option.


@pytest.fixture
def attribute(tiny_checkpoint) -> Callable[..., Attribution]:
    """Return what attributes a few continuations with a lexicon."""
    fields = ("model", "prompt_id", "continuation_index", "prompt", "prompt_toxicity", "continuation", "scores")
    rows = [
        ("baseline", f"p{i}", 0, sentence(i, 4), 0.9, f" {text}", {"some": 0.5})
        for i, text in enumerate(("a good dog", "the bad house", "wind and rain", "a bird"))
    ]
    write_completions(Path("completions.jsonl"), [dict(zip(fields, row, strict=True)) for row in rows])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}

    def run(folder: str, lexicon: Any, **options: Any) -> Attribution:
        data = ToxicPrompts("completions.jsonl", "continuation", continuation_toxicity=(0.0, 1.0), num_samples=4)
        trainer: Any = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet)
        target = options.pop("target", "lexicon_probability")
        module = Attribution(tiny_checkpoint, "gradient", "signed", target=target, lexicon=lexicon, **options)
        trainer.predict(module, datamodule=data, return_predictions=False)
        return module

    return run


def test_a_file_and_a_list_of_the_same_words_give_the_same_scores_and_say_which_words(attribute):
    Path("words.txt").write_text("# words\ndog\ngood dog\n")
    files = [
        ScoreFile.load(attribute(folder, lexicon).output)
        for folder, lexicon in (("file", "words.txt"), ("named", "words:words.txt"), ("list", ("dog", "good dog")))
    ]
    specs = [file.provenance.spec for file in files]
    assert [spec.lexicon for spec in specs] == ["words:words.txt", "words:words.txt", "a list of 2 words"]
    assert len({spec.words for spec in specs}) == 1
    assert files[0].provenance.data["num_lexicon"] == 2
    assert files[0].provenance.data["num_split"] == 1
    for file in files[1:]:
        for name, score in file.scores.items():
            torch.testing.assert_close(score, files[0].scores[name], rtol=0, atol=0)
    assert any(score.any() for score in files[0].scores.values())
    check_match(files[:2])


def test_score_files_of_different_words_in_one_file_do_not_mix(attribute):
    files = []
    for words in ("dog\n", "bird\n"):
        Path("words.txt").write_text(words)
        files.append(ScoreFile.load(attribute(words.strip(), "words.txt").output))
    with pytest.raises(ValueError, match="do not belong together: words is "):
        check_match(files)


def test_a_list_that_the_tokenizer_splits_is_scored_by_its_whole_words(attribute):
    module = attribute("split", ("good dog", "bad house"))
    assert not len(module.lexicon.tokens)
    assert any(score.any() for score in ScoreFile.load(module.output).scores.values())
    with pytest.raises(OptionError, match=r"--model.lexicon: the tokenizer splits each of its 1 words, and none of"):
        attribute("never", ("star fire",))
    with pytest.raises(OptionError, match=r"--model.target lexicon is about words of one token.* splits 'good dog'"):
        attribute("log", ("dog", "good dog"), target="lexicon")
    attribute("whole", ("dog", "bird"), target="lexicon")


def test_words_to_keep_are_subtracted_as_often_as_they_are_said_and_known_by_their_list(attribute):
    Path("kept.txt").write_text("bird\nbad house\nhouse\n")
    dogs, birds, both = (
        ScoreFile.load(attribute(folder, lexicon, **options).output)
        for folder, lexicon, options in (
            ("dogs", ("dog", "good dog"), {}),
            ("birds", "kept.txt", {}),
            ("both", ("dog", "good dog"), {"kept_words": "kept.txt"}),
        )
    )
    for name, score in both.scores.items():
        # "dog" and "good dog" are said once each; "bird", "bad house" and "house" as well.
        torch.testing.assert_close(score, dogs.scores[name] - 2 / 3 * birds.scores[name])
    assert any(not score.equal(dogs.scores[name]) for name, score in both.scores.items())
    assert (both.provenance.data["num_kept"], both.provenance.data["kept_weight"]) == (3, 0.6667)
    with pytest.raises(ValueError, match="do not belong together: kept is "):
        check_match([dogs, both])
    assert list(both.provenance.choosers) == ["a list of 2 words", "words:kept.txt, kept"]
    (judge,) = judges_of(["words:kept.txt"], list(both.provenance.choosers.items())).values()
    assert judge.is_chooser
    with pytest.raises(OptionError, match=r"--model.kept_words: .* no tokens that spell 'tapestry': remove"):
        attribute("unknown", ("dog",), kept_words=("bird", "tapestry"))
    for words, kept, which in (
        (("star",), ("bird",), "the words of the lexicon"),
        (("dog",), ("star",), "these words"),
    ):
        with pytest.raises(OptionError, match=rf"--model.kept_words and .* none of the 4 samples has one of {which}"):
            attribute("never", words, kept_words=kept)


@pytest.mark.parametrize(
    ("kept", "target", "said"),
    [
        (("bird", "Dog"), "lexicon_probability", "--model.kept_words has 'Dog', which is in the lexicon too: leave it"),
        (("bird", "the cat\u2019s"), "lexicon_probability", "--model.kept_words has 'the cat\u2019s', which is in the"),
        (("bird",), "lexicon", "--model.kept_words needs --model.target lexicon_probability, got lexicon"),
        ("small", "lexicon_probability", "--model.kept_words: 'small' is a scorer: give a list of words, or a file"),
        ((), "lexicon_probability", "--model.kept_words: The list holds no words"),
    ],
)
def test_words_to_keep_that_cannot_be_are_refused_at_once(kept, target, said):
    with pytest.raises(OptionError, match=said):
        Attribution("nothing", target=target, lexicon=("dog", "cat", "the cat's"), kept_words=kept)
    Attribution("nothing", lexicon=("dog", "cat"), kept_words=kept)  # other targets do not read them


def test_words_that_the_model_cannot_write_are_refused_before_it_is_loaded(attribute):
    with pytest.raises(OptionError, match=r"--model.lexicon: .* no tokens that spell 'tapestry', 'the realm': remove"):
        attribute("unknown", ("dog", "tapestry", "the realm"))


@pytest.mark.parametrize(
    ("lexicon", "said"),
    [
        ((), "--model.lexicon: The list holds no words"),
        (("dog", "Dog"), "--model.lexicon: Word 2 of the list holds 'Dog', which is there already"),
        ("twice.txt", "--model.lexicon: .*twice.txt, line 2 holds 'a', which is there already"),
        ("empty.txt", "--model.lexicon: .*empty.txt holds no words"),
    ],
)
def test_a_lexicon_that_cannot_be_used_is_refused_at_once(lexicon, said):
    Path("twice.txt").write_text("a\na\n")
    Path("empty.txt").write_text("\n# nothing\n")
    with pytest.raises(OptionError, match=said):
        Attribution("nothing", target="lexicon_probability", lexicon=lexicon)
    Attribution("nothing", lexicon=lexicon)  # other targets do not read it
    with pytest.raises(OptionFileNotFoundError, match=r"--model.lexicon: 'gone.txt' needs a text file of words"):
        Attribution("nothing", target="lexicon", lexicon="gone.txt")


def test_a_changed_file_of_words_is_another_input_of_an_attribution_and_a_list_is_in_its_config():
    Path("words.txt").write_text("dog\n")
    config = {"model": {"checkpoint": "hub/model", "target": "lexicon_probability", "lexicon": "words.txt"}}
    before = digests_of(Attribution, config, None)
    assert len(before) == 1
    Path("words.txt").write_text("dog\nbird\n")
    assert digests_of(Attribution, config, None) != before
    config["model"] |= {"lexicon": ["dog", "bird"]}
    assert digests_of(Attribution, config, None) == []
    config["model"] |= {"kept_words": "words.txt"}
    before = digests_of(Attribution, config, None)
    Path("words.txt").write_text("cat\n")
    assert len(before) == 1
    assert digests_of(Attribution, config, None) != before
