"""Chat: a prompt in, and two answers side by side, the original model's and that with the neurons off."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from sparc3_lightning.data.prompts import prompt_id, read_prompts
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.generation import SamplingOptions, check_can_continue, stream_prompt
from sparc3_lightning.models.checkpoints import ForwardDtype, resolve_dtype
from sparc3_lightning.models.components import check, counted, counts_of, in_words, mask
from sparc3_lightning.models.noise import draw_key
from sparc3_lightning.provenance import run_seed
from sparc3_lightning.report.escaping import for_terminal
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.scorers.registry import check_scorer, load_scorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.signals import Stopped
from sparc3_lightning.sources import read_records, resolve
from sparc3_lightning.stages.base import Stage

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

CUT = "\ufffd"  # what the tokenizer shows for a character of which a part is drawn
AROUND = 8  # lines of the terminal that the text of growing answers leaves free


@dataclass(frozen=True)
class Answer:
    """What a model has written so far, safe to print; ``note`` has its score, and stays empty until its end."""

    model: str
    text: str = ""
    note: str = ""


class Chat(Stage):
    """Answers each prompt twice, as the model is and with the neurons off, from the same random draws.

    A prompt goes through the tokenizer's chat template, if there is one; else it is continued. Each prompt stands by
    itself, as in ``sparc3 evaluate``: no answer is remembered. Nothing is written. The option ``sampling`` is a group,
    see ``SamplingOptions``.

    Args:
        neurons: The neurons.json of ``sparc3 prune``.
        checkpoint: Hugging Face id, local folder or GGUF file; None takes the one that ``neurons`` names.
        scorer: What scores an answer, see ``sparc3 evaluate``; ``small`` is shipped with this package.
        behavior: What the scorer scores, as it is named beside an answer.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU; ``fast`` is bfloat16 on a
            CPU too if that has instructions for its matrices.
    """

    verb = "chat"
    OUTPUTS = ()
    model: PreTrainedModel
    scorer: Scorer
    tokens: Tokens

    def __init__(
        self,
        neurons: Path,
        checkpoint: str | None = None,
        scorer: str = "small",
        behavior: str = "toxicity",
        sampling: SamplingOptions = SamplingOptions(max_new_tokens=256),
        dtype: ForwardDtype = "auto",
    ) -> None:
        super().__init__()
        self.sampling = sampling.resolve()
        self.sampling.check()
        if self.sampling.num_continuations != 1:
            raise OptionError(
                "sampling.num_continuations",
                f"must be 1 in a chat, got {self.sampling.num_continuations}: give --.sampling.num_continuations 1.",
            )
        check_scorer(scorer)
        self.neurons = NeuronList.load(Path(neurons))
        self.checkpoint = self.neurons.checkpoint(neurons, checkpoint)
        self.save_hyperparameters()
        self.neurons_path = neurons
        self.scorer_name = scorer
        self.behavior = behavior
        self.dtype_name: ForwardDtype = dtype

    def chat(self, device: torch.device, prompts: str | None = None) -> None:
        """Answer the prompts of a file, or those that are typed, until Ctrl-D.

        Args:
            device: Where to answer.
            prompts: File of prompts, as ``sparc3 evaluate`` reads them; None asks at the terminal.

        Raises:
            FileNotFoundError, ValueError: If the file is missing or damaged; if there is no file, and no terminal; if
                the checkpoint is not the neurons' one, or cannot be continued.
            SystemExit: At Ctrl-C, with its exit code.
        """
        if prompts is None and not (sys.stdin and sys.stdin.isatty()):
            raise ValueError("--prompts must name a file of prompts, since there is no terminal to type them at.")
        texts = _typed() if prompts is None else _texts_of(prompts)
        try:
            self._load(device)
            if prompts is None:
                template = "its chat template" if self.tokens.chat else "no chat template: prompts are continued"
                print(f"{for_terminal(self.checkpoint.name)}, with {template}. Ctrl-D ends.", flush=True)
            for text in texts:
                if prompts is not None:
                    print(f"> {for_terminal(text, keep=chr(10))}", flush=True)
                try:
                    input_ids = self._encode(text)
                except ValueError as error:
                    print(for_terminal(error), flush=True)
                    continue
                _show(self._answers(text, input_ids))
        except Stopped as stopped:  # there is nothing that it could say of results
            print(flush=True)
            raise SystemExit(stopped.code) from None

    def _load(self, device: torch.device) -> None:
        self.neurons.check_checkpoint(self.checkpoint, self.neurons_path)
        skeleton = self.checkpoint.skeleton()
        check(skeleton, self.neurons.neurons)
        check_can_continue(skeleton)
        tokenizer = self.checkpoint.tokenizer()
        vocab_size = getattr(self.checkpoint.config.get_text_config(), "vocab_size", None)
        self.tokens = Tokens(tokenizer, bool(tokenizer.chat_template), vocab_size)
        self.scorer = load_scorer(self.scorer_name, device)
        self.model = self.checkpoint.load(resolve_dtype(self.dtype_name, device)).to(device)  # type: ignore[arg-type]

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            ValueError: If it is empty or no text, the context has no room for it, or the chat template fails.
        """
        if not text.strip():
            raise ValueError("The prompt is empty.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("The prompt is not UTF-8.") from None
        (input_ids,) = self.tokens.encode_prompts([text])
        context = self.checkpoint.context
        if context is not None and len(input_ids) >= context:
            raise ValueError(
                f"The prompt has {len(input_ids)} tokens, which leave no room for an answer in the model's context of "
                f"{context}: give a shorter one."
            )
        return input_ids

    def _answers(self, prompt: str, input_ids: Sequence[int]) -> Iterator[list[Answer]]:
        """Yield both answers to a prompt as they grow, first the original model's."""
        room = math.inf if self.checkpoint.context is None else self.checkpoint.context - len(input_ids)
        sampling = replace(self.sampling, max_new_tokens=int(min(self.sampling.max_new_tokens, room)))
        key = draw_key(run_seed(), prompt_id(prompt), 0)
        masked = f"{in_words(counts_of(self.neurons.neurons))} {self.neurons.ablation}"
        pair = [Answer("original"), Answer(masked)]
        for i, answer in enumerate(pair):
            with mask(self.model, self.neurons.neurons) if i else nullcontext():
                for drawn in stream_prompt(self.model, input_ids, key, sampling):
                    (text,) = self.tokens.decode([drawn.input_ids])
                    pair[i] = replace(answer, text=for_terminal(text.rstrip(CUT), keep="\n\t"))
                    yield pair.copy()
            (score,) = self.scorer.score_drawn([text], [drawn.input_ids])
            length = len(drawn.input_ids)
            note = f"{for_terminal(self.behavior)} {score:.3f}" if math.isfinite(score) else "could not be scored"
            note += f", {counted(length, 'token')}"
            if drawn.failed:
                note = "the model gave logits that are not finite"
            elif length == sampling.max_new_tokens:
                note += ", cut off"
            pair[i] = replace(answer, text=for_terminal(text, keep="\n\t"), note=note)
            yield pair.copy()


def _typed() -> Iterator[str]:
    """Yield what is typed at the terminal, line by line, until Ctrl-D."""
    with suppress(ImportError):  # of Windows
        import readline  # noqa: F401  # lets input() edit a line, and recall earlier ones
    while True:
        try:
            text = input("> ")
        except EOFError:
            print(flush=True)
            return
        except UnicodeDecodeError:
            print("The prompt is not UTF-8.", flush=True)
            continue
        yield text


def _texts_of(source: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(read_records(resolve(source)), place=source)]


def _show(pairs: Iterable[list[Answer]]) -> None:
    """Print two answers while they grow: in columns at a terminal, elsewhere one after the other."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if console.is_terminal:
        _show_columns(console, pairs)
    else:
        _show_in_turn(pairs)


def _show_columns(console: "Console", pairs: Iterable[list[Answer]]) -> None:
    from rich.live import Live

    pair: list[Answer] = []
    try:
        with Live(console=console, transient=True, refresh_per_second=10) as live:
            for pair in pairs:
                live.update(_columns(pair, max(1, console.height - AROUND)))
    finally:  # what was drawn stays, also at Ctrl-C, and also what is higher than the terminal
        if pair:
            console.print(_columns(pair))


def _columns(pair: Sequence[Answer], num_lines: int = 0) -> "Table":
    """Return two answers side by side: whole, or the last lines of each."""
    from rich.box import ROUNDED
    from rich.table import Table
    from rich.text import Text

    table = Table(box=ROUNDED, expand=True, show_footer=True)
    for answer in pair:
        table.add_column(Text(answer.model), Text(answer.note), ratio=1, overflow="fold")
    table.add_row(*(_End(Text(answer.text), num_lines) for answer in pair))
    return table


@dataclass(frozen=True)
class _End:
    """The last lines of a text, as wide as there is room for, where it grows."""

    text: "Text"
    num_lines: int

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        for line in console.render_lines(self.text, options, pad=False)[-self.num_lines :]:
            yield from line
            yield Segment.line()


def _show_in_turn(pairs: Iterable[list[Answer]]) -> None:
    turn, shown = 0, None  # whose answer grows, and what was printed of it
    for pair in pairs:
        answer = pair[turn]
        if shown is None:
            print(f"[{answer.model}]")
            shown = ""
        is_longer = answer.text.startswith(shown)  # a tokenizer may join what it wrote before: then once more
        print(answer.text[len(shown) :] if is_longer else f"\n{answer.text}", end="", flush=True)
        shown = answer.text
        if answer.note:
            print(f"\n({answer.note})\n", flush=True)
            turn, shown = turn + 1, None
