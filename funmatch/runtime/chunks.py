"""Splits a number of rows into chunks of even size."""


def even_chunks(count: int, size: int | None) -> list[int]:
    """Splits `count` rows into the fewest chunks of at most `size` rows, as even as possible.

    Args:
        count: rows, at least 1.
        size: largest chunk, or None for a single chunk.

    Returns:
        the boundaries 0, …, `count`; chunk i is rows [i] to [i + 1].
    """
    # Even rather than full chunks with a remainder: BatchNorm in training mode fails on a last chunk of one image.
    chunks = -(-count // (size or count))
    return [count * number // chunks for number in range(chunks + 1)]
