"""Whatever is wrong with a file, each reader says so in one sentence; a checksum lets nothing through but what was."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers import NEURONS, make_config, provenance, random_scores, sentence
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from made_up import SELECTION, made_up
from mutations import Damage, damage_bytes, damage_header, damage_json, damage_line, forge_metadata
from safetensors.torch import save_file

from sparc3_lightning.attribution.activations import Activations
from sparc3_lightning.attribution.progress import Progress, load_progress
from sparc3_lightning.attribution.scores import INDEX, ScoreFile, ShardWriter, WeightScores
from sparc3_lightning.cli import FindConfig
from sparc3_lightning.data.prompts import Prompt, continued, matching_rows, read_prompts, worst_continued
from sparc3_lightning.evaluation.completions import CompletionLog, load_completions, read_unfinished, save_completions
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.report.circuits import CircuitResults, Curve, Measured, SeedSteps
from sparc3_lightning.report.comparison import ComparisonResults, Listed
from sparc3_lightning.selection.neuron_list import NeuronList, SelectionResults
from sparc3_lightning.selection.overlap import Overlap
from sparc3_lightning.selection.sparsity import SparsityResults
from sparc3_lightning.sources import read_records
from sparc3_lightning.stages.prune import Pruning

pytestmark = pytest.mark.slow
NUM_EXAMPLES = 400
IDENTITY = {"seed": 0, "models": [["baseline", 2]]}
ROWS = [
    {
        "model": "baseline",
        "prompt_id": f"p{i}",
        "continuation_index": j,
        "prompt": sentence(i, 4),
        "prompt_toxicity": 0.95 if i else None,
        "continuation": f" {sentence(9 + j, 3)}",
        "prompt_token_ids": [],
        "token_ids": [7, 8, 7],
        "num_tokens": 3,
        "num_unique_tokens": 2,
        "scores": {"small": 0.25 * j},
    }
    for i in range(3)
    for j in range(2)
]
PROMPTS = [
    {"prompt": {"text": sentence(i, 5), "toxicity": 0.9}, "continuation": {"text": " the dog", "toxicity": 0.1}}
    for i in range(5)
]


@dataclass(frozen=True)
class Reader:
    """A reader of files: how a valid file comes to a path, how it is read, and which ways to damage it make sense.

    The last way is to forge it: to give it the checksum of what it was changed to. ``is_sealed`` says whether a
    checksum covers the whole file, so that otherwise nothing else than what was written is read.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    name: str
    ways: tuple[Damage, ...] = (damage_bytes, damage_json, partial(damage_json, forged=True))
    is_sealed: bool = True


def write_shards(index: Path) -> None:
    scores = random_scores(0, shape=(6, 4))  # type: ignore[arg-type]
    writer = ShardWriter(index.parent, {name: score.shape for name, score in scores.items()})
    for name, score in scores.items():
        writer.add(name, score)
    spec = replace(provenance().spec, granularity="weight")
    writer.close(replace(provenance(), spec=spec))


def write_unfinished(path: Path) -> None:
    CompletionLog(path.parent, 0, IDENTITY, ["small"]).append(ROWS)  # type: ignore[arg-type]


def begin(path: Path) -> object:
    prompts = [Prompt(f"p{i}", sentence(i, 4), 0.95) for i in range(3)]
    return CompletionLog(path.parent, 0, IDENTITY, ["small"]).begin(prompts, 2)


def circuit() -> CircuitResults:
    steps = [SeedSteps(0.5, [3], 0.5, None, [0.5], 0.25, None, [0.25])]
    return CircuitResults(
        checkpoint="tiny",
        checkpoint_fingerprint="files:abc",
        data={"class": "IOI"},
        num_samples=4,
        num_left_out=0,
        whole_model=Measured(1.0, 2.5),
        threshold=0.9,
        curves=[Curve("lrp", "neuron", 6, 1, steps)],
    )


