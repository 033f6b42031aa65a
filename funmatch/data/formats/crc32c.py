"""CRC-32C, the checksum of TensorFlow's files, by the fastest library that is there or by numpy alone."""

from collections.abc import Callable

import numpy as np

BLOCK = 256  # bytes that the table takes a lane at a time
POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
MASK_DELTA = 0xA282EAD8


def _table() -> np.ndarray:
    """CRC-32C of every byte, (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return table


TABLE = _table()


def crc32c_by_table(data: bytes, crc: int = 0) -> int:
    """CRC-32C without a library: numpy walks many lanes of the data side by side, then joins their remainders.

    Args:
        data: any number of bytes.
        crc: of what stands before them.
    """
    crc ^= 0xFFFFFFFF
    lanes = len(data) // BLOCK
    if lanes > 1:
        block = np.frombuffer(data, np.uint8, lanes * BLOCK).reshape(lanes, BLOCK)
        remainders = np.zeros(lanes, np.uint32)
        remainders[0] = crc
        for column in block.T:
            remainders = TABLE[(remainders ^ column) & 0xFF] ^ (remainders >> 8)
        crc = _joined(remainders)
        data = data[lanes * BLOCK :]
    for byte in data:
        crc = int(TABLE[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _joined(remainders: np.ndarray) -> int:
    """The remainder of consecutive blocks together: two neighbours at a time, the first moved past the second."""
    shift = _shift_of_a_block()
    while len(remainders) > 1:
        if len(remainders) % 2:  # a block of zeros in front changes nothing
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _moved(shift, remainders[0::2]) ^ remainders[1::2]
        shift = _moved(shift, shift)
    return int(remainders[0])


def _shift_of_a_block() -> np.ndarray:
    """What a block of zeros does to each bit of a remainder, (32,) uint32: the move is linear over bits."""
    moved = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(BLOCK):
        moved = TABLE[moved & 0xFF] ^ (moved >> 8)
    return moved


def _moved(shift: np.ndarray, remainders: np.ndarray) -> np.ndarray:
    bits = (remainders[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits, shift, np.uint32(0)), axis=1)


def _fastest() -> Callable[[bytes, int], int]:
    try:
        import google_crc32c

        if google_crc32c.implementation == "c":
            return lambda data, crc: google_crc32c.extend(crc, data)
    except ImportError:
        pass
    try:
        from crc32c import crc32c  # pyrefly: ignore[missing-import]
    except ImportError:
        return crc32c_by_table
    return crc32c


_extended = _fastest()


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC-32C of bytes that follow those whose checksum is `crc`."""
    return _extended(data, crc)


def mask(crc: int) -> int:
    """A checksum as it stands in a file: turned and shifted, so that a checksum of checksums is safe."""
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum of some bytes as it stands in a file."""
    return mask(crc32c(data))
