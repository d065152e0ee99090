"""Turns errors of libraries that load models into one sentence for the user."""

from __future__ import annotations

from esparse.errors import Mistake

LONGEST_SAID = 400  # most characters of a library's message in ours


def explained(
    asked: str,
    is_local: bool,
    error: Exception,
    what: str = "model",
    *,
    with_code: str = "read it, and allow it with model.trust_remote_code=true",
    offline: str = "copy the model here and name its directory: model=hf model.path=DIR",
) -> Exception:
    """An error with the library's message (shortened), what was asked for, and what to do.

    `with_code`, `offline`: what to do about Python code in the model, and without internet.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    needs_code = "trust_remote_code" in reason
    reason = reason if len(reason) <= LONGEST_SAID else f"{reason[:LONGEST_SAID]}..."
    if needs_code:
        return Mistake(f"the {what} in {asked} has Python code of its own: {with_code}")
    if isinstance(error, ImportError):
        return Mistake(f"the {what} in {asked} needs a package that is not there: {reason}")
    if isinstance(error, LookupError | AttributeError | TypeError):  # of a reader that did not foresee what it found
        reason += f" ({type(error).__name__} in transformers): one of its files is damaged or of another kind"
    if is_local:
        return Mistake(f"the {what} in {asked} cannot be loaded: {reason}")
    if not isinstance(error, OSError):
        return Mistake(f"the {what} {asked} cannot be loaded: {reason}")
    return ConnectionError(
        f"{asked} is neither a local directory nor in reach on the Hugging Face hub ({reason}); without internet, "
        f"{offline}"
    )
