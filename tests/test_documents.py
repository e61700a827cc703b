"""README.md and the cookbook: what they let a reader run does run, in their order, on tiny inputs; and their links."""

import builtins
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from documents import DOCUMENTS, ON_ONE_CPU, ROOT, commands_of, is_carried_out, sections, steps, tiny, write_inputs
from helpers import WORDS, make_config, tokenizer_of, words_tokenizer
from huggingface_hub import HfApi
from transformers import LlamaForCausalLM

from sparc3_lightning.__main__ import entry_point
from sparc3_lightning.cli import main
from sparc3_lightning.evaluation import zero_shot

STAGE = "configs/slurm/stage.sbatch"
# What stands for paths and numbers of programs in Python.
FOR_PYTHON = {'"meta-llama/Meta-Llama-3-8B"': "TINY", '"./llama"': "TINY", "num_samples=16": '"rows.jsonl", 4, 16'}
# Tests that start what is started here by no test.
ELSEWHERE = {
    "python -m sparc3_lightning.scorers.train": ("scorers/test_detoxify.py", "sparc3_lightning.scorers.train"),
    "python tests/benchmarks": ("test_benchmarks.py", "--only"),
    "srun": ("stages/test_slurm.py", '"srun"'),
    f"sbatch {STAGE}": ("stages/test_slurm.py", "stage.sbatch"),
    "configs/slurm/pipeline.sh": ("stages/test_pipeline.py", "pipeline.sh"),
}
pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaMA that knows the words of the texts, and those of indirect object identification."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    special = {"<pad>", "<s>", "</s>", "<unk>"}
    tokenizer = tokenizer_of(sorted({*WORDS, *words_tokenizer().get_vocab()} - special))
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config("llama", vocab_size=len(tokenizer)))
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read(document: str) -> str:
    return (ROOT / document).read_text()


def is_known_elsewhere(words: list[str]) -> bool:
    """Return whether another test starts this program; it is named by the words that are no options."""
    name = {"python": " ".join(words[:3] if "-m" in words else words[:2]), "sbatch": f"sbatch {STAGE}"}
    file, word = ELSEWHERE.get(name.get(words[0], words[0]), ("", ""))
    return bool(file) and word in (ROOT / "tests" / file).read_text()


def of_sparc3(words: list[str]) -> list[list[str]]:
    """Return the arguments of sparc3 that a command, such as one of srun, comes to.

    Raises:
        ValueError: If no test runs the command.
    """
    program, *rest = words
    if program == "sparc3":
        return [rest]
    if program in ("pip", "pytest") and is_carried_out(words):
        return []
    if not is_known_elsewhere(words):
        raise ValueError(f"No test runs this: {shlex.join(words)}")
    if program == "srun":
        return [words[words.index("sparc3") + 1 :]]
    if program == "sbatch":
        job = shlex.join(rest[rest.index(STAGE) + 1 :])
        (started,) = commands_of(f"source {ROOT / STAGE} {job}", SLURM_JOB_ID="1234", SLURM_NNODES="1")
        return of_sparc3(started)
    if program == "configs/slurm/pipeline.sh":
        config, *options = rest
        return [["prepare", "--config", config, *options], ["run", "--config", config, *options, "--plan", "plan.txt"]]
    return []


def ends(arguments: list[str]) -> str:
    """Run a command that prints something and ends; return what."""
    # What names no verb is answered before any library is imported.
    begin = entry_point if arguments[0].startswith("--") else partial(main, arguments)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", ["sparc3", *arguments])
        with pytest.raises(SystemExit) as done:
            begin()
    assert done.value.code in (0, None)
    return out.getvalue()


def only_prints(arguments: list[str]) -> bool:
    return arguments[0].startswith("--") or any(
        word == "--print_config" or word.endswith(("--help", ".help")) for word in arguments
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_links_to_files_and_headings_that_are_there(document):
    folder = (ROOT / document).parent
    links = set(re.findall(r"\]\((?!http)([^)]+)\)", read(document)))
    assert len(links) > 20
    for link in links:
        name, _, anchor = link.partition("#")
        linked = folder / name if name else ROOT / document
        assert linked.exists(), link
        headings = [heading for heading in linked.read_text().splitlines() if heading.startswith("#")] if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lstrip("# ")).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def test_the_cookbook_names_every_shipped_config():
    named = re.findall(r"\]\(([\w.]+\.yaml)\)", read("configs/README.md"))
    assert set(named) == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_readme_is_short_and_has_its_sections_in_order():
    assert len(read("README.md").splitlines()) <= 200
    assert list(sections(read("README.md")))[1:] == [
        "Try it",
        "Your own model",
        "What the figures mean",
        "The verbs",
        "Many GPUs, and Slurm",
        "From Python",
        "Limits",
        "Licences",
        "Where to add what",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sparc3x run", "No test knows how to run this"),
        ("cd ..", "No test knows how to run this"),
        ("sparc3 run; hf auth login", "No test knows how to run this"),
        ("pip install heretic", "No test runs this"),
        ('pip install ".[gpu]"', "No test runs this"),
        ("python setup.py", "No test runs this"),
        ("pytest -m slow", "No test runs this"),
    ],
)
def test_a_command_that_no_test_knows_is_refused(command, words):
    with pytest.raises(ValueError, match=words):
        list(map(of_sparc3, commands_of(command)))