def sparsity() -> SparsityResults:
    return SparsityResults(
        pattern="2:4",
        sparsity=0.5,
        num_pruned=2,
        num_weights=4,
        masks="abc",
        layers={"a": 0.5},
        share_of_all_parameters=0.25,
        export="sparse",
        export_dtype="auto",
        checkpoint="tiny",
        checkpoint_fingerprint="files:abc",
        general=[{"path": "a", "digest": "d", **provenance().summary()}],
        versions={"torch": "2"},
        git_hash=None,
    )


def comparison() -> ComparisonResults:
    overlap = Overlap(["one", "two"], 3, 3)
    return ComparisonResults(
        checkpoint="tiny",
        checkpoint_fingerprint=None,
        num_candidates=48,
        granularity="neuron",
        normalize=False,
        lists=[Listed("one", "a/neurons.json", 3, 2, "difference")],
        overlaps=[overlap],
        layers={"all": {"one": [1, 2]}},
    )


def write_rows(path: Path) -> None:
    """Write prompts in the form that the ending of the name asks for."""
    flat: list[dict[str, Any]] = [
        {"text": row["prompt"]["text"], "toxicity": row["prompt"]["toxicity"]} for row in PROMPTS
    ]
    lines = "".join(json.dumps(row) + "\n" for row in PROMPTS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(PROMPTS))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["text", "toxicity"])
            table.writeheader()
            table.writerows(flat)
    elif path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(flat), path)
    else:
        path.write_text("".join(row["text"] + "\n" for row in flat))


def read_rows(path: Path) -> object:
    where = {"text": sentence(0, 5)} if path.suffix == ".csv" else None
    return [read_prompts(read_records(path)), list(matching_rows(read_records(path), where))]


def read_continued(path: Path) -> object:
    return worst_continued(read_records(path), str(path)), continued(read_records(path), str(path))


def write_checkpoint(config: Path) -> None:
    make_config("llama").save_pretrained(config.parent)
    save_file({"a": torch.ones(1)}, config.parent / "model.safetensors", {"format": "pt"})


def read_config(path: Path) -> object:
    return Checkpoint(str(path.parent)).config.to_dict()


OPTIONS = {"general": ["a"], "behavior": "b", "num_neurons": 5, "budget": {"refine": 0}}


@cache
def parser() -> ArgumentParser:
    """Return a parser of a verb's options alone, since all of the command line takes half a second."""
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action=FindConfig)
    made.add_class_arguments(Pruning, "model")
    return made


def read_options(path: Path) -> object:
    try:
        return parser().parse_args(["--config", str(path)])
    except ArgumentError as error:  # which the command line prints
        raise ValueError(" ".join(str(error).split())[:500]) from None


def prompts_of(name: str, *ways: Damage) -> Reader:
    return Reader(write_rows, read_rows, name, (damage_bytes, *ways), is_sealed=False)


