"""Errors about an option: pure code names its parameter, and a verb adds the group in which the parameter stands."""


class OptionError(ValueError):
    """An option is missing, or has a value that cannot be used.

    Args:
        option: Name of the parameter without its group, such as ``num_neurons``. A field of a dataclass, whose options
            are a group within that group, has both names: ``sampling.top_p``.
        reason: What is wrong, and the way out. ``--.name`` is an option of the same group. A reason that names its own
            option so is a whole sentence; any other goes on after the name of the option: ``must be at least 1``.
        group: Group of the option on the command line.

    Example:
        >>> error = OptionError("top_p", "must be below 1: raise --.temperature.")
        >>> str(error)
        '--model.top_p must be below 1: raise --model.temperature.'
        >>> str(error.of("evaluate"))
        '--evaluate.top_p must be below 1: raise --evaluate.temperature.'
        >>> str(OptionError("sampling.top_p", "must be below 1: raise --.sampling.temperature."))
        '--model.sampling.top_p must be below 1: raise --model.sampling.temperature.'
    """

    def __init__(self, option: str, reason: str, group: str = "model") -> None:
        super().__init__(option, reason, group)
        self.option = option
        self.reason = reason
        self.group = group

    def __str__(self) -> str:
        own = f"--.{self.option}"
        between = "" if self.reason.startswith(":") else " "
        text = self.reason if own in self.reason else f"{own}{between}{self.reason}"
        return text.replace("--.", f"--{self.group}.")

    def of(self, group: str) -> "OptionError":
        """Return the same error about the option of another group."""
        return type(self)(self.option, self.reason, group)


class OptionFileNotFoundError(OptionError, FileNotFoundError):
    """An option names a file or folder that does not exist."""


class OptionFileExistsError(OptionError, FileExistsError):
    """An option names a file or folder that would be overwritten."""
