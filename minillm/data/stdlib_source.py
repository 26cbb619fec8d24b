"""The functions of the standard library on this machine: what the default data of every task is cut from."""

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from minillm.config import UserError
from minillm.data.sources import open_source

# Tables, a grammar, and what some distributions pack apart: without them, a Python version gives one set of functions.
_LEFT_OUT = ("distutils/", "encodings/", "ensurepip/", "idlelib/", "lib2to3/", "pydoc_data/", "tkinter/", "turtle")


@dataclass(frozen=True)
class Function:
    """One function or method."""

    file: str
    """Below the standard library's folder, as `asyncio/events.py`."""
    line: int
    name: str
    owner: str | None
    """The line that begins its class, where that is one line."""
    arguments: tuple[str, ...]
    """Names, in order, but for `self` and `cls`."""
    docstring: str
    """Its first paragraph on one line; "" where there is none."""
    code: str
    """Source without docstring and imports, indented by nothing."""

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def functions() -> tuple[Function, ...]:
    """Every function that has a body beyond its docstring, in the order of the files; those with one code, once.

    Raises `UserError` where this Python comes without its source.
    """
    found: dict[str, Function] = {}
    for name, path in open_source("stdlib").files:
        if name.startswith(_LEFT_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an old escape in somebody else's file
                tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        lines = text.split("\n")
        for node, owner in _walk(tree, None):
            function = _function(name, lines, node, owner)
            if function is not None:
                found.setdefault(function.code, function)
    if not found:
        raise UserError("this Python comes without the source of its standard library; name a file with --data")
    return tuple(found.values())


def _walk(parent: ast.AST, owner: ast.ClassDef | None) -> Iterator[tuple[ast.AST, ast.ClassDef | None]]:
    """Functions at the top, in classes, and below `if` and `try`; not those inside of functions."""
    for node in getattr(parent, "body", ()):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, owner
        elif isinstance(node, ast.ClassDef):
            yield from _walk(node, node)
        elif isinstance(node, ast.If | ast.Try):
            yield from _walk(node, owner)


def _function(file: str, lines: list[str], node, owner: ast.ClassDef | None) -> Function | None:
    docstring = ast.get_docstring(node)
    body = node.body[1:] if docstring is not None else node.body
    if not body or all(isinstance(statement, ast.Pass) for statement in body):
        return None
    imports = any("import" in line for line in lines[node.lineno - 1 : node.end_lineno])  # to walk few of the trees
    left_out = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)] if imports else []
    left_out += node.body[:1] if docstring is not None else []
    numbers = {number for part in left_out for number in range(part.lineno, part.end_lineno + 1)}
    kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in numbers]
    indent = node.col_offset
    code = "\n".join(line[indent:] if not line[:indent].strip() else line.lstrip() for line in kept).rstrip()
    header = lines[owner.lineno - 1].strip() if owner is not None else None
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return Function(
        file=file,
        line=node.lineno,
        name=node.name,
        owner=header if header is not None and header.endswith(":") else None,
        arguments=tuple(a.arg for a in arguments if a.arg not in ("self", "cls")),
        docstring=" ".join((docstring or "").split("\n\n")[0].split()),
        code=code,
    )


def parsed(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The syntax tree of a function's `code`; None where leaving lines out has broken it, or it is not ASCII, in which
    columns would not be characters."""
    if not code.isascii():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code).body[0]
    except (SyntaxError, IndexError):
        return None
