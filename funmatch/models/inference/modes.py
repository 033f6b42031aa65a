"""Defines how a frozen network may compute: folded, in which precision and layout, compiled, with native kernels."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
            (`packed_layers`), and attention in 16 bits is computed by matrix products (`ops.native.attention`).
    """

    # Runs record these fields in config.json and read them back by name.
    folded: bool = True
    precision: str = "fp32"
    layout: str = "channels_last"
    compiled: bool = False
    native: bool = False
    packed: bool = False

    def __str__(self) -> str:
        flags = {"compiled": self.compiled, "native kernels": self.native, "packed weights": self.packed}
        words = [self.precision, self.layout.replace("_", " "), *(name for name, is_on in flags.items() if is_on)]
        return ", ".join(["folded", *words] if self.folded else words)

    def is_allowed(self, allowed: "AllowedModes") -> bool:
        """Returns whether this is a valid mode and one that is allowed; a record read from disk may be damaged."""
        has_flags = all(isinstance(flag, bool) for flag in (self.folded, self.compiled, self.native, self.packed))
        has_words = isinstance(self.precision, str) and isinstance(self.layout, str)
        # fp32 is what all fall back to, unless a precision was requested, which is then the only one.
        precisions = allowed.precisions if len(allowed.precisions) == 1 else ("fp32", *allowed.precisions)
        has_kernels = all(getattr(self, name) <= getattr(allowed, name) for name in ("compiled", "native", "packed"))
        return has_flags and has_words and has_kernels and self.precision in precisions and self.layout in LAYOUTS


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
        first: the mode that was best on this machine before; it is tried first.
    """

    precisions: tuple[str, ...] = ("fp32",)
    compiled: bool = False
    native: bool = False
    packed: bool = False
    first: InferenceMode | None = None
