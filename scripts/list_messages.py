"""Lists every text that a user of funmatch can see: messages, help, notes, titles of tables and plots.

    python scripts/list_messages.py > tests/messages.txt

A test compares the list with the code, so that each new or changed message is read once among all the others.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "funmatch"


def texts(path: Path) -> Iterator[str]:
    """The texts of a module, in order; what is put in stands as `{expression}`.

    Taken are strings of three words or more that are not a docstring; of tables of options (`funmatch.config`) the
    strings under the fields too, since they are the options' help.
    """
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    if path.parent.name == "config":
        docs -= {id(item.value) for item in _help(tree)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    inside -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    for node in ast.walk(tree):
        if id(node) in docs or id(node) in inside or not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        text = _text(node)
        if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{[^}]*\}", "", text))) >= 3 and " " in text.strip():
            yield re.sub(r"\s+", " ", text).strip()


def _help(tree: ast.Module) -> Iterator[ast.Expr]:
    for table in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, below in zip(table.body, table.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                yield below


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = [part.value if isinstance(part, ast.Constant) else f"{{{_name(part)}}}" for part in node.values]
    return "".join(map(str, parts))


def _name(part: ast.expr) -> str:
    return ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else ast.unparse(part)


def catalogue() -> str:
    """All texts, one per line, under the module that has them."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found = list(dict.fromkeys(texts(path)))
        if found:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            lines += [f"## {module}", *found, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(catalogue(), end="")
