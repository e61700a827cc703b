"""How long one waits before anything happens: `python tests/benchmarks/startup.py`.

`sparc3 --help`, the help of two verbs, and `sparc3 attribute` of a tiny model against `import lightning.pytorch`, and
loading SmolLM2-135M again, once its dequantized copy is in the cache; each in processes of its own, in alternation.
Prints the median of several turns: processor seconds, which other work on the machine changes less than the time.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import CHECKPOINT, parse, write, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FLOOR = "import lightning.pytorch"
LOAD = f"""
import time
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
import torch, transformers.models.llama.modeling_llama
start = time.process_time()
load_model({CHECKPOINT!r}, torch.float32)
print("seconds", time.process_time() - start)
"""


def tiny(folder: Path) -> list[str]:
    """Write a tiny model and a few samples, and return the options of their attribution."""
    words = ["<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "tiny")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "tiny")
    write_rows(folder / "documents.jsonl", [{"text": " ".join(words[1:] * 4)}] * 4)
    data = ["--data=C4", f"--data.source={folder / 'documents.jsonl'}", "--data.num_samples=4", "--data.seq_len=16"]
    return [f"--model.checkpoint={folder / 'tiny'}", *data, "--trainer.accelerator=cpu"]


def processor_seconds(command: list[str], folder: str) -> float:
    """Run a command in a folder, and return what it takes of all processors."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__, turns={"type": int, "default": 5})
    program = shutil.which("sparc3", path=str(Path(sys.executable).parent)) or "sparc3"
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            FLOOR: [sys.executable, "-c", FLOOR],
            "sparc3 --help": [program, "--help"],
            "sparc3 attribute --help": [program, "attribute", "--help"],
            "sparc3 evaluate --help": [program, "evaluate", "--help"],
            "sparc3 attribute, a tiny model": [program, "attribute", *tiny(Path(folder))],
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*commands, "load SmolLM2 again")}
        for turn in range(options.turns + 1):  # the first one fills the caches of files
            for name, command in commands.items():
                seconds[name].append(processor_seconds(command, folder))
            said = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True).stdout
            seconds["load SmolLM2 again"].append(float(said.split()[-1]))
            if turn == 0:
                seconds = {name: [] for name in seconds}
    found = {name: statistics.median(of) for name, of in seconds.items()}
    print(f"| | processor seconds | of `{FLOOR}` |\n|---|---|---|")
    for name, value in found.items():
        print(f"| `{name}` | {value:.2f} | {value / found[FLOOR]:.2f} |")
    write(options, found)


if __name__ == "__main__":
    main()
