"""All benchmarks, one after the other: `python tests/benchmarks [--only NAME ...] [--json FILE]`.

Each runs in a process of its own and prints its table; with --json the figures of all go into one file.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS = (
    "startup",
    "attribution",
    "growth",
    "agreement",
    "evaluation",
    "dtype",
    "ranks",
    "compression",
    "selections",
    "interactions",
    "families",
    "words",
    "gpu",
)


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {"machine": platform.platform(), "python": platform.python_version()}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            print(f"\n## {part}\n", flush=True)
            file = Path(folder, f"{part}.json")
            command = [sys.executable, str(Path(__file__).with_name(f"{part}.py")), "--json", str(file)]
            if subprocess.run(command).returncode:
                failed.append(part)
            if file.is_file():
                found[part] = json.loads(file.read_text())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
