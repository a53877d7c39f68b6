"""A function cut out of our source with its body left blank: what an exercise hands to its reader.

The source is read when the exercise is written, so nothing of it is stored twice.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent, wrap
from typing import NamedTuple

WIDTH = 100  # characters of a line


class Cut(NamedTuple):
    """A function in three parts, as they stand in its file.

    imports: the lines that its names come from; head: signature and docstring; body: all the rest.
    """

    imports: str
    head: str
    body: str


def cut(function: Callable) -> Cut:
    """Cut a function of ours out of its file."""
    path = Path(inspect.getsourcefile(function) or "")
    text = path.read_text("utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    node = definition(tree, function.__name__)
    docstring, rest = node.body[0], node.body[1:]
    end_of_docstring = docstring.end_lineno or docstring.lineno
    return Cut(
        imports="\n".join(imports_of(node, tree, function.__module__)),
        head="\n".join(lines[node.lineno - 1 : end_of_docstring]),
        body="\n".join(lines[end_of_docstring : rest[-1].end_lineno]),
    )


def definition(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The definition of a function in its module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"no function {name} at the top of its file")


def blank(parts: Cut, docstring: str, instruction: str) -> str:
    """The file of an exercise: its docstring, the imports, and a function without a body."""
    body = f"    raise NotImplementedError(\n{quoted(instruction)}\n    )"
    return f'"""{docstring}"""\n\n{parts.imports}\n\n\n{parts.head}\n{body}\n'


def quoted(text: str) -> str:
    """A text as string literals on lines of their own, deep enough for the argument of a call."""
    parts = wrap(text, WIDTH - 12, drop_whitespace=False)
    return indent("\n".join(f'"{part}"' for part in parts), " " * 8)


# ---- what the names of a function mean -----------------------------------------------------------


def imports_of(node: ast.FunctionDef, tree: ast.Module, module: str) -> list[str]:
    """The import lines of a function's names: those of its file, and the file itself."""
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    lines = []
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [alias for alias in statement.names if bound_name(alias) in used]
            if names:
                lines.append(import_line(statement, names, module))
    own = sorted(used.intersection(names_defined_in(tree)) - {node.name})
    if own:
        lines.append(f"from {module} import {', '.join(own)}")
    return lines


def bound_name(alias: ast.alias) -> str:
    """The name by which a module knows what it imports."""
    return alias.asname or alias.name.partition(".")[0]


def import_line(statement: ast.Import | ast.ImportFrom, names: list[ast.alias], module: str) -> str:
    """An import of these names alone, by the absolute name of where they come from."""
    words = ", ".join(ast.unparse(alias) for alias in names)
    if isinstance(statement, ast.Import):
        return f"import {words}"
    package = module.split(".")[: -statement.level] if statement.level else []
    origin = ".".join([*package, *([statement.module] if statement.module else [])])
    return f"from {origin} import {words}"


def names_defined_in(tree: ast.Module) -> Iterator[str]:
    """What a file itself defines at its top: functions, classes and constants."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
