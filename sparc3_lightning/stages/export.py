"""Export: from a list of neurons, wherever it comes from, to a plain checkpoint, and to the hub."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.attribution.scores import WeightScores
from sparc3_lightning.errors import OptionError, OptionFileExistsError, OptionFileNotFoundError
from sparc3_lightning.evaluation.results import RESULTS, Results
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype
from sparc3_lightning.models.components import Granularity, by_layer, check, counts_of, in_words
from sparc3_lightning.models.export import check_export, copied, export_dtype_of, export_pruned
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.report.card import README, Exported, license_of, model_card, sparse_card, unevaluated_card
from sparc3_lightning.report.escaping import for_shell, for_terminal, public_name
from sparc3_lightning.selection.neuron_list import NEURONS, NeuronList, by_name
from sparc3_lightning.selection.sparsity import SPARSITY, SparsityResults
from sparc3_lightning.sources import first_line
from sparc3_lightning.stages.base import Stage
from sparc3_lightning.stages.compress import Ranking, check_layers, held, zero_
from sparc3_lightning.stages.folders import giving_back


class Export(Stage):
    """Writes the effect of a list of neurons, heads, channels or weights into a checkpoint, and publishes it if asked.

    The list is of ``sparc3 prune``, ``sweep`` or ``circuit``, or of your own. The checkpoint has the files of the
    original, in which the weights of the list alone differ, neurons.json, and as README.md a model card. That tells
    what an evaluation of these neurons found, if its results are named, or lie beside the list or the export.

    Of the sparsity.json of ``sparc3 compress`` it makes the sparse checkpoint again, by the scores that this names.

    Args:
        neurons: The neurons.json, or a sparsity.json.
        export: Folder to write the checkpoint to. It must not exist.
        checkpoint: Hugging Face id, local folder or GGUF file of the original; None takes the one that ``neurons``
            names.
        export_dtype: Of the exported weights; ``auto`` keeps the dtype of each; of a compression it is its own.
        results: The results.json of an evaluation of these neurons, for the model card.
        push_to_hub: Id of a new repository at the Hugging Face hub to upload the folder to; None uploads nothing.
        private: Whether nobody else can see that repository.
    """

    verb = "export"
    OUTPUTS = (NEURONS, SPARSITY)

    def __init__(
        self,
        neurons: Path,
        export: Path,
        checkpoint: str | None = None,
        export_dtype: Dtype = "auto",
        results: Path | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> None:
        super().__init__()
        if Path(export).exists():
            raise OptionFileExistsError("export", f": {export} exists already; nothing was overwritten.")
        if push_to_hub is not None:
            _check_id(push_to_hub)
        elif not private:
            raise OptionError("private", "is for what is uploaded: add --.push_to_hub <id>.")
        self.compression = _compression(Path(neurons))
        if self.compression is None:
            self.list = NeuronList.load(Path(neurons))
            self.checkpoint = self.list.checkpoint(neurons, checkpoint)
        elif results is not None:
            raise OptionError("results", f"is for a list of neurons, and {neurons} is of a compression: leave it out.")
        else:
            revision = revision_of(self.compression.checkpoint_fingerprint)
            self.checkpoint = Checkpoint(checkpoint or self.compression.checkpoint, revision)
        if results is not None and not Path(results).is_file():
            raise OptionFileNotFoundError("results", f": {results} does not exist; 'sparc3 evaluate' writes it.")
        self.save_hyperparameters()
        self.neurons = Path(neurons)
        self.export = Path(export)
        self.export_dtype: Dtype = export_dtype
        self.results = None if results is None else Path(results)
        self.push_to_hub = push_to_hub
        self.private = private

    @giving_back()
    def write(self, folder: Path) -> str:
        """Write the checkpoint, upload it if asked, and write neurons.json with its fingerprint to a folder.

        Args:
            folder: Where neurons.json goes, or sparsity.json.

        Returns:
            Lines for the terminal.

        Raises:
            OSError: If the checkpoint cannot be had, the export cannot be written, or the hub cannot be reached or
                refuses.
            ValueError: If the checkpoint is not the neurons' one, or has no such neurons; if the results are of others;
                if the scores of a compression have changed.
            FileExistsError: If the folder holds a neurons.json, or the hub the repository.
        """
        self.begin(folder, NEURONS if self.compression is None else SPARSITY)
        repository = None if self.push_to_hub is None else _check_can_push(self.push_to_hub)
        said = self._write_pruned(repository) if self.compression is None else self._write_sparse(self.compression)
        return said if repository is None else f"{said}\nUploaded: {self._push(repository)}"

    def _write_pruned(self, repository: str | None) -> str:
        """Write the checkpoint of a list and neurons.json, and return lines for the terminal."""
        self._check()
        readme = self.checkpoint.folder / README
        exported = Exported(self.list, self.checkpoint.name, self.export.resolve().name, license_of(readme))
        found = self._results(exported)
        card = unevaluated_card(exported) if found is None else model_card(found[0], exported)
        public = ("criterion", "ablation", "damping", "versions", "git_hash")
        origin = {name: value for name, value in self.list.provenance.items() if name in public}
        origin |= {
            "checkpoint": public_name(self.checkpoint.name),
            "checkpoint_fingerprint": self.checkpoint.fingerprint,
            "choosers": by_name(self.list.choosers(), public_name),
        }
        self.keep_config()
        dtype = export_dtype_of(self.export_dtype)
        texts = {README: card, NEURONS: NeuronList(self.list.neurons, origin).to_json()}
        export_pruned(self.checkpoint, self.list.neurons, self.export, dtype=dtype, texts=texts)
        provenance = {
            **self.list.provenance,
            "push_to_hub": repository,
            "checkpoint": self.checkpoint.name,
            "export": str(self.export),
            "export_dtype": self.export_dtype,
            "export_fingerprint": Checkpoint(str(self.export.absolute())).fingerprint,
        }
        NeuronList(self.list.neurons, provenance, self.list.next, self.list.least_relevant).save(self.output)
        what = "what is known of them" if found is None else f"the results of {found[1]}"
        said = f"Checkpoint with {in_words(counts_of(self.list.neurons))} {self.list.ablation}: {self.export}"
        return f"{said}\nIts model card tells {what}: {self.export / README}"

    def _write_sparse(self, of: SparsityResults) -> str:
        """Write the checkpoint of a compression and sparsity.json, and return lines for the terminal."""
        self.checkpoint.check_is_of(self.neurons, of.checkpoint, of.checkpoint_fingerprint)
        files = [self._unchanged(Path(ranked["path"]), ranked["digest"]) for ranked in of.ranked_by]
        export_dtype = of.export_dtype if self.export_dtype == "auto" else self.export_dtype
        dtype = export_dtype_of(export_dtype)
        check_layers(files[0], self.checkpoint)
        check_export(self.checkpoint, list(files[0].shapes), "weight", self.export, dtype=dtype)
        license = license_of(self.checkpoint.folder / README)
        card = sparse_card(of, self.checkpoint.name, self.export.resolve().name, license)
        self.keep_config()
        with copied(self.checkpoint, self.export, dtype) as copy:
            found = zero_(copy.model, held(copy, Ranking(files).masks(of.sparsity, of.pattern)))
            if found.masks != of.masks:
                raise OptionError(
                    "neurons",
                    f": the masks made of {self.neurons} have the hash {found.masks}, not {of.masks}, so nothing was "
                    "written: use the versions that it names, or run 'sparc3 compress' again.",
                )
            (copy.folder / README).write_text(card, encoding="utf-8")
        name, export = self.checkpoint.name, str(self.export)
        replace(of, checkpoint=name, export=export, export_dtype=export_dtype).save(self.output)
        return (
            f"Checkpoint with {found.num_pruned:,} of {found.num_weights:,} weights zero, as {self.neurons} says: "
            f"{self.export}\nIts model card tells what is known of them: {self.export / README}"
        )

    def _unchanged(self, path: Path, digest: str) -> WeightScores:
        """Return the scores at a path, unless they are gone, or others than a compression ranked by."""
        scores = WeightScores(path) if path.is_file() else None
        if scores is None or scores.digest != digest:
            found = "do not exist" if scores is None else "have changed"
            raise OptionError(
                "neurons",
                f": {self.neurons} was made by the scores {path}, which {found}: put them back, or run 'sparc3 "
                "compress' again.",
            )
        return scores

    def _check(self) -> None:
        """Raise ValueError or OSError unless the list can be written into this checkpoint; no weight is read."""
        self.list.check_checkpoint(self.checkpoint, self.neurons)
        check(self.checkpoint.skeleton(), self.list.neurons)
        modules: dict[Granularity, list[str]] = defaultdict(list)
        for kind, module in by_layer(self.list.neurons):
            modules[kind].append(module)
        dtype, has_means = export_dtype_of(self.export_dtype), any(neuron.mean for neuron in self.list.neurons)
        for kind, found in modules.items():
            means = has_means and kind == "neuron"
            check_export(self.checkpoint, found, kind, self.export, dtype=dtype, with_means=means)

    def _results(self, exported: Exported) -> tuple[Results, Path] | None:
        """Return the results of an evaluation of these neurons, and their folder; None if there are none.

        Raises:
            ValueError: If those that were asked for are damaged, or of other neurons.
        """
        if self.results is not None:
            results = Results.load(self.results)
            if not exported.is_of(results):
                raise OptionError(
                    "results",
                    f": {self.results} is not an evaluation of {self.neurons}: give the results.json of 'sparc3 "
                    "evaluate' with these neurons.",
                )
            return results, self.results.parent
        for folder in dict.fromkeys((self.neurons.parent, self.export.parent)):
            if (folder / RESULTS).is_file():
                try:
                    results = Results.load(folder / RESULTS)
                except ValueError as error:
                    rank_zero_warn(for_terminal(f"The model card tells no results: {error}"))
                    continue
                if exported.is_of(results):
                    return results, folder
        return None

    def _push(self, repository: str) -> str:
        """Upload the export as one commit of a new repository, and return its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            address = api.create_repo(repository, private=self.private)
            api.upload_folder(
                repo_id=repository, folder_path=self.export, commit_message=f"Add {self.export.resolve().name}"
            )
        except Exception as error:  # whatever its HTTP client raises
            command = ["hf", "upload", repository, str(self.export), *(["--private"] if self.private else [])]
            raise OSError(
                f"The checkpoint is complete in {self.export}, but was not uploaded ({first_line(error):.200}): run "
                f"{for_shell(command)}"
            ) from error
        return str(address)


