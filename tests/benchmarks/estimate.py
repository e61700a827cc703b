"""Will it fit: 70 and 405 billion weights, by simulation: `python tests/benchmarks/estimate.py`.

LLaMA-3-70B's shape on 8 GPUs of 80 GB and LLaMA-3.1-405B's on 32, in bfloat16, the weights sharded over all of them.
Prints what `sparc3 run --config run.yaml --estimate` says of the published experiment, at a rate of 400 Tflop/s a GPU,
and the seconds that it took to say it. Neither weights nor a GPU are there: the configs are written here, and nothing
else is read.
"""

import tempfile
import time
from pathlib import Path

from common import parse, write
from transformers import LlamaConfig

from sparc3_lightning.cli import main as run_verb

SHAPES = {
    "70b": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        ["--trainer.devices=8"],
    ),
    "405b": (
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
        ["--trainer.devices=8", "--trainer.num_nodes=4"],
    ),
}


def main() -> None:
    """Estimate each shape."""
    options = parse(__doc__, only={"choices": SHAPES, "nargs": "*", "default": list(SHAPES)})
    found = {}
    for name in options.only:
        shape, trainer = SHAPES[name]
        config = LlamaConfig(**shape, vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192)
        with tempfile.TemporaryDirectory() as folder:
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(Path(folder) / name)
            began = time.perf_counter()
            print(f"\n{name}", flush=True)
            command = ["run", "--config=run.yaml", f"--model.checkpoint={folder}/{name}", "--evaluate.scorers=[small]"]
            gpus = ["--trainer.accelerator=gpu", "--trainer.strategy=fsdp2", *trainer]
            run_verb([*command, *gpus, "--estimate.memory=80", "--estimate.tflops=400"])
            found[name] = time.perf_counter() - began
            print(f"({found[name]:.0f} s)", flush=True)
    write(options, found)


if __name__ == "__main__":
    main()
