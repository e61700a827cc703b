"""Scorers that are a function of an installed package."""

import math
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.provenance import contents
from sparc3_lightning.scorers.base import Scorer


class FunctionScorer(Scorer):
    """Toxicity by a function of an installed package, such as ``profanity_check:predict_prob``.

    Args:
        name: ``package.module:function``. It takes a list of texts and returns as many numbers in [0, 1].
        device: Not used.

    Raises:
        ValueError: If there is no such function.
    """

    form = "package.module:function"

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        super().__init__(name)
        module, _, function = name.partition(":")
        try:
            found = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"The scorer {name!r} cannot be imported: {error}") from None
        if not callable(found):
            raise ValueError(f"The scorer {name!r} is not a function but {type(found).__name__}.")
        self._function: Callable[[list[str]], Iterable[float]] = found

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name has the form ``package.module:function``."""
        module, _, function = name.partition(":")
        return function.isidentifier() and all(part.isidentifier() for part in module.split("."))

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise OptionError unless the package is installed; it is not imported."""
        package = name.partition(":")[0].partition(".")[0]
        if find_spec(package) is None:
            raise OptionError(option, f": {name!r} needs the package {package!r}, which is not installed.")

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a function from another of the same name: its module's source, and its package's version.

        Of a package that was not installed all of its files count.

        Raises:
            ValueError: If the module cannot be found.
        """
        module = name.partition(":")[0]
        package = module.partition(".")[0]
        installed = {f"{found} {version(found)}" for found in packages_distributions().get(package, ())}
        try:
            specs = [find_spec(module), find_spec(package)]
        except ImportError as error:
            raise ValueError(f"The scorer {name!r} cannot be imported: {error}") from None
        sources = {Path(spec.origin) for spec in specs if spec and spec.origin and Path(spec.origin).is_file()}
        if not installed:
            folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
            inside = (path for folder in folders for path in folder.rglob("*") if path.is_file())
            sources |= {path for path in inside if "__pycache__" not in path.parts}
        return f"{name} {contents(sources)} {sorted(installed)}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where the function gave none.

        Raises:
            ValueError: If the function returns another number of values, or one outside [0, 1].
        """
        if not texts:
            return []
        scores = [float(value) for value in self._function(list(texts))]
        if len(scores) != len(texts):
            raise ValueError(f"{self.name} returned {len(scores)} values for {len(texts)} texts.")
        outside = [score for score in scores if math.isfinite(score) and not 0 <= score <= 1]
        if outside:
            raise ValueError(f"{self.name} must return numbers in [0, 1], but returned {outside[0]}.")
        return [score if math.isfinite(score) else math.nan for score in scores]
