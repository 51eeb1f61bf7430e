"""Which metrics and labels a PromQL expression is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

parser: Any = pytest.importorskip("promql_parser", reason="reading PromQL needs promql-parser")

GIVEN_BY_PROMETHEUS = frozenset({"namespace", "pod", "instance", "job"})


def unknown_names(expression: str, exposed: dict[str, frozenset[str]]) -> list[str]:
    """Selectors of metrics that are not `exposed` (name: its labels), and labels that none of the
    metrics below has. Fails the test if the expression cannot be parsed."""
    try:
        tree = parser.parse(expression)
    except Exception as error:
        raise AssertionError(f"{expression}: {error}") from error
    return list(_unknown(tree, exposed))


def _unknown(node: Any, exposed: dict[str, frozenset[str]]) -> Iterator[str]:
    if isinstance(node, parser.VectorSelector):
        if node.name not in exposed:
            yield f"{node.name} is not exposed"
            return
        for matcher in node.matchers.matchers:
            if matcher.name not in exposed[node.name] | GIVEN_BY_PROMETHEUS:
                yield f"{node.name} has no label {matcher.name}"
        return
    if isinstance(node, parser.AggregateExpr) and node.modifier is not None:
        labels = set().union(*(exposed.get(name, ()) for name in _metrics(node.expr)))
        for label in node.modifier.labels:
            if label not in labels | GIVEN_BY_PROMETHEUS:
                yield f"grouped by {label}, which nothing below has"
    for child in _children(node):
        yield from _unknown(child, exposed)


def _metrics(node: Any) -> Iterator[str]:
    if isinstance(node, parser.VectorSelector):
        yield node.name
    for child in _children(node):
        yield from _metrics(child)


def _children(node: Any) -> Iterator[Any]:
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, name, None)
        if isinstance(child, parser.Expr):
            yield child
    yield from getattr(node, "args", ())
