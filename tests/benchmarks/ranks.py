"""Sharded attribution on 1, 2 and 4 ranks of this machine: `python tests/benchmarks/ranks.py`.

Prints, for SmolLM2-135M in float32 on 24 prompts of RealToxicityPrompts: the host memory that loading takes at its peak
(above what the libraries take), seconds per sample, and how far the scores are from those of one process.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CHECKPOINT, PROMPTS, parse, write
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.stages.attribute import SCORES, Attribution

NUM_SAMPLES = 24


class Measure(Callback):
    """Time from the first batch to the last, and the peak of host memory before it."""

    def on_predict_start(self, trainer: Trainer, module: Attribution) -> None:
        self.loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.start = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, module: Attribution) -> None:
        self.seconds = time.perf_counter() - self.start


class MeasuredAttribution(Attribution):
    """Notes the peak of host memory before the model is loaded."""

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        super().configure_model()


def on_rank(folder: Path, ranks: int) -> None:
    """Attribute, on every rank, and write what was measured."""
    torch.set_num_threads(1)
    measure = Measure()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="fsdp2" if ranks > 1 else "auto",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[measure],
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = MeasuredAttribution(CHECKPOINT)
    data = ToxicPrompts(source=PROMPTS, num_samples=NUM_SAMPLES, batch_size=2)
    trainer.predict(module, datamodule=data, return_predictions=False)
    figures = {"mib": (measure.loaded - module.before) / 1024, "seconds": measure.seconds / NUM_SAMPLES}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(figures))


def main() -> None:
    """Run on 1, 2 and 4 ranks and print a table."""
    options = parse(__doc__)
    found = {}
    print("| ranks | peak host memory to load, MiB a rank | seconds a sample | relative difference of the scores |")
    print("|---|---|---|---|")
    reference = None
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            subprocess.run([*command, __file__, str(folder), str(ranks)], check=True, capture_output=True)
            figures = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
            scores = load_file(folder / SCORES)
        reference = reference or scores
        far = max(float((scores[n] - reference[n]).norm() / reference[n].norm()) for n in scores)
        memory = max(figure["mib"] for figure in figures)
        seconds = max(figure["seconds"] for figure in figures)
        found[ranks] = {"mib": memory, "seconds_per_sample": seconds, "difference": far}
        print(f"| {ranks} | {memory:.0f} | {seconds:.2f} | {far:.1e} |", flush=True)
    write(options, found)


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        on_rank(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