HEADER = (damage_bytes, damage_header, forge_metadata)
LINES = (damage_bytes, damage_line, partial(damage_line, forged=True))
ROW_OF_STATE = {"a": torch.ones(2, 3)}
READERS = {
    "scores": Reader(ScoreFile(random_scores(0), provenance()).save, ScoreFile.load, "scores.safetensors", HEADER),
    "index of shards": Reader(write_shards, lambda path: sorted(WeightScores(path), key=lambda of: of[0]), INDEX),
    "shard": Reader(
        lambda path: write_shards(path.parent / INDEX),
        lambda path: list(WeightScores(path.parent / INDEX)),
        "weight_scores-00001-of-00001.safetensors",
        HEADER,
    ),
    "state": Reader(
        lambda path: Progress({"method": "lrp"}, random_scores(0), ["a", "b"], rows=ROW_OF_STATE).save(path.parent, 0),
        lambda path: load_progress(path.parent),
        "state-0-0.safetensors",
        HEADER,
    ),
    "activations": Reader(
        Activations(ROW_OF_STATE, ["a", "b"], [3, 4]).save, Activations.load, "activations.safetensors", HEADER
    ),
    "neurons": Reader(
        NeuronList(
            NEURONS[:2],
            {"checkpoint": "tiny", "sample_ids": ["a"], "general": [{"path": "a", "spec": {}}], "budget": None},
            NEURONS[2:3],
            NEURONS[3:],
        ).save,
        NeuronList.load,
        "neurons.json",
    ),
    "results": Reader(lambda path: made_up()[0].save(path), Results.load, "results.json"),
    "selection": Reader(SELECTION.save, SelectionResults.load, "selection.json"),
    "sparsity": Reader(lambda path: sparsity().save(path), SparsityResults.load, "sparsity.json"),
    "circuit": Reader(lambda path: circuit().save(path), CircuitResults.load, "circuit.json"),
    "comparison": Reader(lambda path: comparison().save(path), ComparisonResults.load, "compare.json"),
    "completions": Reader(
        lambda path: save_completions(path, ROWS),  # type: ignore[arg-type]
        load_completions,
        "completions.jsonl",
        LINES,
        is_sealed=False,  # a line can be lost
    ),
    "continuations to attribute": Reader(
        lambda path: save_completions(path, ROWS),  # type: ignore[arg-type]
        read_continued,
        "completions.jsonl",
        LINES,
        is_sealed=False,
    ),
    "unfinished": Reader(write_unfinished, read_unfinished, "unfinished-0.jsonl", LINES, is_sealed=False),
    "unfinished, to go on": Reader(write_unfinished, begin, "unfinished-0.jsonl", LINES, is_sealed=False),
    "jsonl": prompts_of("prompts.jsonl", damage_line),
    "jsonl.gz": prompts_of("prompts.jsonl.gz"),
    "json": prompts_of("prompts.json", damage_json),
    "csv": prompts_of("prompts.csv"),
    "parquet": prompts_of("prompts.parquet"),
    "txt": prompts_of("prompts.txt"),
    "config": Reader(
        lambda path: path.write_text(json.dumps({"model": OPTIONS})),
        read_options,
        "prune.yaml",
        (damage_bytes, damage_json),
        is_sealed=False,
    ),
    "config of a checkpoint": Reader(
        write_checkpoint, read_config, "config.json", (damage_bytes, damage_json), is_sealed=False
    ),
}


def plain(value: Any) -> str:
    """Return what was read in a form that can be compared, NaN and tensors too."""
    if isinstance(value, ScoreFile):
        value = (value.scores, value.provenance)
    return repr(value)


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_refused_in_one_sentence_or_read_as_it_was(kind: str, tmp_path: Path) -> None:
    reader = READERS[kind]
    original = tmp_path / "original"
    original.mkdir()
    reader.write(original / reader.name)
    expected = plain(reader.read(original / reader.name))
    content = {path.name: path.read_bytes() for path in original.iterdir()}
    folder = tmp_path / "damaged"
    folder.mkdir()

    @given(st.integers(0, 2**64 - 1))
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a seed cannot be shrunk
        suppress_health_check=list(HealthCheck),
    )
    def damage_and_read(seed: int) -> None:
        for path in folder.iterdir():
            if path.name not in content:
                path.unlink()
        for name, data in content.items():
            (folder / name).write_bytes(data)
        draw = Random(seed)
        way = draw.randrange(len(reader.ways))
        reader.ways[way](folder / reader.name, draw)
        found = said = None
        try:
            found = plain(reader.read(folder / reader.name))
        except (ValueError, OSError) as error:
            said = str(error)
        if said is None:
            assert found == expected or not reader.is_sealed or way + 1 == len(reader.ways)
        else:
            assert said.strip()
            assert "\n" not in said
            assert len(said) < 1500

    damage_and_read()
    shutil.rmtree(folder)
