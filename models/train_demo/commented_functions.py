"""Documented functions in the form the chat template gives the model: a comment, then the code.

The comment is the first paragraph of the docstring; the function follows without its docstring,
moved to the left margin.
"""

import ast
import textwrap
from collections.abc import Iterator

_MAX_LINES = 40
_MAX_COMMENT_CHARACTERS = 240


def commented_functions(text: str) -> Iterator[str]:
    """Every documented function or method of a source text; none if the text does not parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _comment_then_code(node, lines)
            if function is not None:
                yield function


def _comment_then_code(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.end_lineno is None:
        return None
    first, second = node.body[0], node.body[1]
    if first.end_lineno is None or first.end_lineno >= second.lineno or first.lineno == node.lineno:
        return None
    code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    comment = docstring.split("\n\n")[0].strip()
    if not comment or len(code) > _MAX_LINES or len(comment) > _MAX_COMMENT_CHARACTERS:
        return None
    body = textwrap.dedent("\n".join(line for line in code if line.strip())).strip("\n")
    return "\n".join(f"# {line.strip()}" for line in comment.splitlines()) + f"\n{body}\n"
