"""What makes a program hard to read, found on its syntax tree without running it.

    names       a parameter, variable, function, class or import of one letter (`_` is none)
    crowding    a line of more than one statement, or a statement of more than one operation; an operation is an operator, a
                comparison, a call, a subscript that is read, an augmented assignment or a conditional expression. A comprehension
                counts as what stands in it, annotations and decorators do not count, and the statements within a statement count for
                themselves
    idle code   a name that is given and never read, or given anew before it is read; what can never be reached; a statement without
                effect; an operation that changes nothing (`+ 0`, `* 1`)
    hiding      a name that hides one of Python's own, or one of the function around

Names of a module count as read where nobody knows which of its functions is called; else all but that one have to be read within it.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

KINDS = ("names", "crowding", "idle code", "hiding")

MAX_DEPTH = 100
"""A deeper tree is no readable program. It bounds every recursion here, and is far below what Python itself can parse."""

_OPERATIONS = (ast.BinOp, ast.BoolOp, ast.Compare, ast.Call, ast.IfExp, ast.Await, ast.AugAssign)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_EFFECTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
_OUTSIDE = frozenset({"annotation", "returns", "decorator_list", "type_comment"})
# Not `exit` and the like, which are there only where the module `site` was imported.
_PYTHONS_OWN = frozenset(
    name for name, value in vars(builtins).items() if not name.startswith("_") and type(value).__module__ == "builtins"
)


class Flaw(NamedTuple):
    """One of KINDS, the line (from 1) at which it stands, and what it is."""

    kind: str
    line: int
    what: str


@dataclass
class _Scope:
    """The names of a function, comprehension, class or module: where each is given first, and how."""

    node: ast.AST
    outer: _Scope | None
    given: dict[str, int] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)

    @property
    def module(self) -> bool:
        return isinstance(self.node, ast.Module)

    @property
    def own(self) -> bool:
        """Whether its names are variables of a function, not the attributes of a class or what a module offers."""
        return not isinstance(self.node, ast.Module | ast.ClassDef)


def parse_program(source: str) -> ast.Module | None:
    """The tree of a program that does something; None where the text is no Python, too deep, or nothing but words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unknown escape in a string, which is a warning of the program's
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None
    if _depth(tree) > MAX_DEPTH or all(_no_effect(statement) for statement in tree.body):
        return None
    return tree


def defines(tree: ast.Module, name: str) -> bool:
    """Whether the module gives this name a value, by whatever statement outside of functions and classes."""
    return name in _scopes(tree)[0].given


def flaws(tree: ast.Module, entry_point: str | None = None) -> list[Flaw]:
    """Every flaw, by line; see the list of this module.

    Args:
        tree: as `parse_program` gives it.
        entry_point: the function that will be called, where that is known.
    """
    found = {*_crowding(tree), *_unreachable(tree), *_unread_values(tree), *_nothing_changed(tree)}
    for scope in _scopes(tree):
        found |= {*_short_names(scope), *_unread_names(scope, entry_point), *_hiding_names(scope)}
    return sorted(found, key=lambda flaw: (flaw.line, flaw.kind, flaw.what))


def _depth(tree: ast.AST) -> int:
    """Levels of the tree, counted without recursion."""
    level, depth = [tree], 0
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return depth


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statements of each body, in order."""
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield value


# ---- crowding ----


def _crowding(tree: ast.Module) -> Iterator[Flaw]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            if node.lineno in lines:
                yield Flaw("crowding", node.lineno, "several statements in one line")
            lines.add(node.lineno)
            count = sum(map(_is_operation, _own_nodes(node)))
            if count > 1:
                yield Flaw("crowding", node.lineno, f"{count} operations in one statement")


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """The statement and its expressions, without the statements within."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if name not in _OUTSIDE:
                children = value if isinstance(value, list) else [value]
                todo += [child for child in children if isinstance(child, ast.AST) and not isinstance(child, ast.stmt)]


def _is_operation(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        return not isinstance(node.operand, ast.Constant)
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Load)
    return isinstance(node, _OPERATIONS)


# ---- idle code ----


def _unreachable(tree: ast.Module) -> Iterator[Flaw]:
    for block in _blocks(tree):
        for before, statement in pairwise(block):
            if isinstance(before, _LEAVES):
                yield Flaw("idle code", statement.lineno, "never reached")
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Constant):
            endless = isinstance(node, ast.While) and bool(node.test.value)
            if not endless:
                yield Flaw("idle code", node.lineno, "a condition that is always the same")


def _unread_values(tree: ast.Module) -> Iterator[Flaw]:
    """Statements without effect, and values that another takes the place of before anyone reads them."""
    for owner in ast.walk(tree):
        documented = isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for name, value in ast.iter_fields(owner):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from _unread_of_block(value, documented=documented and name == "body")


def _unread_of_block(block: list[ast.stmt], *, documented: bool) -> Iterator[Flaw]:
    waiting: dict[str, int] = {}
    captured: set[str] = set()
    for place, statement in enumerate(block):
        docstring = documented and place == 0 and _is_text(statement)
        if _no_effect(statement) and not docstring and len(block) > 1:
            yield Flaw("idle code", statement.lineno, "no effect")
        nodes = list(ast.walk(statement))
        names = set(_reads(nodes))
        for name in names & waiting.keys():
            del waiting[name]
        if any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for node in nodes):
            captured |= names  # a function within reads them at a time that is its own
        if (target := _assigned(statement)) is not None:
            if target in waiting:
                yield Flaw("idle code", waiting[target], f"{target} is given anew before it is read")
            if target not in captured:
                waiting[target] = statement.lineno


