"""Find the neurons of a language model that carry an unwanted behaviour, switch them off, and prove what changed."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ returns, for type checkers
    from sparc3_lightning.attribution.lrp import lrp as lrp
    from sparc3_lightning.attribution.scores import ScoreFile as ScoreFile
    from sparc3_lightning.evaluation.keyed_noise import KeyedNoise as KeyedNoise
    from sparc3_lightning.evaluation.results import Results as Results
    from sparc3_lightning.models.checkpoints import load_model as load_model
    from sparc3_lightning.models.components import Component as Component
    from sparc3_lightning.models.components import mask as mask
    from sparc3_lightning.models.components import prune_ as prune_
    from sparc3_lightning.scorers.registry import load_scorer as load_scorer
    from sparc3_lightning.selection.criteria import select_neurons as select_neurons
    from sparc3_lightning.selection.neuron_list import NeuronList as NeuronList
    from sparc3_lightning.stages.attribute import Attribution as Attribution
    from sparc3_lightning.stages.chat import Chat as Chat
    from sparc3_lightning.stages.circuit import Circuit as Circuit
    from sparc3_lightning.stages.compare import Comparison as Comparison
    from sparc3_lightning.stages.compress import Compression as Compression
    from sparc3_lightning.stages.evaluate import Evaluation as Evaluation
    from sparc3_lightning.stages.experiment import Experiment as Experiment
    from sparc3_lightning.stages.export import Export as Export
    from sparc3_lightning.stages.prune import Pruning as Pruning
    from sparc3_lightning.stages.stress import Stress as Stress
    from sparc3_lightning.stages.sweep import Sweep as Sweep

# Where each public name lives; it is imported when it is asked for, so that the package alone costs no torch.
_HOME = {
    "Attribution": "stages.attribute",
    "Pruning": "stages.prune",
    "Evaluation": "stages.evaluate",
    "Sweep": "stages.sweep",
    "Stress": "stages.stress",
    "Comparison": "stages.compare",
    "Compression": "stages.compress",
    "Circuit": "stages.circuit",
    "Export": "stages.export",
    "Chat": "stages.chat",
    "Experiment": "stages.experiment",
    "lrp": "attribution.lrp",
    "KeyedNoise": "evaluation.keyed_noise",
    "mask": "models.components",
    "prune_": "models.components",
    "Component": "models.components",
    "load_model": "models.checkpoints",
    "load_scorer": "scorers.registry",
    "select_neurons": "selection.criteria",
    "ScoreFile": "attribution.scores",
    "NeuronList": "selection.neuron_list",
    "Results": "evaluation.results",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
