"""Computes CRC-32C, the checksum of TensorFlow's files, with the fastest library installed or numpy alone."""

from collections.abc import Callable

import numpy as np

BLOCK = 256  # bytes per lane of `crc32c_by_table`
POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
MASK_DELTA = 0xA282EAD8


def _make_table() -> np.ndarray:
    """Returns the CRC-32C of every byte, (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return table


TABLE = _make_table()


def crc32c_by_table(data: bytes, crc: int = 0) -> int:
    """Computes CRC-32C without a library: numpy runs over many lanes of the data at once, then joins their remainders.

    Args:
        data: any number of bytes.
        crc: of the bytes before them.
    """
    # A Python loop over bytes would take longer than decoding the images; only the last few bytes are left to one.
    crc ^= 0xFFFFFFFF
    lanes = len(data) // BLOCK
    if lanes > 1:
        block = np.frombuffer(data, np.uint8, lanes * BLOCK).reshape(lanes, BLOCK)
        remainders = np.zeros(lanes, np.uint32)
        remainders[0] = crc
        for column in block.T:
            remainders = TABLE[(remainders ^ column) & 0xFF] ^ (remainders >> 8)
        crc = _join(remainders)
        data = data[lanes * BLOCK :]
    for byte in data:
        crc = int(TABLE[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _join(remainders: np.ndarray) -> int:
    """Joins the remainders of consecutive blocks, pairwise: the first of two is shifted past the second."""
    shift = _block_shift()
    while len(remainders) > 1:
        # A block of zeros in front changes nothing: the remainder of zeros from zero is zero.
        if len(remainders) % 2:
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _apply_shift(shift, remainders[0::2]) ^ remainders[1::2]
        # Each round joins blocks of twice the length, so the shift is applied to itself.
        shift = _apply_shift(shift, shift)
    return int(remainders[0])


def _block_shift() -> np.ndarray:
    """Returns the effect of a block of zeros on each bit of a remainder, (32,) uint32; shifts are linear over bits."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(BLOCK):
        columns = TABLE[columns & 0xFF] ^ (columns >> 8)
    return columns


def _apply_shift(shift: np.ndarray, remainders: np.ndarray) -> np.ndarray:
    """Multiplies a shift, a 32 × 32 matrix of bits, by remainders, (n,) uint32."""
    bits = (remainders[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits, shift, np.uint32(0)), axis=1)


def _fastest() -> Callable[[bytes, int], int]:
    try:
        import google_crc32c

        # Without its C extension, this library is slower than the table above.
        if google_crc32c.implementation == "c":
            return lambda data, crc: google_crc32c.extend(crc, data)
    except ImportError:
        pass
    try:
        from crc32c import crc32c  # pyrefly: ignore[missing-import]
    except ImportError:
        return crc32c_by_table
    return crc32c


_extend = _fastest()


def crc32c(data: bytes, crc: int = 0) -> int:
    """Returns the CRC-32C of bytes that follow others with the checksum `crc`."""
    return _extend(data, crc)


def mask(crc: int) -> int:
    """Masks a checksum as TensorFlow stores it."""
    # The CRC of data that contains its own CRC is weak, and a bundle's checksums cover other checksums.
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Returns the masked checksum of some bytes."""
    return mask(crc32c(data))
