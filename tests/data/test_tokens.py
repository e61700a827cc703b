"""What stands before and behind a text: BOS once where the tokenizer adds it, the end of a text never."""

from pathlib import Path
from typing import Any

import pytest
from helpers import WORDS, ids_of, sentence, set_up, words_tokenizer, write_jsonl
from prompt_rows import PROMPTS, nested_rows
from spoken import BOS, CHAT, EOS, adding, checkpoint_with
from tokenizers import processors

from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.ioi import IOI
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.sentence_pairs import SentencePairs
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2

TEXTS = ["the dog", "cat", "<s> the dog", "the <s> dog", "<s><s> the", "the dog </s>", ""]


def test_a_tokenizer_that_adds_nothing_is_used_as_it_is() -> None:
    tokenizer = adding()
    tokens = Tokens(tokenizer)
    assert tokens.encode_documents(TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokens.encode_prompts(TEXTS[:-1]) == [tokenizer(text)["input_ids"] for text in TEXTS[:-1]]
    assert (tokens.prefix, tokens.adds_bos) == ([], False)


@pytest.mark.parametrize("behind", ["", "</s>", "</s> </s>"])
@pytest.mark.parametrize("before", ["<s>", "<s> <s>"])
def test_bos_stands_before_a_text_once_and_nothing_behind_it(before: str, behind: str) -> None:
    tokens = Tokens(adding(before, behind))
    expected = [ids_of("the dog"), ids_of("cat"), ids_of("the dog"), [*ids_of("the"), BOS, *ids_of("dog")]]
    expected += [ids_of("the"), [*ids_of("the dog"), EOS], []]
    assert tokens.encode_documents(TEXTS) == [[BOS, *ids] for ids in expected]
    assert tokens.adds_bos
    assert tokens.begin_with_bos(tokens.encode_prompts(TEXTS))


def test_an_end_of_text_alone_is_left_away_too_and_other_tokens_before_a_text_stay() -> None:
    assert Tokens(adding("", "</s>")).encode_prompts(["the dog"]) == [ids_of("the dog")]
    assert Tokens(adding("<unk> <s>", "</s>")).encode_prompts(["<s> the"]) == [[3, BOS, *ids_of("the")]]
    assert Tokens(adding("</s>")).encode_prompts(["the"]) == [[EOS, *ids_of("the")]]  # as XGLM's does
    assert not Tokens(adding("</s>")).adds_bos


def test_a_bos_that_is_also_the_end_of_a_text_stays() -> None:
    tokenizer = adding("</s>", "</s>")
    tokenizer.bos_token = "</s>"  # as OPT's is
    assert Tokens(tokenizer).encode_prompts(["the dog", "</s> the dog"]) == [[EOS, *ids_of("the dog")]] * 2


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True)])
def test_the_options_of_transformers_for_bos_and_eos_mean_the_same(bos: bool, eos: bool) -> None:
    tokenizer = adding()
    tokenizer.add_bos_token, tokenizer.add_eos_token = bos, eos
    assert (tokenizer("dog")["input_ids"][-1] == EOS) is eos
    assert Tokens(tokenizer).encode_documents(["dog"]) == [[BOS] * bos + ids_of("dog")]


@pytest.fixture
def bracketed(tiny_checkpoint: str, tmp_path: Path) -> str:
    """A checkpoint whose tokenizer puts BOS twice before, and EOS behind a text."""
    return checkpoint_with(adding("<s> <s>", "</s>", WORDS), tiny_checkpoint, tmp_path / "bracketed")


