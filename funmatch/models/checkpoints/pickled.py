"""Reads what a pickle describes without making any of it: no class is imported and no function is called.

Python's own unpickler imports whatever a file names and calls it. This one keeps names and arguments as data, so that
the tensors of a checkpoint can be found beside a trainer's options, NumPy's numbers or objects of missing packages.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

PUSHED = ("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTES", "BYTEARRAY")
"""Endings of the operations that push their own argument."""
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")


@dataclass(frozen=True)
class Global:
    """Class or function that a pickle names."""

    name: str


@dataclass(eq=False)
class Described:
    """Object that a pickle describes, and that is not made.

    Attributes:
        name: of its class, or of the function that would return it.
        args: of that call.
        state: what the object would be given afterwards, usually its attributes by name.
        entries, elements: what it would hold as a dict, a list or a set.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


def read_pickle(
    file: BinaryIO, makers: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Reads one pickle, up to its end and no further.

    Args:
        file: at the first byte of the pickle.
        makers: functions of ours to call in place of those that the pickle names.
        persistent: returns what stands for a reference to something outside the pickle.

    Returns:
        the object, made of plain Python values, `Global`, `Described`, and what `makers` and `persistent` return.

    Raises:
        Exception: of nearly any kind, where the file is damaged.
    """
    machine = _Machine(makers, persistent or (lambda reference: Described("persistent", (reference,))))
    for operation, argument, _ in pickletools.genops(file):
        machine.run(operation.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack machine for which a pickle is the program (see the standard library's `pickletools`)."""

    def __init__(self, makers: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]) -> None:
        self.makers, self.persistent = makers, persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Runs one operation."""
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in STEPS:
            STEPS[name](self, argument)
        elif name.rstrip("0123456789").endswith(PUSHED):
            self.stack.append(argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"unexpected operation {name} in a pickle")

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop(self, _: Any) -> None:
        # A mark counts as an item here.
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        # In two steps, because the mark changes which list is the stack.
        items = self.since_mark()
        self.stack.append(kind(items))

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        self.stack[-count:] = [tuple(items)]

    def extend(self, items: list[Any]) -> None:
        """Adds items to the list, set or object on top."""
        top = self.stack[-1]
        if isinstance(top, set):
            top.update(items)
        else:
            (top.elements if isinstance(top, Described) else top).extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values, in turn, to the dict or object on top."""
        top = self.stack[-1]
        (top.entries if isinstance(top, Described) else top).update(zip(items[::2], items[1::2], strict=True))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Described):
            self.stack[-1].state = state

    def call(self, arguments: int) -> None:
        """Replaces a class or function, and one or two arguments (a tuple, and a dict of names), by the result."""
        target, args = self.stack[-1 - arguments], self.stack[-arguments]
        self.stack[-1 - arguments :] = [self.result(target, args)]

    def result(self, target: Any, args: Any) -> Any:
        name, args = getattr(target, "name", ""), tuple(args)
        if isinstance(target, Global) and name in self.makers:
            return self.makers[name](*args)
        if isinstance(target, Global) and name in DICTS:
            return dict(args[0]) if args and isinstance(args[0], list) else {}
        return Described(name, args)

    def inst(self, argument: str) -> None:
        self.collect(lambda items: self.result(Global(argument.replace(" ", ".")), items))

    def stack_global(self, _: Any) -> None:
        name = ".".join(map(str, self.stack[-2:]))
        self.stack[-2:] = [Global(name)]


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LIST": lambda m, _: m.collect(list),
    "TUPLE": lambda m, _: m.collect(tuple),
    "DICT": lambda m, _: m.collect(_dict_of),
    "FROZENSET": lambda m, _: m.collect(frozenset),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, argument: m.stack.append(Global(argument.replace(" ", "."))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(1),
    "NEWOBJ": lambda m, _: m.call(1),
    "NEWOBJ_EX": lambda m, _: m.call(2),
    "INST": _Machine.inst,
    "OBJ": lambda m, _: m.collect(lambda items: m.result(items[0], items[1:])),
    "BUILD": _Machine.build,
    "PERSID": lambda m, argument: m.stack.append(m.persistent(argument)),
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.stack.pop())),
}
