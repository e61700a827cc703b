"""What the verb stress refuses: in one sentence that names the option, before any model is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from evaluations import EVERY_SECOND, MILD, data, save_neurons
from helpers import sentence, write_jsonl

from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.stress_data import StressData
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.stages.finetuning import FineTuning
from sparc3_lightning.stages.stress import Stress

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files", "no_model_is_loaded")


def stress(neurons: Path, of: StressData | None = None, **options: Any) -> None:
    trained_on = options.pop("trainer", {})
    options = {"finetune": FineTuning(0), "scorers": ["small"], **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir="out", **quiet, **trained_on)
    Stress(neurons, sampling=SamplingOptions(max_new_tokens=4), **options).stress(trainer, of or stress_data())


def stress_data(**options: Any) -> StressData:
    of = data()
    return StressData(of.text, of.prompts, **options)


def neutral(**options: Any) -> C4:
    write_jsonl(Path("neutral.jsonl"), [{"text": sentence(600 + i, 30)} for i in range(20)])
    return C4("neutral.jsonl", **{"num_samples": 8, "seq_len": 12, "batch_size": 2, **options})


@pytest.mark.parametrize("bits", [[1], [9], [8, 8], [8, 0], [-4]])
def test_bits_that_nothing_can_be_rounded_to(bits, neurons):
    with pytest.raises(ValueError, match=r"^--model\.bits must be different numbers from 2 to 8, got \[.*\]\.$"):
        stress(neurons, bits=bits)


@pytest.mark.parametrize("rate", [0.0, -1e-5, float("nan"), float("inf")])
def test_a_learning_rate_that_is_not_positive(rate, neurons):
    with pytest.raises(ValueError, match=rf"^--model\.finetune\.learning_rate must be above 0, got {rate}\.$"):
        stress(neurons, finetune=FineTuning(2, rate))


def test_a_number_of_steps_below_0(neurons):
    with pytest.raises(ValueError, match=r"^--model\.finetune\.steps must be at least 0, got -1\.$"):
        stress(neurons, finetune=FineTuning(-1))


def test_neurons_that_are_missing_or_held_at_their_mean(tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        stress(Path("nowhere.json"))
    held = [replace(neuron, mean=0.5) for neuron in EVERY_SECOND]
    with pytest.raises(ValueError, match=r"^--model\.neurons: .*held at their mean.*prune with --model\.ablation zero"):
        stress(save_neurons(tiny_checkpoint, held))


def test_neurons_of_another_checkpoint(make_checkpoint, neurons):
    with pytest.raises(ValueError, match=r"is for the checkpoint .*, but --model\.checkpoint is"):
        stress(neurons, checkpoint=make_checkpoint("gpt2"))


def test_no_stress_at_all(neurons):
    with pytest.raises(ValueError, match=r"^--model\.bits is empty, and there is no other stress: give numbers, "):
        stress(neurons, bits=[])


def test_a_training_without_a_text(neurons):
    with pytest.raises(
        ValueError, match=r"^--data\.neutral is missing: give the text to train on, or --model\.finetune\.steps 0\.$"
    ):
        stress(neurons, finetune=FineTuning(3))


def test_a_text_too_short_for_the_steps(neurons):
    said = r"^--model\.finetune\.steps asks for 5 batches of 2, which are 10 samples, but --data\.neutral has 8: lower "
    with pytest.raises(ValueError, match=said):
        stress(neurons, stress_data(neutral=neutral()), finetune=FineTuning(5))


def test_a_training_whose_batch_size_is_found_by_trying(neurons):
    with pytest.raises(ValueError, match=r"^--data\.neutral\.batch_size must be a number, got auto: a training"):
        stress(neurons, stress_data(neutral=neutral(batch_size="auto")), finetune=FineTuning(2))


def test_samples_of_one_token_or_longer_than_the_context(neurons):
    with pytest.raises(ValueError, match=r"^--data\.neutral has a sample of fewer than 2 tokens"):
        stress(neurons, stress_data(neutral=neutral(seq_len=1)), finetune=FineTuning(2))
    write_jsonl(Path("long.jsonl"), [{"text": sentence(600 + i, 90)} for i in range(2)])
    long = C4("long.jsonl", num_samples=2, seq_len=70, batch_size=1)
    with pytest.raises(ValueError, match=r"context .*: give shorter samples to --data\.neutral\.$"):
        stress(neurons, stress_data(neutral=long), finetune=FineTuning(2))


def test_other_prompts_that_the_neurons_were_all_attributed_on(tiny_checkpoint):
    neurons = save_neurons(tiny_checkpoint, EVERY_SECOND, {"sample_ids": [prompt_id(text) for text in MILD]})
    others = RealToxicityPrompts("mild.jsonl", num_prompts=2, min_toxicity=None)
    said = r"^Only 0 prompts .*\(4 were used to attribute\), but --data\.other_prompts\.num_prompts is 2"
    with pytest.raises(ValueError, match=said):
        stress(neurons, stress_data(other_prompts=others))


def test_more_than_one_device(neurons):
    with pytest.raises(ValueError, match=r"^--trainer\.devices must be 1, without --trainer\.strategy"):
        stress(neurons, trainer={"devices": 2})
