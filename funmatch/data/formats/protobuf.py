"""Reads and writes the wire format of protocol buffers without a schema: a message is a row of numbered fields."""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are obsolete

Fields = dict[int, list[int | bytes]]


class Damaged(ValueError):
    """Raised for bytes that are not a protocol buffer message."""


def varint(message: bytes, start: int, stop: int) -> tuple[int, int]:
    """Reads a number of seven bits a byte; returns it and the position after it."""
    value, shift = 0, 0
    # At most ten bytes, which hold 64 bits: damaged data must not make us read on and on.
    while start < stop and shift < 70:
        byte = message[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise Damaged("a number is cut off")


def fields(message: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the fields between two positions as (number, wire type, start, stop of the content).

    Raises:
        Damaged: these bytes are not fields.
    """
    while start < stop:
        key, start = varint(message, start, stop)
        wire = key & 7
        if wire == BYTES:
            length, start = varint(message, start, stop)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        elif wire == VARINT:
            _, end = varint(message, start, stop)
            length = end - start
        else:
            # Groups end here too: they have no length to skip by, and no format that we read has any.
            raise Damaged("unknown wire type")
        # Positions instead of slices: a message may be a gigabyte, and each copy of it would be another.
        if start + length > stop:
            raise Damaged("a field is cut off")
        yield key >> 3, wire, start, start + length
        start += length


def parts(message: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields the strings and messages among the fields as (number, start, stop); numbers are skipped."""
    for number, wire, a, b in fields(message, start, stop):
        if wire == BYTES:
            yield number, a, b


def parse(message: bytes) -> Fields:
    """Reads all values by the number of their field: strings and messages as bytes, numbers unsigned.

    Raises:
        Damaged: it is not a message.
    """
    values: Fields = {}
    for number, wire, a, b in fields(message, 0, len(message)):
        if wire == VARINT:
            value: int | bytes = varint(message, a, b)[0]
        else:
            # A number of fixed width may be a float, as only a schema says: callers that expect one decode its bits.
            value = message[a:b] if wire == BYTES else int.from_bytes(message[a:b], "little")
        values.setdefault(number, []).append(value)
    return values


def messages(found: Fields, field: int) -> list[bytes]:
    """Returns the strings or messages of a field, in order.

    Raises:
        Damaged: the field holds a number.
    """
    values = found.get(field, [])
    # A field has one type, so a single number among them shows that the message is of another schema.
    if not all(isinstance(value, bytes) for value in values):
        raise Damaged(f"field {field} holds a number, not a message")
    return [value for value in values if isinstance(value, bytes)]


def text(found: Fields, field: int) -> str:
    """Returns the string of a field, empty where it is left out."""
    values = messages(found, field)
    # The last one counts where a field that should be single is repeated, as the format says.
    return values[-1].decode(errors="replace") if values else ""


def number(found: Fields, field: int) -> int:
    """Returns the number of a field, 0 where it is left out.

    Raises:
        Damaged: the field holds a message.
    """
    value = found.get(field, [0])[-1]
    if not isinstance(value, int):
        raise Damaged(f"field {field} holds a message, not a number")
    return value


def write_fields(field: int, content: bytes) -> bytes:
    """Encodes a field that holds a string or a message."""
    return write_varint(field << 3 | BYTES) + write_varint(len(content)) + content


def write_varint(value: int) -> bytes:
    """Encodes a number of up to 64 bits, negative ones as two's complement."""
    # Ten bytes for -1: the type int64 is not zigzag-encoded.
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
