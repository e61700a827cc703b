"""The chat: both answers are those of an evaluation's draws, and what is typed or written harms no terminal."""

import builtins
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluations import EVERY_SECOND, save_neurons
from helpers import sentence, write_jsonl
from transformers import AutoTokenizer

from sparc3_lightning.cli import main
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.evaluation.generation import Sampling, continue_prompts
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import mask
from sparc3_lightning.models.noise import draw_key
from sparc3_lightning.scorers.registry import load_scorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.signals import Stopped
from sparc3_lightning.stages import chat

PROMPT = sentence(7, 5)
SHORT = ["--model.sampling.max_new_tokens", "6", "--model.scorer", "repetition"]
CPU = ["--trainer.accelerator", "cpu"]
TEMPLATE = "{% for m in messages %}you are {{ m.content }} {% endfor %}{% if add_generation_prompt %}it is{% endif %}"

pytestmark = pytest.mark.usefixtures("as_if_from_python")


@pytest.fixture
def answer(neurons, capsys):
    """Return a function that returns what a chat printed about prompts in a file."""

    def ask(*prompts: str, options: tuple[str, ...] = (), neurons: Path = neurons) -> str:
        write_jsonl(Path("asked.jsonl"), [{"text": prompt} for prompt in prompts])
        main(["chat", *CPU, "--model.neurons", str(neurons), "--prompts", "asked.jsonl", *SHORT, *options])
        return capsys.readouterr().out

    return ask


def typed(monkeypatch, *lines: object) -> None:
    """Type lines at a terminal, the last of them Ctrl-D; an exception is raised where its line would be typed."""
    left = iter([*lines, EOFError()])

    def type_next(_: str) -> str:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr(builtins, "input", type_next)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())


def drawn(
    checkpoint: str, text: str, seed: int = 0, is_chat: bool = False, new: int = 6
) -> list[tuple[str, list[int]]]:
    """Draw as an evaluation does: text and tokens of the original and of the masked model."""
    model, tokens = load_model(checkpoint, torch.float32), Tokens(AutoTokenizer.from_pretrained(checkpoint), is_chat)
    input_ids = torch.tensor(tokens.encode_prompts([text]))
    key, sampling = draw_key(seed, prompt_id(text), 0), Sampling(new, 0.7, 0.9)
    found = []
    for off in ([], EVERY_SECOND):
        with mask(model, off):
            ((one,),) = continue_prompts(model, input_ids, torch.ones_like(input_ids), [[key]], sampling)
        found.append((tokens.decode([one.input_ids])[0], one.input_ids))
    return found


def with_template(checkpoint: str) -> Path:
    """Copy a checkpoint, give its tokenizer a chat template, and save neurons of it."""
    shutil.copytree(checkpoint, "with_template")
    tokenizer = AutoTokenizer.from_pretrained("with_template")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("with_template")
    return save_neurons("with_template", EVERY_SECOND)


@pytest.mark.parametrize("seed", [0, 3])
def test_both_answers_are_those_that_an_evaluation_draws_for_the_prompt(answer, tiny_checkpoint, seed):
    (original, _), (masked, _) = drawn(tiny_checkpoint, PROMPT, seed)
    assert original != masked
    out = answer(PROMPT, options=("--seed_everything", str(seed)))
    assert f"> {PROMPT}\n[original]\n{original}\n(" in out
    assert f")\n\n[24 neurons switched off]\n{masked}\n(" in out


def test_beside_each_answer_stands_its_score_and_its_length(answer, tiny_checkpoint):
    pair = drawn(tiny_checkpoint, PROMPT)
    notes = [line for line in answer(PROMPT, options=("--model.behavior", "echo")).splitlines() if line.startswith("(")]
    scorer = load_scorer("repetition")
    for note, (text, ids) in zip(notes, pair, strict=True):
        (score,) = scorer.score_drawn([text], [ids])
        assert note.startswith(f"(echo {score:.3f}, {len(ids)} tokens")
        assert note.endswith(", cut off)") == (len(ids) == 6)


def test_a_prompt_goes_through_the_chat_template_if_there_is_one(answer, tiny_checkpoint):
    neurons = with_template(tiny_checkpoint)
    (original, _), (masked, _) = drawn("with_template", PROMPT, is_chat=True)
    assert (original, masked) != tuple(text for text, _ in drawn("with_template", PROMPT))
    out = answer(PROMPT, neurons=neurons)
    assert original in out
    assert masked in out


def test_a_chat_writes_nothing(answer):
    before = {path for path in Path().rglob("*") if path.is_file()}
    answer(PROMPT)
    assert {path for path in Path().rglob("*") if path.is_file()} - before == {Path("asked.jsonl")}


def test_a_text_file_holds_one_prompt_a_line(neurons, capsys):
    Path("prompts.txt").write_text(f"{PROMPT}\n{sentence(8, 3)}\n")
    main(["chat", *CPU, "--model.neurons", str(neurons), "--prompts", "prompts.txt", *SHORT])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(">")] == [
        f"> {PROMPT}",
        f"> {sentence(8, 3)}",
    ]