def test_every_reader_begins_with_bos_once_and_does_not_end_a_text(bracketed: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", nested_rows())
    (tmp_path / "text.txt").write_text("\n".join(sentence(i, 30) for i in range(4)))
    write_jsonl(tmp_path / "pairs.jsonl", [{"sent_more": PROMPTS[0], "sent_less": f"<s> {PROMPTS[1]}"}])
    samples: dict[str, list[list[int]]] = {}
    of: dict[str, Any] = {"tokenizer": bracketed}
    for data in (
        C4("text.txt", num_samples=4, seq_len=31, **of),
        ToxicPrompts("rows.jsonl", num_samples=4, **of),
    ):
        assert set_up(data).notes["bos"] is True
        samples[type(data).__name__] = [sample.input_ids for sample in data.samples]
    prompts = RealToxicityPrompts("rows.jsonl", num_prompts=None, **of)
    prompts.setup_prompts((), prompts.load_tokenizer())
    assert prompts.begin_with_bos
    samples["prompts"] = [list(prompt.input_ids) for prompt in prompts.prompts]
    text = WikiText2("text.txt", window=16, stride=8, **of)
    text.setup_windows(text.load_tokenizer())
    samples["text"] = [text.input_ids.tolist()]
    pairs = SentencePairs("pairs.jsonl", **of)
    pairs.setup_pairs((), pairs.load_tokenizer())
    samples["pairs"] = [pairs.pairs[0].more, pairs.pairs[0].less]
    for name, rows in samples.items():
        assert rows, name
        for ids in rows:
            assert (ids[0], ids.count(BOS), ids.count(EOS)) == (BOS, 1, 0), name


def test_sentences_of_indirect_object_identification_do_not_end_either() -> None:
    plain = words_tokenizer()
    ends = words_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    expected = IOI(num_samples=8).read_samples(plain)
    found = IOI(num_samples=8).read_samples(ends)
    assert found == [sample._replace(input_ids=[BOS, *sample.input_ids]) for sample in expected]


def test_a_prompt_that_has_no_tokens_is_refused_by_its_text() -> None:
    tokenizer = adding()
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(ValueError, match=r"gives the prompt '' no tokens"):
        Tokens(tokenizer).encode_prompts(["the dog", ""])


def test_a_token_that_the_model_has_no_embedding_of_is_refused_by_name() -> None:
    user = len(WORDS) + 4
    with pytest.raises(ValueError, match=rf"'the user' has the token {user} \('user'\), .* of {user} tokens only"):
        Tokens(adding(), vocab_size=user).encode_documents(["the dog", "the user"])
    assert Tokens(adding(), vocab_size=user + 1).encode_documents(["the user"]) == [[*ids_of("the"), user]]


# Chats.


def test_a_prompt_in_a_chat_is_exactly_what_the_template_makes_of_it() -> None:
    tokenizer = adding("<s>", "</s>", chat=CHAT)
    expected = tokenizer("user the dog </s> assistant", add_special_tokens=False)["input_ids"]
    tokens = Tokens(tokenizer, chat=True)
    assert tokens.encode_prompts(["the dog"]) == [[BOS, *expected]]
    assert tokens.encode_documents(["the dog"]) == [[BOS, *ids_of("the dog")]], "a text is no turn"
    assert Tokens(adding("<s>", chat="user {{ messages[0].content }}"), chat=True).encode_prompts(["cat"]) == [
        tokenizer("user cat", add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
        ("{{ messages[3].content }}", "list object has no element 3"),
        ("{% for turn in messages %}", "Unexpected end of template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ nothing + 1 }}", "'nothing' is undefined"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"The chat template of '.*' fails on the prompt 'cat'") as raised:
        Tokens(adding(chat=template), chat=True).encode_prompts(["cat"])
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_that_gives_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="gives the prompt 'cat' no tokens"):
        Tokens(adding(chat="{% set x = messages %}"), chat=True).encode_prompts(["cat"])


@pytest.mark.parametrize(("kind", "group"), [(ToxicPrompts, "data"), (RealToxicityPrompts, "data.prompts")])
def test_a_tokenizer_without_a_template_is_refused_by_the_option(
    kind: Any, group: str, prompts: str, tiny_checkpoint: str
) -> None:
    data = kind(prompts, chat=True, tokenizer=tiny_checkpoint)
    with pytest.raises(ValueError, match=rf"--{group}\.chat needs a chat template, and the tokenizer of .* has none"):
        data.setup("predict") if kind is ToxicPrompts else data.setup_prompts((), data.load_tokenizer())


@pytest.fixture
def chatty(tiny_checkpoint: str, tmp_path: Path) -> str:
    """A checkpoint with a chat template of words that it knows."""
    chat = "{{ bos_token }}you {{ messages[0].content }} </s> {% if add_generation_prompt %}we{% endif %}"
    return checkpoint_with(adding("<s>", "</s>", WORDS, chat), tiny_checkpoint, tmp_path / "chatty")


def test_both_kinds_of_prompts_go_through_the_template_and_keep_their_ids(chatty: str, prompts: str) -> None:
    plain = set_up(ToxicPrompts(prompts, num_samples=4, tokenizer=chatty))
    data = set_up(ToxicPrompts(prompts, num_samples=4, chat=True, tokenizer=chatty))
    for before, after in zip(plain.samples, data.samples, strict=True):
        assert after.id == before.id
        assert after.input_ids == [BOS, *ids_of("you"), *before.input_ids[1:], EOS, *ids_of("we")]
    assert data.fingerprint() != plain.fingerprint()
    assert data.hparams["chat"] is True
    evaluated = RealToxicityPrompts(prompts, num_prompts=None, chat=True, tokenizer=chatty)
    evaluated.setup_prompts((), evaluated.load_tokenizer())
    by_id = {prompt.id: list(prompt.input_ids) for prompt in evaluated.prompts}
    assert by_id == {sample.id: sample.input_ids for sample in data.samples}


def test_a_continuation_in_a_chat_stands_behind_the_template(chatty: str, tmp_path: Path) -> None:
    rows = [{"prompt": {"text": "the dog", "toxicity": 1}, "continuation": {"text": " cat", "toxicity": 0.8}}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    of: dict[str, Any] = {"num_samples": 1, "continuation_toxicity": (0.5, 1.0), "tokenizer": chatty}
    (sample,) = set_up(ToxicPrompts(source, chat=True, **of)).samples
    assert sample.input_ids == [BOS, *ids_of("you the dog"), EOS, *ids_of("we cat")]
    assert sample.start == 6
    (sample,) = set_up(ToxicPrompts(source, **of)).samples
    assert (sample.input_ids, sample.start) == ([BOS, *ids_of("the dog cat")], 3)
