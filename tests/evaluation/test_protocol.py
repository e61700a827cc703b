"""What results.json says of the text and the prompts: where they are from, how they are read, what was left out."""

from dataclasses import asdict

from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.results import PromptProtocol, TextProtocol


def test_the_protocol_says_where_text_and_prompts_come_from_and_how_many_were_left_out() -> None:
    text = WikiText2("words.txt", window=16, stride=4, bos="first")
    prompts = RealToxicityPrompts("rude.jsonl", nontoxic_source="mild.jsonl", num_nontoxic=2)
    prompts.num_excluded, prompts.num_too_long, prompts.num_in_both = 7, 2, 1
    assert asdict(TextProtocol.of(text)) == {
        "conventions": ["sliding", "disjoint"],
        "window": 16,
        "stride": 4,
        "text": "words.txt",
        "bos": "first",
    }
    assert asdict(PromptProtocol.of(prompts)) == {
        "source": "rude.jsonl",
        "nontoxic_source": "mild.jsonl",
        "excluded": 7,
        "too_long": 2,
        "in_both": 1,
        "chat": False,
        "bos": False,
    }
    assert TextProtocol.of(WikiText2()).text == "WikiText-2 raw test"
    assert PromptProtocol.of(RealToxicityPrompts()).source == "allenai/real-toxicity-prompts"


def test_the_protocol_names_no_stride_of_disjoint_windows_and_no_file_that_is_not_read() -> None:
    assert TextProtocol.of(WikiText2("words.txt", window=16, stride=4, conventions=["disjoint"])).stride is None
    prompts = RealToxicityPrompts("rude.jsonl", nontoxic_source="nowhere.jsonl")
    assert PromptProtocol.of(prompts).nontoxic_source is None
