"""Cuts a number of rows into even chunks."""


def even_chunks(count: int, size: int | None) -> list[int]:
    """Where so many images are cut into the fewest pieces of at most `size`, as even as can be: 0, …, count.

    Even, since BatchNorm has no statistics of a last piece of one image.
    """
    pieces = -(-count // (size or count))
    return [count * number // pieces for number in range(pieces + 1)]
