"""How long one waits before anything happens: `python tests/benchmarks/startup.py`.

`sparc3 --help` and the help of a verb against `import lightning`, and loading SmolLM2-135M again, once its dequantized
copy is in the cache; each in processes of its own, in alternation. Prints the median of several turns.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import CHECKPOINT, parse, write

LOAD = f"""
import time
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
import torch, transformers.models.llama.modeling_llama
start = time.perf_counter()
load_model({CHECKPOINT!r}, torch.float32)
print("seconds", time.perf_counter() - start)
"""


def main() -> None:
    """Measure, and print the table."""
    options = parse(__doc__, turns={"type": int, "default": 5})
    program = shutil.which("sparc3", path=str(Path(sys.executable).parent)) or "sparc3"
    commands = {
        "import lightning": [sys.executable, "-c", "import lightning"],
        "sparc3 --help": [program, "--help"],
        "sparc3 evaluate --help": [program, "evaluate", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*commands, "load SmolLM2 again")}
    for turn in range(options.turns + 1):  # the first one fills the caches of files
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
        said = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True).stdout
        seconds["load SmolLM2 again"].append(float(said.split()[-1]))
        if turn == 0:
            seconds = {name: [] for name in seconds}
    found = {name: statistics.median(of) for name, of in seconds.items()}
    print("| | seconds | of `import lightning` |\n|---|---|---|")
    for name, value in found.items():
        print(f"| `{name}` | {value:.2f} | {value / found['import lightning']:.2f} |")
    write(options, found)


if __name__ == "__main__":
    main()
