"""Runs on every rank: one attribution or evaluation after the other, each into a folder of its own."""

import itertools
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from sparc3_lightning.data.base import NoSamples
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.evaluate import Evaluation

FISHER = {"method": "gradient", "target": "sampled", "relevance": "fisher", "chunk": 4}
DENSE: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "signed": {"relevance": "signed"},
    "wanda": {"method": "wanda"},
    "checkpointed": {"gradient_checkpointing": True},
    "weights": {"granularity": "weight", "layers": ["all"], "gradient_checkpointing": True},
    "signed_weights": {"granularity": "weight", "relevance": "signed"},
    "wanda_weights": {"granularity": "weight", "method": "wanda"},
    "heads": {"granularity": "head", "layers": ["o_proj"]},
    "wanda_heads": {"granularity": "head", "layers": ["o_proj"], "method": "wanda"},
    "costs": {**FISHER, "granularity": "neuron+channel"},
    "checkpointed_costs": {**FISHER, "gradient_checkpointing": True},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "magnitude": {"activations": True},
    "checkpointed": {"gradient_checkpointing": True},
    "one_expert": {"layers": ["experts.1.up_proj"]},
    "wanda": {"method": "wanda", "activations": True},
    "activation": {"method": "activation"},
    "weights": {"method": "wanda", "granularity": "weight", "layers": ["all"]},
    "static": {"method": "magnitude"},
    "costs": {**FISHER, "gradient_checkpointing": True},
}
SCORES = {"dense": DENSE, "experts": EXPERTS, "weights_of_experts": {"weights": {"granularity": "weight"}}}
NUM_SAMPLES = {"dense": (23, 1), "experts": (13, 1), "weights_of_experts": (13,)}


def trainer(folder: Path, strategy: Any, ranks: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        logger=CSVLogger(folder, name="", version=""),
        inference_mode=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def attribute(scores: str, checkpoint: str, prompts: str, folder: Path, strategy: str, ranks: int) -> None:
    for (name, options), num_samples in itertools.product(SCORES[scores].items(), NUM_SAMPLES[scores]):
        is_static = options.get("method") == "magnitude"
        toxic = ToxicPrompts(source=prompts, num_samples=num_samples, min_toxicity=0.0, batch_size=5)
        data = NoSamples() if is_static else toxic
        module = Attribution(checkpoint, **options)
        trainer(folder / f"{name}-{num_samples}", strategy, ranks).predict(
            module, datamodule=data, return_predictions=False
        )


def evaluate(
    checkpoint: str,
    prompts: str,
    text: str,
    neurons: str,
    folder: Path,
    strategy: str,
    ranks: int,
    of: type = Evaluation,
) -> Evaluation:
    data = EvaluationData(
        WikiText2(source=text, window=16, stride=8, batch_size=3),
        RealToxicityPrompts(source=prompts, num_prompts=13, min_toxicity=0.0, batch_size=2),
    )
    module = of(
        checkpoint,
        Path(neurons),
        scorers=["small"],
        sampling=SamplingOptions(num_continuations=2, max_new_tokens=6),
        controls=Controls(1, 1),
        doses=[3],
        dampings=[0.5],
    )
    trainer(folder / "evaluate", strategy, ranks).test(module, datamodule=data, verbose=False)
    return module


class Signalled(Evaluation):
    """Gets a signal on one rank alone."""

    def test_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        if (self.global_rank, dataloader_idx, batch_idx) == (1, 1, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        super().test_step(batch, batch_idx, dataloader_idx)


def fail_on_rank_one(checkpoint: str, prompts: str, folder: Path, strategy: str, ranks: int) -> None:
    class Failing(Attribution):
        def predict_step(self, batch: dict, batch_idx: int) -> None:
            if self.global_rank == 1 and batch_idx == 1:
                raise ValueError("rank one gives up")
            super().predict_step(batch, batch_idx)

    data = ToxicPrompts(source=prompts, num_samples=93, min_toxicity=0.0, batch_size=5)
    trainer(folder, strategy, ranks).predict(Failing(checkpoint), datamodule=data, return_predictions=False)


def see_different_prompts(checkpoint: str, prompts: str, folder: Path, strategy: str, ranks: int) -> None:
    num_samples = 10 + int(os.environ["RANK"])
    data = ToxicPrompts(source=prompts, num_samples=num_samples, min_toxicity=0.0)
    trainer(folder, strategy, ranks).predict(Attribution(checkpoint), datamodule=data, return_predictions=False)


def use_two_dimensions(checkpoint: str, prompts: str, folder: Path, strategy: str, ranks: int) -> None:
    data = ToxicPrompts(source=prompts, num_samples=10, min_toxicity=0.0)
    mesh = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=ranks)
    trainer(folder, mesh, ranks).predict(Attribution(checkpoint), datamodule=data, return_predictions=False)


def load(checkpoint: str, folder: Path, ranks: int) -> None:
    """Load a checkpoint sharded, and write how far host memory rose above that before, and the size of the shard."""
    from torch.distributed.device_mesh import init_device_mesh

    from sparc3_lightning.models.checkpoints import Checkpoint
    from sparc3_lightning.models.sharding import load_sharded

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    # The libraries that loading needs are imported before, by loading nothing.
    load_sharded(Checkpoint(str(folder / "tiny")), torch.float32, mesh, torch.device("cpu"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_sharded(Checkpoint(checkpoint), torch.float32, mesh, torch.device("cpu"))
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    shard = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    rank = torch.distributed.get_rank()
    torch.save({"rise": rise, "shard": shard, "largest": largest, "logits": logits}, folder / f"load-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(task: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if task == "attribute":
        attribute(*arguments[:3], Path(arguments[3]), arguments[4], int(arguments[5]))
    elif task in ("evaluate", "signalled"):
        of = Signalled if task == "signalled" else Evaluation
        evaluate(*arguments[:4], Path(arguments[4]), arguments[5], int(arguments[6]), of)
    elif task in ("fail", "different", "mesh"):
        run = {"fail": fail_on_rank_one, "different": see_different_prompts, "mesh": use_two_dimensions}[task]
        run(arguments[0], arguments[1], Path(arguments[2]), arguments[3], int(arguments[4]))
    elif task == "load":
        load(arguments[0], Path(arguments[1]), int(arguments[2]))


def rank(number: int, ranks: int, port: int, arguments: list[str]) -> None:
    """Run one of so many ranks, which finds in its environment what torchrun tells it."""
    of = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    of |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "ours"}
    os.environ |= {name: str(value) for name, value in of.items()}
    main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
