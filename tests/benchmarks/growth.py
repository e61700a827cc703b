"""Time and memory of `sparc3 attribute` over the number of samples: `python tests/benchmarks/growth.py`.

The predict loop of the package on SmolLM2-135M in float32, samples of 64 tokens in batches of 8. Time should grow in
proportion and memory not at all. Prints seconds of the loop without loading, and the peak above the loaded model.
"""

import tempfile
import time
from typing import Any

from common import CHECKPOINT, TEXT, parse, peak_memory, quiet_trainer, write

from sparc3_lightning.data.c4 import C4
from sparc3_lightning.stages.attribute import Attribution

NUM_SAMPLES = (16, 64, 256)


class Timed(Attribution):
    """Measures from the first batch to the last."""

    def on_predict_start(self) -> None:
        """Begin."""
        super().on_predict_start()
        for weight in self.model.parameters():  # the file is mapped, and read when it is first used
            weight.sum()
        self.watch = peak_memory()
        self.peak = self.watch.__enter__()
        self.start = time.perf_counter()

    def on_predict_epoch_end(self) -> None:
        """End."""
        self.seconds = time.perf_counter() - self.start
        self.watch.__exit__(None, None, None)
        super().on_predict_epoch_end()


def measure(num_samples: int, **options: Any) -> dict[str, float]:
    """Attribute so many samples, and return seconds and MiB."""
    with tempfile.TemporaryDirectory() as folder:
        data = C4(TEXT, text_field="document", num_samples=num_samples, seq_len=64, batch_size=8)
        module = Timed(CHECKPOINT, **options)
        quiet_trainer(folder).predict(module, datamodule=data, return_predictions=False)
        return {"seconds": module.seconds, "peak_mib": module.peak[0]}


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__)
    ways: dict[str, dict[str, Any]] = {
        "magnitude": {},
        "wanda": {"method": "wanda"},
        "magnitude of weights": {"granularity": "weight"},
    }
    measure(NUM_SAMPLES[0])  # what is done once in a process
    found = {way: {n: measure(n, **of) for n in NUM_SAMPLES} for way, of in ways.items()}
    print("| | samples | seconds | seconds a sample | peak memory above the model, MiB |\n|---|---|---|---|---|")
    for way, by_number in found.items():
        for n, of in by_number.items():
            print(f"| {way} | {n} | {of['seconds']:.1f} | {of['seconds'] / n:.3f} | {of['peak_mib']:.0f} |")
    write(options, found)


if __name__ == "__main__":
    main()
