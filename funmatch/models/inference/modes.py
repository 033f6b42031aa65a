"""Defines how a frozen network may compute: folded, in which precision and layout, compiled, with native kernels."""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATER_FIELDS = ("packed", "sums", "fp32_layers")
"""Fields of `InferenceMode` that records of earlier versions do not have."""
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class InferenceMode:
    """How a frozen classifier computes.

    Attributes:
        folded: weight standardization and BatchNorm are folded into its kernels.
        precision: fp32, bf16 or fp16; the head is fp32 in any.
        layout: memory layout of images, channels_last or contiguous.
        compiled: by `torch.compile`, for batches of the size of the first one.
        native: GroupNorms are computed by the native CPU kernels where these are available.
        packed: weights are laid out once for oneDNN on the CPU, with activations computed by its kernels
            (`native.packed`), and attention in 16 bits is computed by matrix products (`ops.native.attention`).
        sums: packed convolutions add the shortcuts of their blocks (`native.sums`).
        fp32_layers: names of modules of the (folded) network that compute in fp32 while the others do in 16 bits.
    """

    # Runs record these fields in config.json and read them back by name.
    folded: bool = True
    precision: str = "fp32"
    layout: str = "channels_last"
    compiled: bool = False
    native: bool = False
    packed: bool = False
    sums: bool = False
    fp32_layers: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """The mode as runs record it, as JSON has it."""
        found = {**vars(self), "fp32_layers": [*self.fp32_layers]}
        # Later fields are missing where there is nothing to say, as in earlier records: caches hold it in their keys.
        return {name: value for name, value in found.items() if value or name not in LATER_FIELDS}

    def __str__(self) -> str:
        flags = {
            "compiled": self.compiled, "native kernels": self.native, "packed weights": self.packed,
            "fused sums": self.sums,
        }  # fmt: skip
        words = [self.precision, self.layout.replace("_", " "), *(name for name, is_on in flags.items() if is_on)]
        if self.fp32_layers:
            words.append(f"{', '.join(self.fp32_layers)} in fp32")
        return ", ".join(["folded", *words] if self.folded else words)

    def is_allowed(self, allowed: "AllowedModes") -> bool:
        """Returns whether this is a valid mode and one that is allowed; a record read from disk may be damaged."""
        kernels = ("compiled", "native", "packed", "sums")
        has_flags = all(isinstance(getattr(self, name), bool) for name in ("folded", *kernels))
        has_words = isinstance(self.precision, str) and isinstance(self.layout, str)
        # fp32 is what all fall back to, unless a precision was requested, which is then the only one.
        precisions = allowed.precisions if len(allowed.precisions) == 1 else ("fp32", *allowed.precisions)
        has_kernels = all(getattr(self, name) <= getattr(allowed, name) for name in kernels)
        has_layers = not self.fp32_layers or (self.precision != "fp32" and not self.compiled)
        return has_flags and has_words and has_kernels and has_layers and self._is_known(precisions)

    def _is_known(self, precisions: tuple[str, ...]) -> bool:
        return self.precision in precisions and self.layout in LAYOUTS


PLAIN = InferenceMode(folded=False)


@dataclass(frozen=True)
class AllowedModes:
    """Which modes a teacher may take.

    Attributes:
        precisions: the precisions that the machine is fast in, of which the fastest that passes is taken; a single one
            is taken even if it fails the check.
        compiled: try `torch.compile`.
        native: try the native kernels for GroupNorm.
        packed: try packed weights.
        sums: let packed convolutions add shortcuts.
        first: the mode that was best on this machine before; it is tried first.
    """

    precisions: tuple[str, ...] = ("fp32",)
    compiled: bool = False
    native: bool = False
    packed: bool = False
    sums: bool = False
    first: InferenceMode | None = None