def test_commands_stand_in_blocks_and_in_lines_and_what_was_printed_is_none():
    text = "Do `sparc3\nrun --help`, not `sparc3 run`:\n\n    sparc3 run \\\n      -v\n    pytest\n\n```text\nls\n```"
    assert [step.text for step in steps(text)] == ["sparc3 run --help", "sparc3 run \\\n  -v", "pytest"]
    assert commands_of("for i in 1 2; do sparc3 run --seed $i; done") == [
        ["sparc3", "run", "--seed", "1"],
        ["sparc3", "run", "--seed", "2"],
    ]


@pytest.mark.parametrize("text", ["```bash\nls\n```\n", "```sh\nsparc3 run\n", "Run:\n\n    for seed in 0 1; do\n"])
def test_a_block_that_nobody_can_run_is_refused(text):
    with pytest.raises(ValueError, match=r"A block is of 'bash'|The block of sh has no end|A command has no end"):
        list(steps(text))


@pytest.fixture
def in_a_prepared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inputs, a terminal at which prompts are typed, a hub that takes everything, and no zero-shot task but a toy."""
    import datasets

    tasks = pytest.importorskip("lm_eval.tasks")
    write_inputs(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    typed = itertools.cycle(["the cat is", EOFError()])
    monkeypatch.setattr(builtins, "input", lambda _: type_next(typed))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())
    user = {"name": "ann", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setattr(HfApi, "whoami", lambda _: user)
    monkeypatch.setattr(HfApi, "repo_exists", lambda *_: False)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "https://huggingface.co/ann/my-model")
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
    zero_shot.task_manager.cache_clear()
    yield
    zero_shot.task_manager.cache_clear()


def type_next(lines: Iterator[str | EOFError]) -> str:
    line = next(lines)
    if isinstance(line, EOFError):
        raise line
    return line


def run(arguments: list[str], checkpoint: str) -> None:
    """Run a command of sparc3 as it is, but for a last config that makes its options tiny."""
    if only_prints(arguments):
        ends(arguments)
    elif arguments[0] == "report":
        main(arguments)
    elif arguments[0] == "reproduce":
        main([*arguments, *[word for name, value in ON_ONE_CPU.items() for word in (f"--trainer.{name}", str(value))]])
    else:
        options = yaml.safe_load(ends([*arguments, "--print_config"]))
        smaller = tiny(options, checkpoint)
        if arguments[0] == "chat":  # which gives one answer of each model
            smaller["model"]["sampling"]["num_continuations"] = None
        Path("tiny.yaml").write_text(yaml.safe_dump(smaller))
        main([*arguments, "--config", "tiny.yaml"])


def filled_in(statement: str) -> str:
    """Put the last stage of its kind in place of a folder with a hash that stands for any."""
    for name in set(re.findall(r"\w+/\w+-1a2b3c4d", statement)):
        folders = Path("lightning_logs").glob(name.replace("1a2b3c4d", "*"))
        last = max(folders, key=lambda folder: folder.stat().st_mtime)
        statement = statement.replace(name, f"{last.parent.name}/{last.name}")
    return statement


def run_python(program: str, checkpoint: str) -> None:
    for written, meant in FOR_PYTHON.items():
        program = program.replace(written, meant.replace("TINY", repr(checkpoint)))
    exec(program, {})


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_prepared_folder")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_runs_after_those_before_it(document, checkpoint):
    for step in steps(read(document)):
        try:
            if step.language == "python":
                run_python(step.text, checkpoint)
            for words in commands_of(filled_in(step.text)) if step.language == "sh" else []:
                for arguments in of_sparc3(words):
                    run(arguments, checkpoint)
        except BaseException as error:
            error.add_note(f"This is of {document}: {step.text}")
            raise
