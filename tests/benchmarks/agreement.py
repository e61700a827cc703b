"""How far bfloat16 and batches change the scores: `python tests/benchmarks/agreement.py`.

The magnitude relevance of SmolLM2-135M's up_proj neurons on 16 general samples of 256 tokens and on 93 toxic prompts,
through the predict loop. Against float32: Spearman's rank correlation of the scores on each set and of their
difference over all neurons, and how many of the 100 neurons that would be pruned are the same. For the prompts, seconds
by batch size beside them: batches hold prompts of like length.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CHECKPOINT, PROMPTS, TEXT, parse, quiet_trainer, write
from torch import Tensor

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.selection.criteria import differential_relevance, select_neurons
from sparc3_lightning.selection.overlap import correlation, ranks
from sparc3_lightning.stages.attribute import SCORES, Attribution


def scores(data: Any, dtype: Any) -> tuple[dict[str, Tensor], float]:
    """Return the scores, and the seconds that all took."""
    with tempfile.TemporaryDirectory() as folder:
        module = Attribution(CHECKPOINT, dtype=dtype)
        start = time.perf_counter()
        quiet_trainer(folder).predict(module, datamodule=data, return_predictions=False)
        return ScoreFile.load(Path(folder, SCORES)).scores, time.perf_counter() - start


def flat(of: dict[str, Tensor]) -> Tensor:
    """Return the scores of all modules in one row."""
    return torch.cat(list(of.values())).double()


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__)
    sets: dict[str, dict[str, Tensor]] = {}
    for dtype in ("float32", "bfloat16"):
        general = C4(TEXT, text_field="document", num_samples=16, seq_len=256, batch_size=4)
        sets[f"general {dtype}"], _ = scores(general, dtype)
        sets[f"prompts {dtype}"], _ = scores(ToxicPrompts(PROMPTS, batch_size=31), dtype)
        of = [sets[f"{name} {dtype}"] for name in ("general", "prompts")]
        sets[f"difference {dtype}"] = differential_relevance(*of)
    found: dict[str, Any] = {
        name: correlation(flat(sets[f"{name} float32"]), flat(sets[f"{name} bfloat16"]), ranks)
        for name in ("general", "prompts", "difference")
    }
    chosen = [
        {(neuron.module, neuron.index) for neuron in select_neurons(sets[f"difference {dtype}"], 100)}
        for dtype in ("float32", "bfloat16")
    ]
    found["of the 100 pruned neurons the same"] = len(chosen[0] & chosen[1])
    print("bfloat16 against float32\n\n| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {f'rank correlation, {name}' if isinstance(value, float) else name} | {value:.4g} |")
    print("\n93 prompts, float32\n")
    print("| batch size | seconds, with loading | relative difference of the scores |\n|---|---|---|")
    alone = None
    for batch_size in (1, 8, 31, 93):
        got, seconds = scores(ToxicPrompts(PROMPTS, batch_size=batch_size), "float32")
        alone = flat(got) if alone is None else alone
        error = ((flat(got) - alone).norm() / alone.norm()).item()
        found[f"batch size {batch_size}"] = {"seconds": seconds, "difference": error}
        print(f"| {batch_size} | {seconds:.1f} | {error:.1e} |")
    write(options, found)


if __name__ == "__main__":
    main()
