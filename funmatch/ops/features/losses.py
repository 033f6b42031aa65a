"""Computes the distances between the student's and the teacher's features, one number an image.

Features are (n, d), or tokens (n, tokens, d), of which the mean over the tokens counts; the student's are projected to
the teacher's dimensions before. All are computed in float32, whatever the networks compute in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes 1 − cos(s, t), (n,), in [0, 2]; a feature of zeros has a cosine of 0.

    Args:
        student, teacher: (n, d) or (n, tokens, d).
    """
    return _per_image(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1))


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes ‖s − t‖² / d, (n,): the mean over dimensions, so that wide teachers do not weigh more.

    Args:
        student, teacher: (n, d) or (n, tokens, d).
    """
    # float32 first: in fp16 the square of a difference beyond 255 is infinite.
    return _per_image((student.float() - teacher.float()).square().mean(-1))


def normalize(features: Tensor) -> Tensor:
    """Scales features, (n, d), to length 1 in float32; rows of zeros, or that are not finite, become zeros."""
    return F.normalize(features.float(), dim=-1).nan_to_num(0.0, 0.0, 0.0)


def queue_kl(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Computes KL(p ‖ q) of similarities to a queue of embeddings that the teacher gave to earlier images, (n,).

    p = softmax(t · Qᵀ / τ) and q = softmax(s · Qᵀ / τ), with s and t of length 1: the student places an image among
    others as the teacher does, not necessarily at the same point (Fang et al., "SEED: self-supervised distillation for
    visual representation", 2021, equations 3 and 4; Abbasi Koohpayegani et al., "CompRess", 2020, which has one
    temperature for both, as here).

    Args:
        student, teacher: (n, d).
        queue: (m, d), rows of length 1; of an empty one the distance is 0.
        temperature: τ > 0.
    """
    if not len(queue):
        # Not a constant: a loss without a graph has no gradient to add up.
        return (student.float() * 0).sum(-1)
    return _kl_of_similarities(normalize(student) @ queue.T, normalize(teacher) @ queue.T, temperature)


def batch_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Computes KL(p ‖ q) of the similarities of each image to the others of its batch, (n,).

    p of the teacher's embeddings among each other, q of the student's, each a softmax at τ over all images but the own
    (Passalis and Tefas, "Learning deep representations with probabilistic knowledge transfer", 2018, with the cosine as
    kernel; compare Tung and Mori, "Similarity-preserving knowledge distillation", 2019).

    Args:
        student, teacher: (n, d); of a single image the distance is 0.
        temperature: τ > 0.
    """
    count = len(student)
    if count < 2:
        return (student.float() * 0).sum(-1)
    # Without the diagonal: an image is its own nearest, and would leave the others nearly no probability.
    others = ~torch.eye(count, dtype=torch.bool, device=student.device)
    own, target = (
        (embeddings @ embeddings.T)[others].view(count, count - 1)
        for embeddings in (normalize(student), normalize(teacher))
    )
    return _kl_of_similarities(own, target, temperature)


def _kl_of_similarities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    own, target = ((similarities / temperature).log_softmax(-1) for similarities in (student, teacher))
    return F.kl_div(own, target, reduction="none", log_target=True).sum(-1)


def _per_image(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.mean(-1)
