"""The graph in a SavedModel: operations, followed from what is served back to the images.

`saved_model.pb` is a `SavedModel` with a `MetaGraphDef`: a `GraphDef` of nodes, the functions that they call, and
signatures, which say where images go in and answers come out. A node outside of functions names its inputs
`node:number`, one in a function `node:output:number`, or an argument alone. Calls are followed into their functions, so
that what is seen from outside is one graph of operations. A function is read when it is first called.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from funmatch.data.formats import protobuf
from funmatch.data.formats.protobuf import Damaged, Fields
from funmatch.errors import InputError
from funmatch.models.tensorflow.nodes import Missing, Node, Unclear, attribute, inner, tensor

CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
SAME = {"Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics", "ReadVariableOp"}
"""Operations that give what they are given. A variable and its value are not told apart."""

SERVED = ("serving_default", "serve")  # names of signatures, the first first
DEEPEST = 64  # calls in one another
MOST_CALLS = 5000
LONGEST_NAME = 2000  # characters
MOST_STEPS = 500_000  # an R152 of Keras 2 needs a fifth of them


@dataclass(frozen=True)
class Function:
    """Nodes by name, which argument has which name, and what is given back."""

    nodes: dict[str, Node]
    arguments: dict[str, int]
    results: list[str]


@dataclass(frozen=True)
class Output:
    """What a node gives: the call that it stands in, its name, and which of its outputs."""

    call: int
    node: str
    number: int


@dataclass(frozen=True)
class Call:
    """A function where it is called: what it is given, how many calls are around it, and those in it, by node."""

    function: Function
    given: list[Output]
    depth: int
    inner: dict[str, int] = field(default_factory=dict)


class Graph:
    """The graph of one model.

    Attributes:
        answers: what is served.
        keys: names in the bundle of the variable that a node holds; several where it was saved with copies.
    """

    def __init__(self, message: bytes) -> None:
        """Reads what stands outside of functions.

        Args:
            message: a `MetaGraphDef`.

        Raises:
            Damaged: it is none.
            Unclear: it serves nothing, or its variables cannot be told.
        """
        found = protobuf.parse(message)
        graph = inner(found, 2)
        self._library: dict[str, Fields] = {}
        for function in map(protobuf.parse, protobuf.messages(inner(graph, 2), 1)):
            self._library[protobuf.text(inner(function, 1), 1)] = function
        self._functions: dict[str, Function] = {}
        self._steps = 0
        self._calls = [Call(Function(_nodes(graph, 1), {}, []), [], 0)]
        signatures = _pairs(found, 5)
        name = next((name for name in SERVED if name in signatures), None)
        if name is None:
            raise Missing("its graph serves no function")
        served = _pairs(protobuf.parse(signatures[name]), 2).values()
        self.answers = [self._named(0, protobuf.text(protobuf.parse(info), 1)) for info in served]
        self.keys = self._saved(protobuf.text(inner(found, 3), 3))

    def node(self, output: Output) -> Node:
        return self._calls[output.call].function.nodes[output.node]

    def inputs(self, output: Output) -> list[Output]:
        """What an operation is given, as far back as it goes unchanged."""
        self._step()
        return [self._named(output.call, name) for name in self.node(output).inputs if not name.startswith("^")]

    def before(self, outputs: Iterable[Output]) -> Iterator[Output]:
        """All that outputs are computed from, themselves included, each once."""
        waiting = list(outputs)
        seen = set(waiting)
        while waiting:
            output = waiting.pop()
            yield output
            fresh = [each for each in self.inputs(output) if each not in seen]
            seen.update(fresh)
            waiting += fresh

    def variables(self, outputs: Iterable[Output]) -> list[set[str]]:
        """The keys of the variables that outputs are computed from.

        Raises:
            Unclear: one of them has none.
        """
        held = [output for output in self.before(outputs) if self.node(output).op == "VarHandleOp"]
        if strange := next((output for output in held if output.node not in self.keys), None):
            raise Unclear(f"{strange.node} in its graph is none of its variables")
        return [self.keys[output.node] for output in held]

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Unclear("its graph is too large, or goes in circles")

    def _named(self, call: int, name: str) -> Output:
        """The output of a name, followed to the operation that makes it."""
        while True:
            self._step()
            function, given = self._calls[call].function, self._calls[call].given
            if len(name) > LONGEST_NAME:
                raise Damaged("a name in its graph is too long")
            node_name, *rest = name.split(":")
            if not rest and node_name in function.arguments:
                place = function.arguments[node_name]
                if place >= len(given):
                    raise Damaged(f"a function is called without its {node_name}")
                return given[place]
            node = function.nodes.get(node_name)
            number = rest[-1] if rest else "0"
            if node is None or not number.isdigit() or len(number) > 6:
                raise Damaged(f"its graph has no {name}")
            if node.op in CALLS:
                call = self._called(call, node_name)
                results = self._calls[call].function.results
                if int(number) >= len(results):
                    raise Damaged(f"a function does not give {name}")
                name = results[int(number)]
            elif node.op in SAME and node.inputs:
                name = node.inputs[0]
            else:
                return Output(call, node_name, int(number))

    def _called(self, call: int, node_name: str) -> int:
        """The number of a call that a node makes."""
        around = self._calls[call]
        if node_name not in around.inner:
            if around.depth >= DEEPEST or len(self._calls) > MOST_CALLS:
                raise Unclear("the functions of its graph call each other too deeply, or too often")
            node = around.function.nodes[node_name]
            given = [self._named(call, name) for name in node.inputs if not name.startswith("^")]
            function = self._function(protobuf.text(inner(attribute(node, "f"), 10), 1))
            self._calls.append(Call(function, given, around.depth + 1))
            around.inner[node_name] = len(self._calls) - 1
        return around.inner[node_name]

    def _function(self, name: str) -> Function:
        if name not in self._functions:
            if name not in self._library:
                raise Damaged(f"its graph has no function {name}")
            found = self._library[name]
            signature = inner(found, 1)
            arguments = [protobuf.text(protobuf.parse(each), 1) for each in protobuf.messages(signature, 2)]
            outputs = [protobuf.text(protobuf.parse(each), 1) for each in protobuf.messages(signature, 3)]
            results = {key: value.decode(errors="replace") for key, value in _pairs(found, 4).items()}
            if missing := set(outputs) - set(results):
                raise Damaged(f"the function {name} does not say what its {missing.pop()} is")
            numbered = {argument: i for i, argument in enumerate(arguments)}
            self._functions[name] = Function(_nodes(found, 3), numbered, [results[each] for each in outputs])
        return self._functions[name]

    def _saved(self, restore: str) -> dict[str, set[str]]:
        """The keys of variables by their nodes, from the function that puts values into them."""
        if self._calls[0].function.nodes.get(restore, Node("", [], {})).op not in CALLS:
            raise Unclear("its graph does not say which variable is which")
        found: dict[str, set[str]] = {}
        listed: dict[str, list[bytes]] = {}
        for handle, value in self._assigned(self._called(0, restore)):
            if self.node(value).op == "RestoreV2":
                if value.node not in listed:
                    listed[value.node] = self._names_of(value)
                keys = listed[value.node]
                if value.number >= len(keys):
                    raise Damaged(f"the graph restores {handle.node} from nothing")
                found.setdefault(handle.node, set()).add(keys[value.number].decode(errors="replace"))
        for copy, of in list(self._assigned(0)):  # Keras 3 serves variables, and saves what is copied from them
            found.setdefault(of.node, set()).update(found.get(copy.node, ()))
        return {node: keys for node, keys in found.items() if keys}

    def _names_of(self, restored: Output) -> list[bytes]:
        """The keys that a `RestoreV2` reads, in order."""
        given = self.inputs(restored)
        if len(given) < 2:
            raise Damaged("a graph restores variables without their names")
        return protobuf.messages(tensor(self.node(given[1])), 8)

    def _assigned(self, call: int) -> Iterator[tuple[Output, Output]]:
        """The variables of a function that are given values, with these."""
        for node in self._calls[call].function.nodes.values():
            if node.op == "AssignVariableOp" and len(node.inputs) > 1:
                handle, value = (self._named(call, name) for name in node.inputs[:2])
                yield handle, value


def open_graph(path: Path) -> Graph:
    """Reads the graph of a `saved_model.pb`.

    Raises:
        InputError: it is damaged.
        Unclear: it has no graph, or none that serves.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    graphs = protobuf.messages(protobuf.parse(content), 2)
    if not graphs:
        raise Missing("its saved_model.pb holds no graph")
    return Graph(graphs[0])


def _pairs(found: Fields, number: int) -> dict[str, bytes]:
    """A map of messages or strings by name."""
    pairs = map(protobuf.parse, protobuf.messages(found, number))
    return {protobuf.text(pair, 1): b"".join(protobuf.messages(pair, 2)) for pair in pairs}


def _nodes(found: Fields, number: int) -> dict[str, Node]:
    nodes = {}
    for each in map(protobuf.parse, protobuf.messages(found, number)):
        inputs = [name.decode(errors="replace") for name in protobuf.messages(each, 3)]
        nodes[protobuf.text(each, 1)] = Node(protobuf.text(each, 2), inputs, each)
    return nodes
