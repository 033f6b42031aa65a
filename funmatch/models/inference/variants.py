"""Orders the inference modes that are tried: variants of what failed in 16 bits come before modes of fp32."""

from collections.abc import Callable, Iterable, Iterator

from funmatch.models.inference.modes import InferenceMode
from funmatch.models.inference.parity import ParityCheck


def with_variants(
    modes: Iterator[InferenceMode],
    checks: list[ParityCheck],
    variants: Callable[[InferenceMode], Iterable[InferenceMode]],
) -> Iterator[InferenceMode]:
    """Yields modes; before the first of fp32, the variants of one that failed in each precision of 16 bits.

    Args:
        checks: of the modes that were yielded before.
    """
    done: set[str] = {"fp32"}
    for mode in modes:
        failed = [check.mode for check in checks if not check.failed and not check.mode.compiled]
        # The fastest of each precision: the others compute with the same rounding.
        for each in failed if mode.precision == "fp32" else ():
            if each.precision not in done and not each.fp32_layers:
                done.add(each.precision)
                yield from variants(each)
        yield mode
