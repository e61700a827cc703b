"""detox.yaml, the recommended recipe: the command that it and the README name, on a tiny local checkpoint."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import sentence

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.cli import main

SMALLER = {
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    "model": {"general_seeds": [0]},
    "attribute": {"lexicon": "toy_scorers:letters"},
    "screen": {"init_args": {"source": "prompts.jsonl", "num_prompts": 6}},
    "general": {"init_args": {"source": "general.txt", "num_samples": 4, "seq_len": 16}},
    "behavior": {"init_args": {"num_samples": 8}},
    "budget_text": {"init_args": {"source": "general.txt", "num_samples": 6, "seq_len": 16}},
    "prune": {"budget": {"max_perplexity_increase": 1.0}},
    "evaluate": {
        "scorers": ["toy_scorers:letters"],
        "sampling": {"num_continuations": 2, "max_new_tokens": 5},
        "controls": {"num_draws": 1, "num_continuations": 1},
        "doses": [],
    },
    "data": {
        "text": {"init_args": {"source": "text.txt", "window": 32, "stride": 16}},
        "prompts": {"init_args": {"source": "prompts.jsonl", "num_prompts": 6, "num_nontoxic": 2}},
    },
}


@pytest.fixture
def smaller(monkeypatch, tmp_path) -> str:
    """An overlay of tiny numbers and local files, which are all there too."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])
    monkeypatch.syspath_prepend(tmp_path)
    Path("toy_scorers.py").write_text("def letters(texts):\n    return [float('e' in text) for text in texts]\n")
    Path("general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(12)) + "\n")
    Path("text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(10)) + "\n")
    rows = [{"prompt": {"text": sentence(100 + i, 3 + i % 7), "toxicity": 0.95 if i < 16 else 0.1}} for i in range(20)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    Path("smaller.yaml").write_text(yaml.safe_dump(SMALLER))
    return "smaller.yaml"


@pytest.mark.slow
def test_detox_yaml_runs_on_any_checkpoint_and_records_the_batch_sizes_that_it_found(tiny_checkpoint, smaller, capsys):
    done = main(["run", "--config", "detox.yaml", "--model.checkpoint", tiny_checkpoint, "--config", smaller])
    folder = Path(done.trainer.log_dir)
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == tiny_checkpoint
    assert results["auto_batch_sizes"] == {"text": 32, "prompts": 64}
    assert results["num_neurons"] >= 1
    stages = {name: Path(path) for name, path in json.loads((folder / "experiment.json").read_text())["stages"].items()}
    assert list(stages) == ["screen", "general_0", "behavior", "neurons", "evaluation"]
    for name in ("general_0", "behavior"):
        found = ScoreFile.load(stages[name] / "scores.safetensors").provenance.data
        assert (found["batch_size"], found["auto_batch_size"]) == ("auto", 64)
    neurons = json.loads((stages["neurons"] / "neurons.json").read_text())
    assert neurons["provenance"]["budget"]["data"]["auto_batch_size"] == 64
