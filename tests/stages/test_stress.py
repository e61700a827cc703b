"""The verb stress: what the figures of each condition are, what is trained, and what is left of an effect."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from evaluations import EVERY_SECOND, MILD, UP, data, evaluation, read_strictly, save_neurons
from evaluations import run as evaluate
from helpers import sentence, write_jsonl
from mixtures import make_mixture, open_
from pages import Page

from sparc3_lightning.cli import main
from sparc3_lightning.data.base import Sample
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.stress_data import StressData
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.evaluation.intervals import Resampled
from sparc3_lightning.evaluation.results import Findings
from sparc3_lightning.evaluation.stress import StressResults
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.likelihood import Reference, last_hidden_state, score_windows
from sparc3_lightning.models.rounding import round_
from sparc3_lightning.report.stress import stress_table
from sparc3_lightning.stages.finetuning import FineTuning, trained
from sparc3_lightning.stages.stress import Stress, after, grown_back, holding

pytestmark = pytest.mark.usefixtures("as_if_from_python", "input_files")
SAMPLING = SamplingOptions(max_new_tokens=8, temperature=1.0, num_continuations=2)
PRUNED = [Component(UP[0], index, -1.0) for index in (1, 5, 20)]


def stress_data(**options: Any) -> StressData:
    of = data(**options)
    return StressData(of.text, of.prompts)


def neutral(num_samples: int = 8, batch_size: Any = 2, seq_len: int = 12) -> C4:
    texts = [sentence(600 + i, 30) for i in range(20)]
    return C4(
        write_jsonl(Path("neutral.jsonl"), [{"text": text} for text in texts]),
        num_samples,
        seq_len,
        batch_size=batch_size,
    )


def stress(model: Stress, of: StressData, folder: str = "out", **options: Any) -> StressResults:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    model.stress(L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options), of)
    read_strictly(Path(folder, "stress.json"))
    return StressResults.load(Path(folder, "stress.json"))


@pytest.mark.slow
def test_without_stress_the_figures_are_those_of_an_evaluation_and_with_it_those_of_stressed_checkpoints(
    tiny_checkpoint, neurons
):
    found = stress(
        Stress(neurons, bits=[3], finetune=FineTuning(0), scorers=["small"], sampling=SAMPLING), stress_data()
    )
    plain, rounded = found.stressed
    assert (plain.name, rounded.name) == ("as it is", "3 bits")
    options = {"num_continuations": 2, "max_new_tokens": 8}

    def evaluated(checkpoint: str, folder: str, neurons: Path | None) -> dict[str, Any]:
        return evaluate(evaluation(checkpoint, neurons, **options), folder=folder)

    expected = evaluated(tiny_checkpoint, "evaluated", neurons)
    ours = json.loads(Path("out/stress.json").read_text())["stressed"]
    for name in Findings.__dataclass_fields__:
        assert ours[0]["found"].get(name) == expected.get(name), name
    # The same by another way: each of the two models as a checkpoint of its own.
    for name, changes in {"baseline": [], "pruned": [lambda model: prune_(model, EVERY_SECOND)]}.items():
        model = load_model(tiny_checkpoint, torch.float32)
        for change in [*changes, lambda model: round_(model, 3)]:
            change(model)
        folder = Path(f"rounded-{name}")
        model.save_pretrained(folder)
        for file in Path(tiny_checkpoint).glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        rounded_alone = evaluate(evaluation(str(folder), **options), data(), folder=f"evaluated-{name}")
        theirs = ours[1]["found"][name]
        assert theirs["perplexity"] == rounded_alone["baseline"]["perplexity"]
    assert rounded.found.pruned.kl > 0
    assert rounded.found.baseline.perplexity != plain.found.baseline.perplexity


@pytest.mark.slow
def test_what_is_left_is_the_ratio_of_both_effects_over_the_same_prompts(neurons, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = stress(
        Stress(neurons, bits=[2], finetune=FineTuning(0), scorers=["toy_scorers:letters"], sampling=SAMPLING),
        stress_data(),
    )
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for folder in ("as-it-is", "2-bits"):
        for line in Path("out", folder, "completions.jsonl").read_text().splitlines():
            row = json.loads(line)
            score = row["scores"]["toy_scorers:letters"]
            if score is not None:
                values.setdefault((folder, row["model"]), {}).setdefault(row["prompt_id"], []).append(score)
    means = {key: {p: torch.tensor(of).double().mean() for p, of in rows.items()} for key, rows in values.items()}
    shared = sorted(set.intersection(*map(set, means.values())))
    effects = {
        folder: torch.stack([means[folder, "pruned"][p] - means[folder, "baseline"][p] for p in shared])
        for folder in ("as-it-is", "2-bits")
    }
    left = found.stressed[1].left["toy_scorers:letters"]
    expected = Resampled(effects["2-bits"], effects["as-it-is"]).ratio()
    assert asdict(left) == pytest.approx(asdict(expected), nan_ok=True)
    assert left.value == pytest.approx((effects["2-bits"].mean() / effects["as-it-is"].mean()).item())
    assert found.stressed[0].left == {}


def test_other_prompts_have_an_effect_of_their_own_and_those_attributed_on_are_left_out(tiny_checkpoint):
    neurons = save_neurons(tiny_checkpoint, EVERY_SECOND, {"sample_ids": [prompt_id(MILD[1])]})
    of = stress_data()
    of.other_prompts = RealToxicityPrompts("mild.jsonl", num_prompts=None, min_toxicity=None, batch_size=2)
    of.other_text = WikiText2("text.txt", window=24, stride=24, conventions=["disjoint"])
    model = Stress(neurons, bits=[], finetune=FineTuning(0), scorers=["small"], sampling=SAMPLING)
    found = stress(model, of)
    plain, other = found.stressed
    assert other.name == "other prompts"
    assert (other.prompts.source, other.prompts.excluded, other.left) == ("mild.jsonl", 1, {})
    assert other.found.baseline.groups["all"].num_prompts == len(MILD) - 1
    assert other.found.baseline.perplexity == plain.found.baseline.perplexity
    assert set(found.inputs) >= {"text", "other_text", "prompts", "other_prompts"}
    assert list(plain.found.perplexity_change) == ["sliding", "disjoint", "other_text_disjoint"]
    assert found.config["other_text"]["window"] == 24
    assert found.config["other_prompts"]["source"] == "mild.jsonl"
    assert "other prompts" in model.summary()


@pytest.mark.slow
def test_both_models_are_trained_alike_and_differently_from_the_checkpoint(neurons):
    of = stress_data()
    of.neutral = neutral()
    options = {"bits": [], "scorers": ["small"], "sampling": SAMPLING}
    model = Stress(neurons, finetune=FineTuning(4, 1e-2), **options)
    before = None

    def remember() -> None:
        nonlocal before
        before = {name: weight.clone() for name, weight in model.model.named_parameters()}

    model.on_test_epoch_end = lambda: before or remember()
    found = stress(model, of)
    plain, tuned = found.stressed
    assert tuned.name == "fine-tuned"
    for name in ("baseline", "pruned"):
        now, then = (next(iter(one.found.models[name].perplexity.values())).value for one in (tuned, plain))
        assert now != then
    assert tuned.grew_back == 0.0, "no gradient reaches a neuron of a gated MLP of which all weights are zero"
    assert "Of the pruned weights 0.0 % grew back" in found.verdict
    assert all(torch.equal(before[name], weight) for name, weight in model.model.named_parameters()), "undone exactly"
    again = stress(Stress(neurons, finetune=FineTuning(4, 1e-2), **options), of, "again")
    assert again.stressed == found.stressed
    kept = stress(Stress(neurons, finetune=FineTuning(4, 1e-2, keep_rows=True), **options), of, "kept")
    assert kept.stressed[1].grew_back > 0
    assert kept.stressed[1].found.baseline == tuned.found.baseline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_is_adamw_on_one_batch_after_the_other(tiny_checkpoint, dtype):
    model = load_model(tiny_checkpoint, dtype)
    of = neutral(num_samples=6)
    of.tokenizer = tiny_checkpoint
    of.setup("fit")
    untouched = {name: weight.clone() for name, weight in model.named_parameters()}
    steps = []
    found = trained(model, of.samples, 2, FineTuning(3, 1e-3), torch.device("cpu"), 0, lambda: steps.append(1))
    slow = load_model(tiny_checkpoint, dtype).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(slow.parameters(), lr=1e-3)
    for start in (0, 2, 4):
        ids = torch.tensor([sample.input_ids for sample in of.samples[start : start + 2]])
        logs = slow(ids).logits[:, :-1].log_softmax(dim=-1)
        loss = -logs.gather(2, ids[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, weight in slow.named_parameters():
        torch.testing.assert_close(found[name], weight.detach().to(dtype))
        assert torch.equal(model.get_parameter(name), untouched[name])
    assert len(steps) == 3


def test_weights_are_held_for_a_block_and_put_back_even_after_an_error(make_model):
    model, before = make_model(), make_model()
    pruned = after(model, lambda of: prune_(of, PRUNED))
    assert set(pruned) == {f"model.layers.0.mlp.{name}.weight" for name in ("up_proj", "gate_proj", "down_proj")}
    ids = torch.tensor([[3, 4, 5]])
    with mask(before, PRUNED):
        expected = before(ids).logits

    def break_off() -> None:
        with holding(model, pruned):
            torch.testing.assert_close(model(ids).logits, expected)
            raise KeyError("broken off")

    with pytest.raises(KeyError, match="broken off"):
        break_off()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before.parameters(), strict=True))


def test_the_divergence_of_a_trained_model_is_from_what_the_other_one_predicts_with_its_own_head(neurons, make_model):
    other = make_model(seed=5)
    stress_of = Stress(neurons, finetune=FineTuning(1), scorers=["small"], sampling=SAMPLING)
    stress_of.model = model = make_model(seed=4)
    stress_of.pruned_weights, stress_of.off = dict(other.named_parameters()), {"baseline": []}
    ids, spans = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 3]])
    before, after_ = (one(ids, use_cache=False).logits[:, :2].log_softmax(dim=-1) for one in (model, other))
    original = last_hidden_state(model, ids)
    with stress_of.as_variant(stress_of.variants[1]):
        hidden, head = last_hidden_state(model, ids), stress_of.original_head
        _, found = score_windows(model, hidden, ids, spans, Reference(original), reference_head=head)
    assert found.item() == pytest.approx((before.exp() * (before - after_)).sum().item(), rel=1e-4)
    with stress_of.as_variant(stress_of.variants[0]):
        assert stress_of.original_head is None


def test_what_grew_back_is_in_units_of_what_was_pruned():
    original = {"a": torch.tensor([3.0, 1.0, 4.0]), "b": torch.tensor([7.0])}
    pruned = {"a": torch.tensor([0.0, 1.0, 0.0])}
    assert grown_back(original, pruned, {"a": torch.tensor([0.0, 9.0, 0.0]), "b": torch.tensor([0.0])}) == 0
    assert grown_back(original, pruned, original) == 1
    assert math.isclose(grown_back(original, pruned, {"a": torch.tensor([0.0, 1.0, 2.5])}), 0.5)
    damped = {"a": torch.tensor([1.5, 1.0, 4.0])}
    assert grown_back(original, damped, {"a": torch.tensor([2.25, 0.0, 0.0])}) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["head", "weight"])
def test_heads_and_single_weights_go_under_stress_too(granularity, tiny_checkpoint):
    chosen = {
        "head": [Component("model.layers.0.self_attn.o_proj", 1, -1.0, granularity="head")],
        "weight": [Component(UP[0], 3, -1.0, granularity="weight", input=index) for index in range(4)],
    }[granularity]
    of = stress_data(num_prompts=6)
    of.neutral = neutral(num_samples=4)
    model = Stress(
        save_neurons(tiny_checkpoint, chosen),
        bits=[4],
        finetune=FineTuning(2, 1e-2),
        scorers=["small"],
        sampling=SAMPLING,
    )
    found = stress(model, of)
    assert [one.name for one in found.stressed] == ["as it is", "4 bits", "fine-tuned"]
    assert found.granularity == granularity
    assert found.stressed[2].grew_back > 0


@pytest.mark.slow
def test_the_command_line_writes_a_table_a_page_and_a_config_that_repeats_it(neurons, tmp_path, caplog):
    write_jsonl(tmp_path / "neutral.jsonl", [{"text": sentence(600 + i, 30)} for i in range(20)])
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"scorers": ["small"], "bits": [4], "sampling": {"max_new_tokens": 5}, "finetune": {"steps": 2}},
        "data": {
            "text": {"class_path": "WikiText2", "init_args": {"source": "text.txt", "window": 32, "stride": 16}},
            "prompts": {
                "class_path": "RealToxicityPrompts",
                "init_args": {"source": "prompts.jsonl", "num_prompts": 6},
            },
            "neutral": {"class_path": "C4", "init_args": {"source": "neutral.jsonl", "num_samples": 4, "seq_len": 9}},
        },
    }
    Path("stress.yaml").write_text(yaml.safe_dump(config))
    with caplog.at_level("INFO"):
        folder = Path(main(["stress", "--config", "stress.yaml", "--model.neurons", str(neurons)]).trainer.log_dir)
    assert folder == Path("lightning_logs/stress/version_0")
    found = StressResults.load(folder / "stress.json")
    said = caplog.records[-1].getMessage()
    assert max(map(len, said.splitlines())) <= 100
    assert [line.split("  ")[0] for line in said.splitlines()[3:6]] == ["as it is", "4 bits", "fine-tuned"]
    assert found.verdict.split(".")[0] in said
    page = (folder / "stress.html").read_text()
    assert [list(row) for row in stress_table(found)] == Page(page).tables[0]
    (folder / "stress.html").unlink()
    main(["report", str(folder)])
    assert (folder / "stress.html").read_text() == page
    assert not list(folder.rglob(".lock")) + list(folder.rglob("unfinished-*"))
    again = main(["stress", "--config", str(folder / "config.yaml"), "--trainer.logger.init_args.version", "9"])
    assert StressResults.load(Path(again.trainer.log_dir, "stress.json")).stressed == found.stressed
    with pytest.raises(FileExistsError, match=r"stress\.json exists already"):
        main(["stress", "--config", str(folder / "config.yaml"), "--trainer.logger.init_args.version", "9"])


def test_experts_are_pruned_rounded_and_trained_as_copies():
    model, before = (make_mixture("mixtral", torch.float32) for _ in range(2))
    for of in (model, before):
        layers = open_(of)
    chosen = [Component(next(name for name in layers if name.endswith("up_proj")), 1, -1.0)]
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with mask(before, chosen):
        expected = before(ids).logits
    with holding(model, after(model, lambda of: prune_(of, chosen))):
        torch.testing.assert_close(model(ids).logits, expected)
    assert any("experts" in name for name in after(model, lambda of: round_(of, 2)))
    samples = [Sample("a", [3, 4, 5, 6]), Sample("b", [7, 8, 9])]  # of two lengths
    found = trained(model, samples, 2, FineTuning(1, 1e-2), torch.device("cpu"), 0)
    moved = {name for name, weight in before.named_parameters() if not torch.equal(found[name], weight)}
    assert any("experts" in name for name in moved)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before.parameters(), strict=True))
