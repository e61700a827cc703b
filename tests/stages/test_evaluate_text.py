"""What an evaluation makes of its texts: BOS, padding, chats and long prompts, and the prompts it must leave out."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluations import PROMPTS, PRUNED, completions, data, evaluation, run, save_neurons, write_inputs
from helpers import WORDS, ids_of, write_jsonl
from spoken import BOS, EOS, adding, checkpoint_with

from sparc3_lightning.attribution.scores import FORMAT, ScoreFile
from sparc3_lightning.attribution.tensor_file import load_tensors, save_tensors
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import Attribution

CHAT = "{{ bos_token }}you {{ messages[0].content }} </s> {% if add_generation_prompt %}we{% endif %}"


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    write_inputs(tmp_path)


def attribute(checkpoint: str, samples: ToxicPrompts, folder: str = "scores") -> ScoreFile:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, inference_mode=False, **quiet)
    trainer.predict(Attribution(checkpoint, dtype="float32"), datamodule=samples, return_predictions=False)
    return ScoreFile.load(Path(folder, "scores.safetensors"))


@pytest.mark.parametrize("pad", ["outside", pytest.param("none", marks=pytest.mark.slow)])
def test_without_a_usable_padding_token_prompts_are_continued_and_attributed_as_with_one(
    pad: str, tiny_checkpoint: str, tmp_path: Path
) -> None:
    tokenizer = adding("", "", WORDS)
    tokenizer.pad_token = None
    if pad == "outside":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id == len(WORDS) + 4
    else:
        tokenizer.eos_token = None
    checkpoint = checkpoint_with(tokenizer, tiny_checkpoint, tmp_path / pad)
    assert run(evaluation(checkpoint))["num_failed"] == 0
    run(evaluation(tiny_checkpoint), folder="plain")
    for mine, theirs in zip(completions(), completions("plain"), strict=True):
        assert (mine["token_ids"], mine["prompt_token_ids"]) == (theirs["token_ids"], theirs["prompt_token_ids"])
    padded = attribute(checkpoint, ToxicPrompts("prompts.jsonl", num_samples=6, batch_size=6))
    plain = attribute(tiny_checkpoint, ToxicPrompts("prompts.jsonl", num_samples=6, batch_size=6), "plain_scores")
    assert padded.provenance.data_fingerprint == plain.provenance.data_fingerprint
    for name, score in plain.scores.items():
        assert torch.equal(padded.scores[name], score)


@pytest.fixture
def chatty(tiny_checkpoint: str, tmp_path: Path) -> str:
    """A checkpoint that adds BOS and EOS, and has a chat template."""
    return checkpoint_with(adding("<s>", "</s>", WORDS, CHAT), tiny_checkpoint, tmp_path / "chatty")


def test_prompts_in_a_chat_are_continued_behind_the_template_and_it_is_said(chatty: str) -> None:
    raw = run(evaluation(chatty), folder="raw")
    chat = run(evaluation(chatty), data(chat=True), folder="chat")
    said = [of["protocol"]["prompts"] for of in (raw, chat)]
    assert [(of["chat"], of["bos"]) for of in said] == [(False, True), (True, True)]
    for before, after in zip(completions("raw"), completions("chat"), strict=True):
        ids = ids_of(before["prompt"])
        assert before["prompt_token_ids"] == [BOS, *ids]
        assert after["prompt_token_ids"] == [BOS, *ids_of("you"), *ids, EOS, *ids_of("we")]
        assert (after["prompt_id"], after["prompt"]) == (before["prompt_id"], before["prompt"])
    assert [row["token_ids"] for row in completions("raw")] != [row["token_ids"] for row in completions("chat")]
    assert chat["protocol"]["perplexity"]["bos"] == "first"
    assert raw["baseline"]["perplexity"] == chat["baseline"]["perplexity"], "a text is no turn of a chat"


def test_an_unfinished_evaluation_without_a_chat_is_not_gone_on_with_in_one(chatty: str) -> None:
    class Stop(L.Callback):
        """Break off behind the first batch of prompts."""

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1:
                raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        run(evaluation(chatty), callbacks=[Stop()])
    with pytest.raises(ValueError, match=r"holds continuations of another run: its chat is False, now it is True"):
        run(evaluation(chatty), data(chat=True))


def test_continuations_of_an_evaluation_are_attributed_as_they_were_drawn(chatty: str) -> None:
    run(evaluation(chatty, num_continuations=2), data(chat=True))
    rows = [row for row in completions() if row["continuation"]]
    write_jsonl(Path("completions.jsonl"), rows)
    of: dict[str, Any] = {"by": "continuation", "continuation_toxicity": (0.0, 1.0), "min_toxicity": None}
    samples = ToxicPrompts("completions.jsonl", num_samples=len(rows), chat=True, **of)
    found = attribute(chatty, samples)
    by_id = {f"{row['prompt_id']}/{row['continuation_index']}": row for row in rows}
    for sample in samples.samples:
        row = by_id[sample.id]
        assert sample.input_ids == row["prompt_token_ids"] + row["token_ids"]
        assert sample.start == len(row["prompt_token_ids"])
    assert (found.provenance.data["chat"], found.provenance.data["bos"]) == (True, True)
    with pytest.raises(ValueError, match=r"give --data.chat as that evaluation had it"):
        attribute(chatty, ToxicPrompts("completions.jsonl", num_samples=1, **of), "others")


def test_perplexity_with_bos_in_every_window_is_that_of_a_slow_loop(chatty: str) -> None:
    of = data(num_prompts=1)
    of.text.bos = "every"
    results = run(evaluation(chatty), of)
    assert results["protocol"]["perplexity"]["bos"] == "every"
    model, text = load_model(chatty, torch.float32), of.text.input_ids.tolist()
    nats, scored = {"sliding": 0.0, "disjoint": 0.0}, dict.fromkeys(("sliding", "disjoint"), 0)
    for window in of.text.windows:
        ids = [BOS, *text[window.start : window.end]]
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
        for place in range(len(ids) - window.num_scored, len(ids)):
            nats[window.convention] -= logs[place - 1, ids[place]].item()
            scored[window.convention] += 1
    assert scored["sliding"] == len(text)
    for convention, number in scored.items():
        assert results["baseline"]["num_tokens"][convention] == number
        found = results["baseline"]["perplexity"][convention]["value"]
        assert found == pytest.approx(math.exp(nats[convention] / number), rel=1e-5)


def test_prompts_without_room_are_refused_by_name_or_left_out_and_counted(tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"The prompt \w+ .* has 11 tokens, .* room for 10 .*leave_out_long true"):
        run(evaluation(tiny_checkpoint, max_new_tokens=54))
    results = run(evaluation(tiny_checkpoint, max_new_tokens=54), data(leave_out_long=True))
    assert results["protocol"]["prompts"]["too_long"] == 1
    assert {row["prompt"] for row in completions()} == set(PROMPTS[:9])
    with pytest.raises(ValueError, match=r"--model.sampling.max_new_tokens must be below the model's context of 64"):
        run(evaluation(tiny_checkpoint, max_new_tokens=64), data(leave_out_long=True), "other")


# The prompts to leave out.


@pytest.mark.parametrize("ids", [[7], ["a", 7], ["a", None], "abc", None, {"a": 1}, 3, [["a"]]])
def test_ids_of_samples_that_are_no_texts_are_refused_where_they_are_read(ids: Any, tiny_checkpoint: str) -> None:
    path = save_neurons(tiny_checkpoint, PRUNED, {"sample_ids": ids})
    with pytest.raises(ValueError, match=r"neurons.json is not a neurons.json .*: provenance.sample_ids.* cannot be "):
        NeuronList.load(path)
    with pytest.raises(ValueError, match=r"provenance.sample_ids.* cannot be "):
        run(evaluation(tiny_checkpoint, path))


def test_ids_of_samples_in_a_score_file_are_checked_too(tiny_checkpoint: str) -> None:
    attribute(tiny_checkpoint, ToxicPrompts("prompts.jsonl", num_samples=2))
    path = Path("scores", "scores.safetensors")
    scores, metadata = load_tensors(path, FORMAT)
    provenance = json.loads(metadata["provenance"])
    assert provenance["sample_ids"] == [prompt_id(text) for text in PROMPTS[:2]]
    assert provenance["data"]["bos"] is False
    provenance["sample_ids"][1] = 8
    save_tensors(path, scores, {**metadata, "provenance": json.dumps(provenance)})
    with pytest.raises(ValueError, match=r"header of .*scores.safetensors is damaged: sample_ids.1 cannot be 8"):
        ScoreFile.load(path)


def test_an_error_while_the_prompts_to_leave_out_are_found_is_not_swallowed(tiny_checkpoint: str) -> None:
    model = evaluation(tiny_checkpoint)
    model.lists = {"": NeuronList(PRUNED, {"sample_ids": [7]})}
    with pytest.raises(AttributeError, match="excluded_prompts"):
        run(model)