def _no_effect(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return not any(isinstance(node, _EFFECTS) for node in ast.walk(statement.value))
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        return _assigned(statement) == statement.value.id
    return isinstance(statement, ast.Pass)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _assigned(statement: ast.stmt) -> str | None:
    """The name that a plain assignment gives a value, if it is one name."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _reads(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _nothing_changed(tree: ast.Module) -> Iterator[Flaw]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            changes = not _is_neutral(node.op, node.right) and not (
                isinstance(node.op, ast.Add | ast.Mult) and _is_neutral(node.op, node.left)
            )
        elif isinstance(node, ast.AugAssign):
            changes = not _is_neutral(node.op, node.value)
        else:
            continue
        if not changes:
            yield Flaw("idle code", node.lineno, "an operation that changes nothing")


def _is_neutral(operator: ast.operator, operand: ast.expr) -> bool:
    neutral = {ast.Add: 0, ast.Sub: 0, ast.Mult: 1, ast.FloorDiv: 1, ast.Pow: 1}.get(type(operator))
    return isinstance(operand, ast.Constant) and type(operand.value) is int and operand.value == neutral


# ---- names ----


def _scopes(tree: ast.Module) -> list[_Scope]:
    """The module and every scope within, each with what it gives and what is read in it or further in."""
    scopes: list[_Scope] = []
    _enter(tree, tree.body, None, scopes)
    for scope in reversed(scopes):
        if scope.outer is not None:
            scope.outer.read |= scope.read
    return scopes


def _enter(node: ast.AST, parts: Iterable[ast.AST], outer: _Scope | None, scopes: list[_Scope]) -> _Scope:
    scope = _Scope(node, outer)
    scopes.append(scope)
    for part in parts:
        _visit(part, scope, scopes)
    return scope


def _visit(node: ast.AST, scope: _Scope, scopes: list[_Scope]) -> None:
    if isinstance(node, ast.Name):
        _name(node, scope)
    elif isinstance(node, ast.Global | ast.Nonlocal):
        scope.shared |= set(node.names)
        scope.read |= scope.shared  # who reads them elsewhere is not looked for
    elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return
    elif isinstance(node, ast.alias) and node.name != "*":
        _give(scope, (node.asname or node.name).split(".")[0], node.lineno)
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping):
        name = node.rest if isinstance(node, ast.MatchMapping) else node.name
        if name is not None:
            _give(scope, name, node.lineno)
    if isinstance(node, _FUNCTIONS):
        _function(node, scope, scopes)
    elif isinstance(node, ast.ClassDef):
        _give(scope, node.name, node.lineno)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            _visit(part, scope, scopes)
        _enter(node, node.body, scope, scopes)
    elif isinstance(node, _COMPREHENSIONS):
        first = node.generators[0].iter
        _visit(first, scope, scopes)  # Python, too, reads it outside
        parts = [child for child in ast.iter_child_nodes(node) if child is not node.generators[0]]
        _enter(node, [node.generators[0].target, *node.generators[0].ifs, *parts], scope, scopes)
    elif isinstance(node, ast.NamedExpr):
        _visit(node.value, scope, scopes)
        while isinstance(scope.node, _COMPREHENSIONS) and scope.outer is not None:
            scope = scope.outer  # Python, too, gives such a name to the function
        _name(node.target, scope)
    else:
        for child in ast.iter_child_nodes(node):
            _visit(child, scope, scopes)


def _name(node: ast.Name, scope: _Scope) -> None:
    if isinstance(node.ctx, ast.Store):
        _give(scope, node.id, node.lineno)
    else:
        scope.read.add(node.id)


def _give(scope: _Scope, name: str, line: int) -> None:
    if name not in scope.shared:
        scope.given.setdefault(name, line)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, scope: _Scope, scopes: list[_Scope]) -> None:
    arguments = node.args
    outside: list[ast.AST] = [*arguments.defaults, *filter(None, arguments.kw_defaults)]
    if not isinstance(node, ast.Lambda):
        _give(scope, node.name, node.lineno)
        outside += [*node.decorator_list, *filter(None, [node.returns])]
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    listed += filter(None, [arguments.vararg, arguments.kwarg])
    outside += [argument.annotation for argument in listed if argument.annotation is not None]
    for part in outside:
        _visit(part, scope, scopes)
    inner = _enter(node, [node.body] if isinstance(node, ast.Lambda) else node.body, scope, scopes)
    for argument in listed:
        inner.given[argument.arg] = argument.lineno
        inner.parameters.add(argument.arg)


def _short_names(scope: _Scope) -> Iterator[Flaw]:
    for name, line in scope.given.items():
        if len(name) == 1 and name != "_":
            yield Flaw("names", line, f"the name {name}")


def _unread_names(scope: _Scope, entry_point: str | None) -> Iterator[Flaw]:
    if not scope.own and not (scope.module and entry_point):
        return
    for name, line in scope.given.items():
        asked = not name.startswith("_") and name not in scope.parameters
        if asked and name not in scope.read and not (scope.module and name == entry_point):
            yield Flaw("idle code", line, f"{name} is never read")


def _hiding_names(scope: _Scope) -> Iterator[Flaw]:
    if isinstance(scope.node, ast.ClassDef):
        return
    for name, line in scope.given.items():
        if name in _PYTHONS_OWN:
            yield Flaw("hiding", line, f"{name} hides Python's own")
        elif any(name in around.given for around in _around(scope)):
            yield Flaw("hiding", line, f"{name} hides that of the function around")


def _around(scope: _Scope) -> Iterator[_Scope]:
    """The functions and comprehensions that the scope stands in."""
    outer = scope.outer
    while outer is not None:
        if outer.own:
            yield outer
        outer = outer.outer