def _compression(path: Path) -> SparsityResults | None:
    """Return the content of a sparsity.json; None of any other file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # the one who reads it says so
    if not isinstance(content, dict) or not {"masks", "pattern"} <= content.keys():
        return None
    try:
        return SparsityResults.load(path)
    except ValueError as error:
        raise OptionError("neurons", f": {str(error).rstrip('.')}. Run 'sparc3 compress' again.") from None


def _check_id(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(
            "push_to_hub", f"must be the id of a repository, such as ann/my-model, got {name!r} ({first_line(error)})."
        ) from None


def _check_can_push(name: str) -> str:
    """Return the whole id of a repository, unless it cannot be made.

    Raises:
        OSError: If there is no token, the hub cannot be reached, or the repository exists.
        ValueError: If the token may not make it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        who = api.whoami()
        mine = [who["name"], *(one["name"] for one in who.get("orgs", ()))]
        whole = name if "/" in name else f"{who['name']}/{name}"
        is_there = api.repo_exists(whole)
    except LocalTokenNotFoundError:
        raise OSError("--model.push_to_hub needs a token of the hub: run 'hf auth login' or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        raise OSError(
            f"--model.push_to_hub {name}: the hub answered: {first_line(error):.200} If that is about the token, run "
            "'hf auth login' or set HF_TOKEN."
        ) from None
    except Exception as error:  # whatever its HTTP client raises
        raise OSError(
            f"--model.push_to_hub {name}: the hub cannot be reached ({first_line(error):.200}): export without it, and "
            "run 'hf upload' where there is a network."
        ) from None
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if whole.partition("/")[0] not in mine or role == "read":
        may = "which may only read" if role == "read" else f"who may write to {', '.join(mine)}"
        raise OptionError("push_to_hub", f": {whole} cannot be made with this token of {who['name']}, {may}.")
    if is_there:
        raise OptionFileExistsError("push_to_hub", f": {whole} exists already; nothing was overwritten.")
    return whole
