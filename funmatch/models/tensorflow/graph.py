"""Reads the graph in a SavedModel, and follows its operations from the outputs back to the images.

`saved_model.pb` is a `SavedModel` with a `MetaGraphDef`: a `GraphDef` of nodes, the functions that they call, and
signatures, which name inputs and outputs. A node outside of functions names its inputs `node:number`, one in a function
`node:output:number`, or an argument alone. Calls are followed into their functions, so that the whole appears as one
graph of operations. A function is read when it is first called.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from funmatch.data.formats import protobuf
from funmatch.data.formats.protobuf import Damaged, Fields
from funmatch.errors import InputError
from funmatch.models.tensorflow.nodes import Missing, Node, Unclear, attribute, inner, tensor

CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
IDENTITIES = {
    "Identity", "StopGradient", "PreventGradient", "Snapshot", "EnsureShape", "CheckNumerics", "ReadVariableOp",
}  # fmt: skip
"""Operations whose output is their input. A variable and its value count as the same."""

SIGNATURES = ("serving_default", "serve")  # in order of preference

# A damaged or hostile file must not be followed forever.
MAX_DEPTH = 64  # of calls inside calls
MAX_CALLS = 5000
MAX_NAME = 2000  # characters
MAX_STEPS = 500_000  # an R152 of Keras 2 needs a fifth of them


@dataclass(frozen=True)
class Function:
    """A function of the graph.

    Attributes:
        nodes: by name.
        arguments: position by name.
        results: names of the outputs that it returns.
    """

    nodes: dict[str, Node]
    arguments: dict[str, int]
    results: list[str]


@dataclass(frozen=True)
class Output:
    """Output of a node: the call that contains the node, the node's name, and the number of the output."""

    call: int
    node: str
    number: int


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        function: that is called.
        arguments: outputs that it receives.
        depth: number of calls around it.
        inner: numbers of the calls inside it, by node.
    """

    function: Function
    arguments: list[Output]
    depth: int
    inner: dict[str, int] = field(default_factory=dict)


class Graph:
    """Graph of one model.

    Attributes:
        outputs: of the signature.
        keys: names in the bundle of the variable that a node holds; several where it was saved with copies.
    """

    def __init__(self, message: bytes) -> None:
        """Reads all but the functions.

        Args:
            message: a `MetaGraphDef`.

        Raises:
            Damaged: it is something else.
            Unclear: it has no signature, or its variables cannot be identified.
        """
        # Fields of a MetaGraphDef: 2 is the GraphDef, 3 the SaverDef, 5 the signatures.
        fields = protobuf.parse(message)
        graph = inner(fields, 2)
        # In a GraphDef 1 are the nodes and 2 is the library; in a FunctionDef 1 is the signature, 3 nodes, 4 results.
        self._library: dict[str, Fields] = {}
        for function in map(protobuf.parse, protobuf.messages(inner(graph, 2), 1)):
            self._library[protobuf.text(inner(function, 1), 1)] = function
        self._functions: dict[str, Function] = {}
        self._steps = 0
        # Call 0 is the graph itself, so that names are resolved in the same way everywhere.
        self._calls = [Call(Function(_nodes(graph, 1), {}, []), [], 0)]
        signatures = _pairs(fields, 5)
        name = next((name for name in SIGNATURES if name in signatures), None)
        if name is None:
            raise Missing("its graph serves no function")
        # Only outputs (2) of the signature are needed: images are found as the placeholders that these depend on.
        served = _pairs(protobuf.parse(signatures[name]), 2).values()
        self.outputs = [self._resolve(0, protobuf.text(protobuf.parse(info), 1)) for info in served]
        # Last, since it follows calls and so needs all of the above.
        self.keys = self._saved_keys(protobuf.text(inner(fields, 3), 3))

    def node(self, output: Output) -> Node:
        """Returns the node of an output."""
        return self._calls[output.call].function.nodes[output.node]

    def inputs(self, output: Output) -> list[Output]:
        """Returns the inputs of an operation, followed through operations that change nothing."""
        self._count_step()
        # Names with ^ only order the execution of operations and carry no value.
        return [self._resolve(output.call, name) for name in self.node(output).inputs if not name.startswith("^")]

    def before(self, outputs: Iterable[Output]) -> Iterator[Output]:
        """Yields all that outputs are computed from, themselves included, each once."""
        # A list instead of recursion: deep networks have chains that are longer than Python's stack.
        waiting = list(outputs)
        visited = set(waiting)
        while waiting:
            output = waiting.pop()
            yield output
            new = [each for each in self.inputs(output) if each not in visited]
            visited.update(new)
            waiting += new

    def variables(self, outputs: Iterable[Output]) -> list[set[str]]:
        """Returns the keys of the variables that outputs are computed from.

        Raises:
            Unclear: one of them is not in the bundle.
        """
        handles = [output for output in self.before(outputs) if self.node(output).op == "VarHandleOp"]
        if unknown := next((output for output in handles if output.node not in self.keys), None):
            raise Unclear(f"{unknown.node} in its graph is not one of its saved variables")
        return [self.keys[output.node] for output in handles]

    def _count_step(self) -> None:
        # One count for everything that is followed: each loop alone may be short, and their product endless.
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise Unclear("its graph is too large, or goes in circles")

    def _resolve(self, call: int, name: str) -> Output:
        """Returns the output of a name in a call, followed to the operation that computes it."""
        while True:
            self._count_step()
            function, arguments = self._calls[call].function, self._calls[call].arguments
            # Names are split and stored at every step, so a file with names of megabytes would take forever.
            if len(name) > MAX_NAME:
                raise Damaged("a name in its graph is too long")
            node_name, *rest = name.split(":")
            if not rest and node_name in function.arguments:
                position = function.arguments[node_name]
                if position >= len(arguments):
                    raise Damaged(f"a function is called without its {node_name}")
                return arguments[position]
            node = function.nodes.get(node_name)
            # The output's own name, between the two, is left out: operations that matter here name a single output.
            number = rest[-1] if rest else "0"
            # The length too, since Python refuses to convert thousands of digits.
            if node is None or not (number.isascii() and number.isdecimal()) or len(number) > 6:
                raise Damaged(f"its graph has no {name}")
            if node.op in CALLS:
                call = self._enter_call(call, node_name)
                results = self._calls[call].function.results
                if int(number) >= len(results):
                    raise Damaged(f"a function does not return {name}")
                name = results[int(number)]
            # A node lists its control inputs, those with ^, after the others; so the first one is the value.
            elif node.op in IDENTITIES and node.inputs:
                name = node.inputs[0]
            else:
                return Output(call, node_name, int(number))

    def _enter_call(self, call: int, node_name: str) -> int:
        """Returns the number of the call that a node makes inside another call."""
        outer = self._calls[call]
        # Once for each node: two outputs of one call are then outputs of the same nodes.
        if node_name not in outer.inner:
            if outer.depth >= MAX_DEPTH or len(self._calls) > MAX_CALLS:
                raise Unclear("the functions of its graph call each other too deeply, or too often")
            node = outer.function.nodes[node_name]
            # Before this call is added: its arguments may be calls, which take the next numbers.
            arguments = [self._resolve(call, name) for name in node.inputs if not name.startswith("^")]
            function = self._function(protobuf.text(inner(attribute(node, "f"), 10), 1))
            self._calls.append(Call(function, arguments, outer.depth + 1))
            outer.inner[node_name] = len(self._calls) - 1
        return outer.inner[node_name]

    def _function(self, name: str) -> Function:
        if name not in self._functions:
            if name not in self._library:
                raise Damaged(f"its graph has no function {name}")
            fields = self._library[name]
            signature = inner(fields, 1)
            # Callers pass arguments and take results by position. The results are a map, so the signature orders them.
            arguments = [protobuf.text(protobuf.parse(each), 1) for each in protobuf.messages(signature, 2)]
            outputs = [protobuf.text(protobuf.parse(each), 1) for each in protobuf.messages(signature, 3)]
            results = {key: value.decode(errors="replace") for key, value in _pairs(fields, 4).items()}
            if missing := set(outputs) - set(results):
                raise Damaged(f"the function {name} does not define its {missing.pop()}")
            numbered = {argument: i for i, argument in enumerate(arguments)}
            self._functions[name] = Function(_nodes(fields, 3), numbered, [results[each] for each in outputs])
        return self._functions[name]

    def _saved_keys(self, restore: str) -> dict[str, set[str]]:
        """Returns the keys of variables by their nodes, from the function that restores their values."""
        # Nodes have names of their own; only this function connects them with the names in the bundle.
        if self._calls[0].function.nodes.get(restore, Node("", [], {})).op not in CALLS:
            raise Unclear("its graph does not show which variable is which")
        keys: dict[str, set[str]] = {}
        restored: dict[str, list[bytes]] = {}
        for handle, value in self._assignments(self._enter_call(0, restore)):
            if self.node(value).op == "RestoreV2":
                # Once for all outputs: a `RestoreV2` of a large network has hundreds, and its list is parsed whole.
                if value.node not in restored:
                    restored[value.node] = self._restored_keys(value)
                names = restored[value.node]
                if value.number >= len(names):
                    raise Damaged(f"the graph restores {handle.node} from nothing")
                keys.setdefault(handle.node, set()).add(names[value.number].decode(errors="replace"))
        # Keras 3 serves variables, and saves copies of them.
        for copy, original in list(self._assignments(0)):
            keys.setdefault(original.node, set()).update(keys.get(copy.node, ()))
        return {node: names for node, names in keys.items() if names}

    def _restored_keys(self, restored: Output) -> list[bytes]:
        """Returns the keys that a `RestoreV2` reads, in order."""
        inputs = self.inputs(restored)
        if len(inputs) < 2:
            raise Damaged("a graph restores variables without their names")
        # RestoreV2(prefix, tensor_names, shape_and_slices); field 8 of a TensorProto holds strings.
        return protobuf.messages(tensor(self.node(inputs[1])), 8)

    def _assignments(self, call: int) -> Iterator[tuple[Output, Output]]:
        """Yields the variables that a function assigns, with their new values."""
        for node in self._calls[call].function.nodes.values():
            if node.op == "AssignVariableOp" and len(node.inputs) > 1:
                handle, value = (self._resolve(call, name) for name in node.inputs[:2])
                yield handle, value


def open_graph(path: Path) -> Graph:
    """Reads the graph of a `saved_model.pb`.

    Raises:
        InputError: the file cannot be read.
        Damaged: it is damaged.
        Unclear: it has no graph, or none with a signature.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    graphs = protobuf.messages(protobuf.parse(content), 2)
    if not graphs:
        raise Missing("its saved_model.pb holds no graph")
    # TensorFlow 2 writes a single MetaGraphDef. Files of several are TensorFlow 1's, which has no graph of objects.
    return Graph(graphs[0])


def _pairs(fields: Fields, number: int) -> dict[str, bytes]:
    """Returns a map of messages or strings by name."""
    pairs = map(protobuf.parse, protobuf.messages(fields, number))
    # A map is a list of pairs of key (1) and value (2).
    return {protobuf.text(pair, 1): b"".join(protobuf.messages(pair, 2)) for pair in pairs}


def _nodes(fields: Fields, number: int) -> dict[str, Node]:
    nodes = {}
    for each in map(protobuf.parse, protobuf.messages(fields, number)):
        # Fields of a NodeDef: 1 name, 2 operation, 3 inputs, 5 attributes.
        inputs = [name.decode(errors="replace") for name in protobuf.messages(each, 3)]
        nodes[protobuf.text(each, 1)] = Node(protobuf.text(each, 2), inputs, each)
    return nodes
