"""What the benchmarks do by themselves: the tables of selections, the third judge, and the gains of the bound."""

import io
import json
import pickle
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import h5py
import pytest
import torch
from made_up import NEURONS, made_up
from torch import Tensor

from sparc3_lightning.attribution.lexicon import Lexicon
from sparc3_lightning.data.base import Sample
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import mask
from sparc3_lightning.selection.neuron_list import NeuronList

BENCHMARKS = Path(__file__).with_name("benchmarks")


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


class Tokenizer:
    """As Keras pickles one: a word may be the name of a field, and a string is written once."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.word_counts = OrderedDict(counts)
        self.word_docs = dict.fromkeys(counts, 1)
        self.filters, self.num_words = "!", 20


@pytest.mark.parametrize("protocol", [4, 5])
def test_the_words_of_a_pickled_tokenizer_are_read_without_unpickling_it(protocol, monkeypatch):
    third_judge = import_module("third_judge")
    counts = {sys.intern("collections"): 7, "the": 900, "word_docs": 3, "a": 70_000, "of": 900, "rare": 1}
    counts |= {f"word{i}": 2 for i in range(1500)}  # more than one batch of instructions
    pickled = pickle.dumps(Tokenizer(counts), protocol)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    ranks = third_judge.read_ranks(io.BytesIO(pickled))
    assert list(ranks)[:6] == ["a", "the", "of", "collections", "word_docs", "word0"]
    assert list(ranks.values()) == list(range(1, len(counts) + 1))
    assert third_judge.numbers("Of the!A\tnobody", ranks).tolist() == [0] * 97 + [3, 2, 1]


def test_the_weights_of_keras_give_what_its_equations_say(tmp_path):
    third_judge = import_module("third_judge")
    draw = torch.Generator().manual_seed(0)
    width, words, labels = 3, 11, 2
    shapes = {
        "embedding": [(words, width)],
        "dense": [(2 * width, width), (width,)],
        "dense_1": [(width, labels), (labels,)],
    }
    for direction in ("forward", "backward"):
        shapes[f"bidirectional/{direction}_layer/cell"] = [(width, 4 * width), (width, 4 * width), (4 * width,)]
    weights = {name: [torch.randn(shape, generator=draw) for shape in of] for name, of in shapes.items()}
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        for name, tensors in weights.items():
            for i, tensor in enumerate(tensors):
                file[f"layers/{name}/vars/{i}"] = tensor.numpy()
    model = third_judge.read_weights(tmp_path / "weights.h5", third_judge.BiLSTM(words, width, labels))
    ids = torch.tensor([[0, 4, 10, 4], [1, 2, 3, 9]])

    def states(inputs: list[Tensor], direction: str) -> list[Tensor]:
        into, onto, bias = weights[f"bidirectional/{direction}_layer/cell"]
        h = c = torch.zeros(width)
        found = []
        for x in inputs:
            i, f, new, o = (x @ into + h @ onto + bias).split(width)
            c = f.sigmoid() * c + i.sigmoid() * new.tanh()
            h = o.sigmoid() * c.tanh()
            found.append(h)
        return found

    for row, found in zip(ids.tolist(), model(ids), strict=True):
        inputs = [weights["embedding"][0][i] for i in row]
        both = zip(states(inputs, "forward"), states(inputs[::-1], "backward")[::-1], strict=True)
        largest = torch.stack([torch.cat(pair) for pair in both]).amax(dim=0)
        (first, bias), (second, of_second) = weights["dense"], weights["dense_1"]
        expected = ((largest @ first + bias).relu() @ second + of_second).sigmoid()
        torch.testing.assert_close(found, expected)


def test_fitted_gains_lower_what_they_are_fitted_on_and_are_a_list_of_damped_components(tiny_checkpoint):
    upper_bound = import_module("upper_bound")
    model = Checkpoint(tiny_checkpoint).load(torch.float32).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    texts = [Sample(f"{i}", torch.randint(60, (5 + i,), generator=draw).tolist(), start=2) for i in range(4)]
    documents = torch.randint(60, (3, 8), generator=draw)
    lexicon = Lexicon.of_tokens([3, 4, 5])
    with torch.no_grad():
        before = upper_bound.mean_probability(model, texts, lexicon).item()
    gains = upper_bound.Gains(model)
    options = {"steps": 12, "rate": 0.2, "batch": (4, 2), "before": before}
    t, kl = upper_bound.fit(model, gains, texts, documents, lexicon, 0.01, **options)
    assert t < 1
    assert kl > 0
    values = torch.cat([gain.detach() for gain in gains.values.values()])
    assert (values.min(), values.max()) == (0, 1)
    damped = gains.components()
    assert {component.granularity for component in damped} == {"neuron", "channel"}
    ids = documents[:1]
    with torch.no_grad():
        with gains.applied():
            fitted = model(ids).logits
        with mask(model, damped):
            torch.testing.assert_close(model(ids).logits, fitted, atol=0.02, rtol=0.02)
        assert not torch.allclose(model(ids).logits, fitted, atol=0.02)
    _, little = upper_bound.fit(model, upper_bound.Gains(model), texts, documents, lexicon, 1e6, **options)
    assert little < kl


def test_all_budgets_are_one_sweep_of_a_selection_a_line_and_a_table_a_budget(tmp_path, monkeypatch, capsys):
    selections = import_module("selections")
    results, _ = made_up()
    asked: list[str] = []

    def prune(_, name: str, budget: float) -> Path:
        use = {"max_perplexity_increase": budget, "rise": budget - 0.001, "predicted": None}
        NeuronList(NEURONS.neurons, {"budget": use}).save(file := Path(f"{name}_{budget:g}.json"))
        return file

    def sweep(*options: str) -> Path:
        asked.extend(options)
        names = ("prob", "prob", "random", "random")
        doses = [replace(results.doses[0], selection=name, kinds={"neuron": 10 + i}) for i, name in enumerate(names)]
        replace(results, doses=doses).save(tmp_path / "results.json")
        return tmp_path

    for file in ("rtp/toxic.jsonl", "c4/en.jsonl", "wikitext2/wiki.test.raw"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text('{"prompt": {"text": "you", "toxicity": 0.9}}\n')
    for name, of in {"prune": prune, "sparc3": sweep, "attribute": lambda *_: None}.items():
        monkeypatch.setattr(selections, name, of)
    options = (
        f"--data {tmp_path} --folder {tmp_path}/run --budgets 0.01 0.05 --selections prob random --json found.json"
    )
    monkeypatch.setattr(sys, "argv", ["selections.py", *options.split()])
    monkeypatch.chdir(tmp_path)
    selections.main()
    assert asked[0] == "sweep"
    assert "--model.names=[prob,prob,random,random]" in asked
    assert "--model.neurons=[prob_0.01.json,prob_0.05.json,random_0.01.json,random_0.05.json]" in asked
    first, second = capsys.readouterr().out.split("\nBudget ")[1:]
    assert first.startswith("1 %")
    assert second.startswith("5 %")
    rows = [[row.split(" | ")[:3] for row in of.splitlines() if "neurons" in row] for of in (first, second)]
    assert rows == [
        [["| prob", "10 neurons", "+0.90"], ["| random", "12 neurons", "+0.90"]],
        [["| prob", "11 neurons", "+4.90"], ["| random", "13 neurons", "+4.90"]],
    ]
    assert list(json.loads(Path("found.json").read_text())) == ["0.01", "0.05"]
