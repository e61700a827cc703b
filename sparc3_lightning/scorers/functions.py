"""Scorers that are a function of an installed package."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.provenance import contents
from sparc3_lightning.scorers.base import Scorer

OF_PYTHON = (
    "is of Python's own library, which holds no scorers but what runs commands and writes files: name a function of an "
    "installed package."
)


class FunctionScorer(Scorer):
    """Toxicity by a function of an installed package, such as ``profanity_check:predict_prob``.

    Args:
        name: ``package.module:function``. It takes a list of texts and returns as many numbers in [0, 1].
        device: Not used.

    Raises:
        ValueError: If there is no such function, or it is of Python's own library.
    """

    form = "package.module:function"
    what = "a function"

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        super().__init__(name)
        module, _, function = name.partition(":")
        if _is_of_python(module):
            raise ValueError(f"The scorer {name!r} {OF_PYTHON}")
        try:
            found = getattr(import_module(module), function)
        except Exception as error:  # whatever a module does when it is imported
            why = f"{type(error).__name__}: {error!s:.200}"
            raise ValueError(f"The scorer {name!r} cannot be imported: {why}") from error
        if not callable(found):
            raise ValueError(f"The scorer {name!r} is not a function but {type(found).__name__}.")
        if any(_is_of_python(home) for home in _homes(found)):
            raise ValueError(f"The scorer {name!r} {OF_PYTHON}")
        self._function: Callable[[list[str]], Iterable[float]] = found
        self._has_scored = False

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name has the form ``package.module:function``."""
        module, _, function = name.partition(":")
        return function.isidentifier() and all(part.isidentifier() for part in module.split("."))

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise OptionError if the package is Python's own, or is not installed; it is not imported."""
        package = name.partition(":")[0].partition(".")[0]
        if _is_of_python(package):
            raise OptionError(option, f": {name!r} {OF_PYTHON}")
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
        installed = {f"{found} {version(found)}" for found in _distributions().get(package, ())}
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

    @classmethod
    def is_same(cls, name: str, fingerprint: str, other: str, of_other: str | None) -> bool:
        """Tell whether two names are of one function, as where a package hands on what a module of it has.

        Only a function of the same package is imported to find that out.
        """
        if not cls.takes(other):
            return super().is_same(name, fingerprint, other, of_other)
        if name == other or name.partition(":")[0].partition(".")[0] != other.partition(":")[0].partition(".")[0]:
            return name == other
        try:
            first, second = (inspect.unwrap(cls(one)._function) for one in (name, other))
        except ValueError:
            return False
        return first is second

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where the function gave none, or raises on that text.

        Raises:
            ValueError: If the function raises on every text, and has scored none before; or returns anything but as
                many numbers in [0, 1].
        """
        if not texts:
            return []
        try:
            scores = self._called(texts)
        except ValueError:
            alone = [self._called_alone(text) for text in texts] if len(texts) > 1 else [None]
            if not self._has_scored and all(score is None for score in alone):
                raise
            scores = [math.nan if score is None else score for score in alone]
        if len(scores) != len(texts):
            raise ValueError(f"{self.name} returned {len(scores)} values for {len(texts)} texts.")
        outside = [score for score in scores if math.isfinite(score) and not 0 <= score <= 1]
        if outside:
            raise ValueError(f"{self.name} must return numbers in [0, 1], but returned {outside[0]}.")
        self._has_scored |= any(map(math.isfinite, scores))
        return [score if math.isfinite(score) else math.nan for score in scores]

    def _called(self, texts: Sequence[str]) -> list[float]:
        try:
            values = self._function(list(texts))
            if isinstance(values, str | bytes | Mapping):
                raise TypeError(f"it returned a {type(values).__name__}, not a list of numbers")
            return [_number(value) for value in values]
        except Exception as error:  # it is code of others
            raise ValueError(f"{self.name} failed: {type(error).__name__}: {error!s:.200}") from error

    def _called_alone(self, text: str) -> float | None:
        """Return the score of one text; None if the function raises on it."""
        try:
            (score,) = self._called([text])
        except ValueError:
            return None
        return score


def _number(value: object) -> float:
    """Return a number, or an array or tensor of one; text is none."""
    if isinstance(value, Real) or (hasattr(value, "__float__") and not isinstance(value, str | bytes)):
        return float(value)
    raise TypeError(f"it returned {value!r:.40} for a text, not a number")


@cache  # it reads what every installed package consists of, which takes a second
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _is_of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _homes(function: Callable[..., object]) -> Iterable[str]:
    """Return the modules that a function comes from, and what it wraps."""
    while isinstance(function, partial):
        function = function.func
    for found in (function, inspect.unwrap(function)):
        home = getattr(found, "__module__", None)
        if home is None:  # a method of C, of a module or of an object
            owner = getattr(found, "__self__", found)
            home = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
        yield home
