"""Several ranks that hold shards of a mixture of experts, and route their own tokens, give what one process gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import run_on_ranks
from helpers import sentence
from mixtures import save_mixture
from several_ranks import check_results_are_same, check_tensors_are_same, on_ranks
from torch.multiprocessing import ProcessRaisedException

from sparc3_lightning.attribution.activations import ACTIVATIONS
from sparc3_lightning.attribution.progress import load_progress
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.folders import giving_back

pytestmark = pytest.mark.distributed


class Inputs:
    """A tiny Mixtral of four experts in each of two blocks, prompts, a text, and neurons of experts to switch off."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = save_mixture("mixtral", folder / "tiny")
        self.prompts, self.text, self.neurons = (
            str(folder / name) for name in ("prompts.jsonl", "text.txt", "neurons.json")
        )
        rows = [{"text": sentence(i, 1 + i % 9), "toxicity": 0.9} for i in range(40)]
        Path(self.prompts).write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(self.text).write_text("\n".join(sentence(1000 + i, 12) for i in range(10)))
        layers = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block, expert in ((0, 1), (1, 0), (1, 3))]
        pruned, following, least = (
            [Component(name, i, 0.0) for name in layers for i in of] for of in ((3, 17), (4,), (8, 9))
        )
        provenance = {"checkpoint_fingerprint": Checkpoint(self.checkpoint).fingerprint, "sample_ids": []}
        NeuronList(pruned, provenance, following, least).save(Path(self.neurons))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one_process(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_on_ranks.attribute("experts", inputs.checkpoint, inputs.prompts, folder, "auto", 1)
    return folder


def break_off(inputs: Inputs, folder: Path, **options: Any) -> None:
    """Attribute in one process, which breaks off after the first batch and leaves its sums."""

    class Broken(Attribution):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise KeyError("broken off")
            super().predict_step(batch, batch_idx)

    data = ToxicPrompts(source=inputs.prompts, num_samples=13, min_toxicity=0.0, batch_size=5)
    with giving_back(), pytest.raises(KeyError, match="broken off"):
        run_on_ranks.trainer(folder, "auto", 1).predict(
            Broken(inputs.checkpoint, save_every=1, **options), datamodule=data, return_predictions=False
        )
    assert load_progress(folder) is not None


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp2"), (5, "fsdp2"), (2, "ddp")])
def test_scores_of_experts_on_several_ranks_are_those_of_one_process(
    ranks: int, strategy: str, inputs: Inputs, one_process: Path, tmp_path: Path
) -> None:
    resumed = tmp_path / "magnitude-13"
    break_off(inputs, resumed, activations=True)
    on_ranks(ranks, "attribute", "experts", inputs.checkpoint, inputs.prompts, tmp_path, strategy, ranks)
    written = sorted(path.relative_to(one_process) for path in one_process.rglob("*.safetensors"))
    assert len(written) == 2 * (len(run_on_ranks.EXPERTS) + 2)  # two of them with activations
    for file in written:
        check_tensors_are_same(one_process / file, tmp_path / file)
    for name in ("magnitude-13", "wanda-13", "activation-1"):
        alone, together = (
            ScoreFile.load(folder / name / "scores.safetensors").provenance for folder in (one_process, tmp_path)
        )
        assert together.expert_tokens == alone.expert_tokens
        assert together.lrp_check == alone.lrp_check
    assert resumed.joinpath(ACTIVATIONS).is_file()


def test_an_evaluation_with_neurons_of_experts_off_is_the_same_on_two_ranks(inputs: Inputs, tmp_path: Path) -> None:
    of = (inputs.checkpoint, inputs.prompts, inputs.text, inputs.neurons)
    run_on_ranks.evaluate(*of, tmp_path / "one", "auto", 1)
    on_ranks(2, "evaluate", *of, tmp_path / "two", "fsdp2", 2)
    alone = check_results_are_same(tmp_path / "one" / "evaluate", tmp_path / "two" / "evaluate")
    perplexity = {name: alone[f"{name} perplexity sliding value"] for name in ("baseline", "pruned")}
    assert perplexity["pruned"] != pytest.approx(perplexity["baseline"], rel=1e-4)


def test_relevance_of_weights_of_experts_is_refused_on_several_ranks(inputs: Inputs, tmp_path: Path) -> None:
    of = (inputs.checkpoint, inputs.prompts, tmp_path, "fsdp2", 2)
    with pytest.raises(ProcessRaisedException, match="ranks send tokens to other experts"):
        on_ranks(2, "attribute", "weights_of_experts", *of)
