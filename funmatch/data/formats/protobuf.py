"""The wire format of protocol buffers, without any schema: a message is a row of numbered fields."""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are of the past

Fields = dict[int, list[int | bytes]]


class Damaged(ValueError):
    """Bytes that are no protocol buffer message."""


def varint(message: bytes, start: int, stop: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value, shift = 0, 0
    while start < stop and shift < 70:
        byte = message[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise Damaged("a number is cut off")


def fields(message: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields between two places as (number, wire type, start, stop) of their content.

    Raises:
        Damaged: they are none.
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
            raise Damaged("unknown wire type")
        if start + length > stop:
            raise Damaged("a field is cut off")
        yield key >> 3, wire, start, start + length
        start += length


def parts(message: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The strings and messages among the fields as (number, start, stop), numbers passed over."""
    for number, wire, a, b in fields(message, start, stop):
        if wire == BYTES:
            yield number, a, b


def parse(message: bytes) -> Fields:
    """Every field's values by its number: strings and messages as bytes, numbers without a sign.

    Raises:
        Damaged: it is no message.
    """
    found: Fields = {}
    for number, wire, a, b in fields(message, 0, len(message)):
        if wire == VARINT:
            value: int | bytes = varint(message, a, b)[0]
        else:
            value = message[a:b] if wire == BYTES else int.from_bytes(message[a:b], "little")
        found.setdefault(number, []).append(value)
    return found


def messages(found: Fields, field: int) -> list[bytes]:
    """The strings or messages of a field, in order.

    Raises:
        Damaged: it holds a number.
    """
    values = found.get(field, [])
    if not all(isinstance(value, bytes) for value in values):
        raise Damaged(f"field {field} holds a number, not a message")
    return [value for value in values if isinstance(value, bytes)]


def text(found: Fields, field: int) -> str:
    """The string of a field, empty where it is left out."""
    values = messages(found, field)
    return values[-1].decode(errors="replace") if values else ""


def number(found: Fields, field: int) -> int:
    """The number of a field, 0 where it is left out.

    Raises:
        Damaged: it holds a message.
    """
    value = found.get(field, [0])[-1]
    if not isinstance(value, int):
        raise Damaged(f"field {field} holds a message, not a number")
    return value


def write_fields(field: int, content: bytes) -> bytes:
    """A field that holds a string or a message."""
    return write_varint(field << 3 | BYTES) + write_varint(len(content)) + content


def write_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