def test_the_checkpoint_may_have_moved_but_must_be_the_same(answer, tiny_checkpoint, make_checkpoint):
    shutil.copytree(tiny_checkpoint, "moved")
    assert answer(PROMPT) == answer(PROMPT, options=("--model.checkpoint", "moved"))
    with pytest.raises(ValueError, match=r"is for the checkpoint .*, but --model\.checkpoint is .* \(files:"):
        answer(PROMPT, options=("--model.checkpoint", make_checkpoint("gpt2")))


def test_typed_prompts_are_answered_until_ctrl_d(monkeypatch, neurons, tiny_checkpoint, capsys):
    typed(monkeypatch, PROMPT)
    main(["chat", *CPU, "--model.neurons", str(neurons), *SHORT])
    out = capsys.readouterr().out
    assert "with no chat template: prompts are continued. Ctrl-D ends.\n" in out
    assert all(text in out for text, _ in drawn(tiny_checkpoint, PROMPT))


def test_a_prompt_that_cannot_be_answered_is_said_in_a_sentence_and_the_conversation_goes_on(
    monkeypatch, neurons, capsys
):
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    typed(monkeypatch, "", "  ", sentence(1, 64), undecodable, "a \udcff", PROMPT)
    main(["chat", *CPU, "--model.neurons", str(neurons), *SHORT])
    _, *said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["The prompt is empty."] * 2
    assert said[2].startswith(
        "The prompt has 64 tokens, which leave no room for an answer in the model's context of 64"
    )
    assert said[3:5] == ["The prompt is not UTF-8."] * 2
    assert said[5] == "[original]"


def test_an_answer_ends_where_the_context_is_full(answer, tiny_checkpoint):
    prompt = sentence(1, 62)
    (original, ids), _ = drawn(tiny_checkpoint, prompt, new=2)
    assert f"[original]\n{original}\n(toxicity" in answer(prompt)
    assert len(ids) <= 2


def test_ctrl_c_ends_with_its_code_and_no_sentence_about_results(monkeypatch, neurons, capsys):
    typed(monkeypatch, Stopped(2))
    with pytest.raises(SystemExit) as ended:
        main(["chat", *CPU, "--model.neurons", str(neurons), *SHORT])
    assert type(ended.value) is SystemExit
    assert ended.value.code == 130
    assert "complete" not in "".join(capsys.readouterr())


def test_an_answer_is_printed_while_it_is_drawn(monkeypatch, answer):
    printed: list[str] = []
    whole = chat.stream_prompt

    def watched(*args):
        for continuation in whole(*args):
            printed.append(sys.stdout.getvalue())
            yield continuation

    monkeypatch.setattr(chat, "stream_prompt", watched)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    answer(PROMPT)
    lengths = [len(text) for text in printed]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 6  # nearly every token finds the one before on the screen
    assert sys.stdout.getvalue().startswith(printed[-1])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_answer_and_no_prompt_can_command_the_terminal(monkeypatch, capsys, neurons, is_terminal):
    monkeypatch.setattr(Tokens, "decode", lambda _, ids: ["red \x1b[31m\u202e[bold]x" for _ in ids])
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    write_jsonl(Path("asked.jsonl"), [{"text": "the \x1b]0;title\x07 cat"}])
    main(["chat", *CPU, "--model.neurons", str(neurons), "--prompts", "asked.jsonl", *SHORT])
    out = capsys.readouterr().out
    assert r"> the \x1b]0;title\x07 cat" in out
    assert r"red \x1b[31m\u202e[bold]x" in out
    assert "\x1b[31m" not in out
    assert "\x1b]" not in out


def test_at_a_terminal_the_answers_stand_side_by_side_in_its_width(monkeypatch, answer, tiny_checkpoint):
    (original, _), (masked, _) = drawn(tiny_checkpoint, PROMPT)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "100")
    out = answer(PROMPT)
    row = next(line for line in out.splitlines() if original.split()[0] in line and "│" in line)
    assert masked.split()[0] in row
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ([], ValueError, "--prompts must name a file of prompts, since there is no terminal"),
        (["--prompts", "no.txt"], FileNotFoundError, "no.txt"),
        (["--prompts", "blank.txt"], ValueError, "Row 2 of blank.txt is only white space"),
        (["--prompts", "p.txt", "--model.sampling.protocol", "rtp"], ValueError, "must be 1 in a chat, got 25"),
        (["--prompts", "p.txt", "--model.scorer", "nobody"], ValueError, "--model.scorer: 'nobody' is neither"),
        (["--prompts", "p.txt", "--model.neurons", "no.json"], FileNotFoundError, "no.json does not exist"),
        (["--prompts", "p.txt", "--model.neurons", "of_nothing.json"], ValueError, "which checkpoint it is for"),
    ],
)
@pytest.mark.few(3)
def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(monkeypatch, capsys, neurons, options, error, said):
    Path("p.txt").write_text("the cat\n")
    Path("blank.txt").write_text("the cat\n \n")
    NeuronList(EVERY_SECOND).save(Path("of_nothing.json"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("the model was loaded"))
    # jsonargparse ends the process where an option is refused while the stage is made.
    with pytest.raises((error, SystemExit)) as refused:
        main(["chat", *CPU, "--model.neurons", str(neurons), *SHORT, *options])
    assert said in json.dumps(str(refused.value) + capsys.readouterr().err, ensure_ascii=False)
