"""Why a repository of the hub could not be had: one sentence with the way out."""

PICKLED = (
    "has no *.safetensors file. Pickled weights (*.bin) are never loaded: convert them with save_pretrained on a "
    "machine that trusts them."
)


def explain_hub_error(checkpoint: str, error: Exception) -> str:
    """Put the failure to get a hub repository into one sentence with the way out."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = " ".join(str(cause) for cause in causes)

    def is_any(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    # The classes come first: the hub's message for a repository that does not exist mentions gated ones too, and the
    # address of every file holds "/resolve/".
    is_missing = is_any(RepositoryNotFoundError) and not is_any(GatedRepoError)
    if is_any(GatedRepoError) or ("gated repo" in text and not is_missing):
        return (
            f"{checkpoint!r} is gated: accept its licence on its page at the hub, then run 'hf auth login' or set "
            "HF_TOKEN."
        )
    if is_missing or "not a valid model identifier" in text:
        return f"{checkpoint!r} is neither a folder here nor a repository at the hub (or it is private: set HF_TOKEN)."
    if is_any(RevisionNotFoundError) or "not a valid git identifier" in text:
        return f"{checkpoint!r} has no such branch, tag or commit at the hub: correct --model.revision."
    if "cannot be loaded with `safetensors`" in text:
        return f"{checkpoint!r} {PICKLED}"
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        return f"{checkpoint!r} could not be loaded, the hub answered: {' '.join(str(answer).split()):.200}"
    if "connect" in text or "offline" in text.lower() or "name resolution" in text:
        return (
            f"{checkpoint!r} is not on this machine and the hub cannot be reached: run 'sparc3 prepare' where there is "
            "a network, or give the path of a local checkpoint folder."
        )
    return f"{checkpoint!r} could not be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
