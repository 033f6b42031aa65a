"""The one error that people see: what was wanted, what came, where, and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something a person gave us cannot be used. The command line prints it alone and exits with code 2."""

    def _render_traceback_(self) -> list[str]:
        """What notebooks show: the message alone too. (A method that IPython asks for.)"""
        return [f"funmatch: {self}"]


class WorkFailed(Exception):
    """The work was done, and nothing came of it. The command line prints it alone and exits with code 1."""


Fruitless = WorkFailed
"""The name that this error had first."""


def unknown(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> InputError:
    """An `InputError` for a name that is not known, with the near ones.

    Args:
        kind: what was looked for, in the words of the field ("model", "data set").
        name: what came.
        known: every name that would have done.
        hint: what else could have been meant, one sentence.
    """
    known = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    near = [lowered[match] for match in get_close_matches(name.lower(), lowered, n=5, cutoff=0.6)]
    words = [f"unknown {kind} {name!r}"]
    if near:
        words.append(f"did you mean {', '.join(map(repr, near))}?")
    if len(known) <= 20:
        words.append(f"known: {', '.join(known)}")
    if hint:
        words.append(hint)
    return InputError("; ".join(words))


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of an accelerator or of the machine."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported for this
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
