"""Evaluation against the obvious loop, in one process: `python tests/benchmarks/evaluation.py [--threads N]`.

The floor is one bare forward pass a token, with a cache, for the same batches of prompts, and one over the same windows
with all logits: no draw, no score, nothing else. The loop takes one continuation of one prompt at a time through
generate() and scores it alone, and takes one window of the text at a time through the model with `labels=`, which forms
all logits. Ours is `sparc3 evaluate` of the same checkpoint, prompts, windows and scorer. SmolLM2-135M in float32, 64
prompts x 4 continuations of 20 tokens, and 5 windows of 1024 tokens. Prints processor seconds, which other work on the
machine changes less than the time, the ratios, and that both measured the same.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, PROMPTS, TEXT, parse, quiet_trainer, write
from lightning import Callback

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.scorers.registry import load_scorer
from sparc3_lightning.stages.evaluate import RESULTS, Evaluation

NUM_PROMPTS, NUM_CONTINUATIONS, NUM_TOKENS = 64, 4, 20


def data() -> EvaluationData:
    """Return the prompts and the windows."""
    text = WikiText2(TEXT, 1024, 512, ("sliding",), num_tokens=3072, text_field="document")
    return EvaluationData(text, RealToxicityPrompts(PROMPTS, num_prompts=NUM_PROMPTS))


class Seconds(Callback):
    """Time spent on windows and on prompts, without loading."""

    def __init__(self) -> None:
        self.seconds = [0.0, 0.0]

    def on_test_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int, loader: int = 0) -> None:
        self.seconds[loader] += time.process_time() - self.start


def ours() -> tuple[list[float], dict[str, float]]:
    """Evaluate, and return the seconds for windows and prompts, and the figures."""
    seconds = Seconds()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(CHECKPOINT, scorers=["small"], sampling=SamplingOptions("rtp", NUM_CONTINUATIONS))
        quiet_trainer(folder, callbacks=[seconds]).test(evaluation, datamodule=data(), verbose=False)
        results = Results.load(Path(folder, RESULTS))
    model = results.baseline
    toxicity = model.groups[results.headline].behavior_mean
    return seconds.seconds, {"perplexity": model.perplexity["sliding"].value, "toxicity_mean": toxicity}


@torch.inference_mode()
def floor() -> list[float]:
    """Pass the same batches through the model, and do nothing else."""
    model, tokenizer, of = load_model(CHECKPOINT, torch.float32), Checkpoint(CHECKPOINT).tokenizer(), data()
    of.text.setup_windows(tokenizer)
    of.prompts.setup_prompts((), tokenizer)
    start = time.process_time()
    for batch in of.text.test_dataloader():
        model(batch["input_ids"], use_cache=False)
    for_windows = time.process_time() - start
    start = time.process_time()
    for batch in of.prompts.test_dataloader():
        mask = batch["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        read = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        cache = model(batch["input_ids"], use_cache=True, **read).past_key_values
        cache.batch_repeat_interleave(NUM_CONTINUATIONS)
        last, mask, positions = (
            part.repeat_interleave(NUM_CONTINUATIONS, dim=0)
            for part in (batch["input_ids"][:, -1:], mask, positions[:, -1:])
        )
        for _ in range(NUM_TOKENS - 1):
            mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions + 1
            model(last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return [for_windows, time.process_time() - start]


@torch.inference_mode()
def loop() -> tuple[list[float], dict[str, float]]:
    """Do the same one at a time."""
    model, tokenizer = load_model(CHECKPOINT, torch.float32), Checkpoint(CHECKPOINT).tokenizer()
    scorer, of = load_scorer("small"), data()
    of.text.setup_windows(tokenizer)
    of.prompts.setup_prompts((), tokenizer)
    start = time.process_time()
    nats = tokens = 0.0
    for window in of.text.windows:
        input_ids = of.text.input_ids[window.start : window.end].unsqueeze(0)
        labels = input_ids.clone()
        labels[:, : -window.num_scored] = -100
        # transformers takes the mean over the labels that are left once the first position is cut off.
        nats += model(input_ids, labels=labels).loss.item() * window.num_scored
        tokens += window.num_scored
    for_windows = time.process_time() - start
    start = time.process_time()
    torch.manual_seed(0)
    scores = []
    for prompt in of.prompts.prompts:
        for _ in range(NUM_CONTINUATIONS):
            encoded = tokenizer(prompt.text, return_tensors="pt")
            drawn = model.generate(
                **encoded, max_new_tokens=NUM_TOKENS, do_sample=True, top_p=0.9, top_k=0, temperature=1.0
            )
            text = tokenizer.decode(drawn[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            scores += scorer.score([text])
    for_prompts = time.process_time() - start
    figures = {"perplexity": math.exp(nats / tokens), "toxicity_mean": sum(scores) / len(scores)}
    return [for_windows, for_prompts], figures


def main() -> None:
    """Measure all three, and print the table."""
    options = parse(__doc__)
    floor_windows, floor_prompts = floor()
    (windows, prompts), figures = ours()
    (loop_windows, loop_prompts), loop_figures = loop()
    print("| | one at a time, s | sparc3, s | ratio | floor, s | sparc3, of it |\n|---|---|---|---|---|---|")
    for name, slow, fast, least in (
        (f"{NUM_PROMPTS} prompts x {NUM_CONTINUATIONS} continuations", loop_prompts, prompts, floor_prompts),
        ("5 windows of 1024 tokens", loop_windows, windows, floor_windows),
        ("together", loop_prompts + loop_windows, prompts + windows, floor_prompts + floor_windows),
    ):
        print(f"| {name} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} | {least:.1f} | {fast / least:.2f} |")
    print(f"perplexity {loop_figures['perplexity']:.4f} and {figures['perplexity']:.4f}; ", end="")
    print(f"mean toxicity {loop_figures['toxicity_mean']:.4f} and {figures['toxicity_mean']:.4f} (other random draws)")
    floors = [floor_windows, floor_prompts]
    write(
        options,
        {"floor": floors, "loop": [loop_windows, loop_prompts, loop_figures], "sparc3": [windows, prompts, figures]},
    )


if __name__ == "__main__":
    main()
