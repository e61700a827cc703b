"""Tiny models of every family, a tokenizer and a checkpoint made on the spot; nothing is downloaded."""

import copy
import gc
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

# Tiny models are fastest on one core, and two cores that wait for each other are slow when others use them too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, for the same reason
# Forks share the lock of tqdm: one that is killed while it holds the lock would stop all others, and this process.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
SHARED = Path(__file__).parents[2] / "shared"
# Of all files: whose tests take minutes together.
LONGEST = {
    "test_distributed.py",
    "test_slurm.py",
    "test_footprint_memory.py",
    "test_documents.py",
    "test_benchmarks.py",
    "test_every_decoder.py",
}
# Of the same name in every room: collected for doctests, they would be taken for one module.
collect_ignore_glob = ["*conftest.py"]


@pytest.hookimpl(tryfirst=True)  # before those that are marked slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is one of many alike as slow, and begin with the files whose tests take longest.

    So no worker is left alone with one of these in the end. Coverage sees only every third test of a file, and of its
    sets of parameters the first, so that what pytest-cov prints is a lower bound: before Python 3.12 it traces the
    libraries too, and the tests would take twice as long.
    """
    alike: Counter[tuple[Path, str]] = Counter()
    seen: dict[Path, set[str]] = defaultdict(set)  # tests that are not slow, by file
    for item in items:
        name = getattr(item, "originalname", item.name)
        alike[item.path, name] += 1
        if (few := item.get_closest_marker("few")) and alike[item.path, name] > few.args[0]:
            item.add_marker("slow")
        if name in seen[item.path] or len(seen[item.path]) % 3:
            item.add_marker("no_cover")
        if not item.get_closest_marker("slow"):
            seen[item.path].add(name)
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> None:
    """Spare the search for garbage in what was imported, half a million objects, whenever a test lets go of a model."""
    gc.freeze()


STAYING: set[str] = set()  # modules that are of no test


@pytest.fixture(autouse=True)
def in_empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Run every test in a folder of its own, and forget the modules that a test, or a fixture, imported from a folder.

    Another test may have a module of that name.
    """
    monkeypatch.chdir(tmp_path)
    forget_modules_in(tmp_path_factory.getbasetemp())  # of a fixture that several tests share, which is made first
    yield
    forget_modules_in(tmp_path_factory.getbasetemp())


def forget_modules_in(folder: Path) -> None:
    """Forget the modules whose files lie in a folder."""
    for name in sys.modules.keys() - STAYING:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(folder):
            del sys.modules[name]
        else:
            STAYING.add(name)


@pytest.fixture(autouse=True)
def classes_stay_unpatched() -> Iterator[None]:
    """Fail a test that leaves a class of transformers, or its attention registries, changed."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    def state() -> tuple[Any, ...]:
        registries = (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS))
        return (LlamaMLP.forward, LlamaRMSNorm.forward, torch.nn.LayerNorm.forward, torch.nn.ReLU.forward, *registries)

    before = state()
    yield
    assert state() == before


@pytest.fixture(scope="module", autouse=True)
def pictures_have_one_dot() -> Iterator[None]:
    """Spare the pictures, which take a quarter of the time; tests/report looks at real ones."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **options: path.write_bytes(one_dot()))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Spare the waits until a file is on the disk, which only a power cut could tell from those of a moment later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@cache
def one_dot() -> bytes:
    """Return the smallest picture, as PNG."""
    from matplotlib.image import imsave

    with BytesIO() as picture:
        imsave(picture, [[0.0]], format="png")
        return picture.getvalue()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Tear down what a distributed test set up."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Use every core, for a test of a real model."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden scores; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' with real data and golden scores is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return a factory of tiny random float64 models: ``make_model("llama", num_hidden_layers=1)``."""
    # Not above: pytest starts its workers only after this file was imported.
    from helpers import FAMILIES, make_config

    made: dict[str, tuple[Any, torch.Tensor]] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
        key = repr((family, dtype, seed, sorted(changes.items())))
        if key not in made:
            made[key] = build(family, dtype, seed, **changes), torch.get_rng_state()
        model, state = made[key]
        torch.set_rng_state(state)  # what is drawn next does not depend on the tests before
        return copy.deepcopy(model)

    def build(family: str, dtype: torch.dtype, seed: int, **changes: Any) -> Any:
        torch.manual_seed(seed)
        model = FAMILIES[family][1](make_config(family, **changes)).to(dtype).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            # transformers starts with norms of 1 and tiny weights: make every parameter matter.
            scale = 0.3 if "norm" in name else 0.4
            parameter.data.add_(scale * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a maker of folders with a tiny random model in float32 and a word-level tokenizer, one of each family."""
    from helpers import FAMILIES, WORDS, make_config, tokenizer_of

    @cache
    def make(family: str) -> str:
        folder = tmp_path_factory.mktemp("checkpoint") / f"tiny-{family}"
        torch.manual_seed(0)
        model = FAMILIES[family][1](make_config(family))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer_of(WORDS).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[[str], str]) -> str:
    """A folder with a tiny random LLaMA, as save_pretrained writes it."""
    return make_checkpoint("llama")


@pytest.fixture
def as_if_from_a_shell(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["sparc3"])
