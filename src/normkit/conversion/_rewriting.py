"""The forward of a layer in which a sum and the norm of it are one call, and what modulates it.

    h = residual + made                 h, y = self._normkit_sum_and_norm(residual, made, self.norm)
    residual = h                        residual = h
    h = self.norm(h)                    h = y; del y

    self.norm(h) * (1 + scale) + shift  self._normkit_modulated(h, self.norm, scale, shift)

Nothing else changes, and only where the norm is the first call behind its sum, and scale and shift
are only looked up, so that things are computed in the order of before.
"""

from __future__ import annotations
import __future__

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

# What the new code calls; members of the layer's class, since the globals stay the function's own.
SUM_AND_NORM, MODULATED = "_normkit_sum_and_norm", "_normkit_modulated"
_NORMED = "_normkit_normed"
_NO_SOURCE = "the source of its forward is not known"
_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


class NotRewritable(Exception):
    """Why the forward of a layer stays as it is."""


@dataclass
class Fused:
    """The names of norms that a forward fuses, one for each place.

    Attributes:
        sums: those with the sum before them.
        modulated: those with the scale and shift behind them.
    """

    sums: list[str] = field(default_factory=list)
    modulated: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sums or self.modulated)


def rewritten(own: type, norms: frozenset[str]) -> tuple[Callable[..., Any], Fused]:
    """The forward of a class with its sums and norms fused, and which.

    Args:
        own: the class of a layer.
        norms: the attributes of the layer that are norms.

    Raises:
        NotRewritable: the source of forward is not known for sure, or decorated in an unknown way.
    """
    forward = own.forward  # type: ignore[attr-defined]
    function = inspect.unwrap(forward)
    if not isinstance(forward, FunctionType) or not isinstance(function, FunctionType):
        raise NotRewritable("its forward is no function of Python")
    tree, definition = _source(function)
    if not _is_same(_compiled(tree, function), function.__code__):
        raise NotRewritable(f"{_NO_SOURCE}: what its file says is other code")
    fused = _fuse(definition, norms)
    if not fused:
        return forward, fused
    made = _copied(function, _compiled(tree, function), function.__closure__)
    return _decorated(forward, function, made), fused


# ---------------------------------------------------------------------------------- source and code


def _source(function: FunctionType) -> tuple[ast.Module, ast.FunctionDef]:
    """All of the file, on which the code of a function depends (how it calls imported modules)."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise NotRewritable(_NO_SOURCE) from error
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name == code.co_name
        and min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno
    ]
    if len(found) != 1:
        raise NotRewritable(_NO_SOURCE)
    return tree, found[0]


def _compiled(tree: ast.Module, function: FunctionType) -> CodeType:
    code, flags = function.__code__, function.__code__.co_flags & _FUTURE
    module = compile(tree, code.co_filename, "exec", flags, dont_inherit=True)
    at = (code.co_name, code.co_firstlineno)
    return next(c for c in _codes(module) if (c.co_name, c.co_firstlineno) == at)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes(inner)


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether two pieces of code do the same: names of files and numbers of lines may differ."""
    names = (
        "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags",
        "co_argcount", "co_posonlyargcount", "co_kwonlyargcount",
    )  # fmt: skip
    if any(getattr(code, name) != getattr(other, name) for name in names):
        return False
    if len(code.co_consts) != len(other.co_consts):
        return False
    return all(
        _is_same(a, b)
        if isinstance(a, CodeType) and isinstance(b, CodeType)
        else type(a) is type(b) and a == b
        for a, b in zip(code.co_consts, other.co_consts, strict=True)
    )


def _copied(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None
) -> FunctionType:
    """A function like another, with other code, or other values in its closure."""
    cells = dict(zip(function.__code__.co_freevars, closure or (), strict=True))
    made = FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    made.__dict__.update(function.__dict__)
    # Python 3.14 computes annotations when they are asked for; their names may not be there by now
    annotations = "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", annotations):
        setattr(made, name, getattr(function, name))
    return made


def _decorated(forward: Any, function: FunctionType, made: FunctionType) -> FunctionType:
    """Another function in the same decorators, each of which has the next in its closure."""
    if forward is function:
        return made
    within = forward.__wrapped__
    made = _decorated(within, function, made)
    cells = forward.__closure__ or ()
    if [_content(cell) for cell in cells].count(within) != 1:
        raise NotRewritable("its forward is decorated in an unknown way")
    itself = CellType()  # as in transformers' layers, which ask whether they are the outermost
    others = {id(within): CellType(made), id(forward): itself}
    closure = tuple(others.get(id(_content(cell)), cell) for cell in cells)
    itself.cell_contents = around = _copied(forward, forward.__code__, closure)
    around.__dict__["__wrapped__"] = made
    return around


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


# ---------------------------------------------------------------------------------------- rewriting


def _fuse(definition: ast.FunctionDef, norms: frozenset[str]) -> Fused:
    """Rewrite a method in place, and say what is fused."""
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    stored = {
        node.id
        for node in ast.walk(definition)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    if not arguments or arguments[0].arg in stored:
        return Fused()
    fusing = _Fusing(arguments[0].arg, norms)
    fusing.generic_visit(definition)
    ast.fix_missing_locations(definition)
    return fusing.fused


class _Fusing(ast.NodeTransformer):
    """Fuses in all blocks of a method.

    Attributes:
        fused: what it has fused.
    """

    def __init__(self, me: str, norms: frozenset[str]) -> None:
        self.fused = Fused()
        self._me, self._norms = me, norms

    def visit_Lambda(self, node: ast.AST) -> ast.AST:
        """What is called another time, or never, stays as it is."""
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Fuse what is in a node, then between the statements of its blocks."""
        for name, body in _blocks_of(node):
            setattr(node, name, self._modulations_joined(body))
        super().generic_visit(node)
        for name, body in _blocks_of(node):
            setattr(node, name, self._block(body))
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """`self.norm(h) * (1 + scale) + shift`."""
        modulation = _modulation_of(node)
        if modulation is not None and self._is_of_norm(modulation.n):
            call = modulation.n
            scale, shift = modulation.scale, modulation.shift
            made = ast.Call(self._helper(MODULATED), [call.args[0], call.func, scale, shift], [])
            self.fused.modulated.append(call.func.attr)
            return self.visit_Call(ast.copy_location(made, node))
        return self.generic_visit(node)

    def visit_Call(self, call: ast.Call) -> ast.AST:
        """`self.norm(a + b)`: nobody else wants that sum."""
        self.generic_visit(call)
        found = self._norm_of(call)
        if found is not None and _is_sum(found.x):
            both = self._fused_call(found.x, found)
            return ast.copy_location(ast.Subscript(both, ast.Constant(1), ast.Load()), call)
        return call

    def _modulations_joined(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """`y = self.norm(h); y = y * (1 + scale) + shift` as one statement."""
        made: list[ast.stmt] = []
        for statement in body:
            match made[-1:], statement:
                case (
                    [ast.Assign(targets=[ast.Name(id=first)], value=ast.Call() as call)],
                    ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp() as value),
                ) if first == name and self._is_of_norm(call):
                    modulation = _modulation_of(value)
                    if modulation is not None and modulation.is_of(name):
                        _replace(statement, modulation.n, call)
                        made.pop()
            made.append(statement)
        return made

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        takes_normed = False  # whether the statement at hand has the norm of the last sum in it
        while body:
            first, *body = body
            names, aliases = _names_of_sum(first, body)
            at = body[len(aliases)] if names and len(body) > len(aliases) else None
            call = _first_call(at)
            found = None if call is None else self._norm_of(call)
            if call is not None and found is not None and _is_name(found.x, names):
                made += [self._sum_and_norm(first, found), *aliases]
                _replace(at, call, ast.Name(_NORMED, ast.Load()))
                body = body[len(aliases) :]
                takes_normed = True
                continue
            made.append(first)
            if takes_normed and not isinstance(first, ast.Return):
                # it may be as large as any activation, and lives as long as it did
                made.append(ast.Delete([ast.Name(_NORMED, ast.Del())]))
            takes_normed = False
        return made

    def _sum_and_norm(self, statement: Any, found: _NormOf) -> ast.stmt:
        (target,) = statement.targets
        both = ast.Tuple([target, ast.Name(_NORMED, ast.Store())], ast.Store())
        made = ast.Assign([both], self._fused_call(statement.value, found))
        return ast.copy_location(made, statement)

    def _fused_call(self, total: Any, found: _NormOf) -> ast.expr:
        self.fused.sums.append(found.norm.attr)
        arguments = [total.left, total.right, found.norm, *found.modulation]
        return ast.copy_location(ast.Call(self._helper(SUM_AND_NORM), arguments, []), total)

    def _helper(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(self._me, ast.Load()), name, ast.Load())

    def _norm_of(self, call: ast.Call) -> _NormOf | None:
        """What a norm, or a modulated one, is called with."""
        if self._is_of_norm(call):
            return _NormOf(call.func, call.args[0], [])
        match call.func:
            case ast.Attribute(attr=attr) if attr == MODULATED:
                return _NormOf(call.args[1], call.args[0], call.args[2:])
        return None

    def _is_of_norm(self, call: ast.Call) -> bool:
        """Whether it is `self.norm(one argument)`."""
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=me), attr=attr), args=[_], keywords=[]
            ):
                return me == self._me and attr in self._norms
        return False


class _NormOf(NamedTuple):
    """A norm, what it is called with, and what modulates it: scale and shift, or nothing."""

    norm: Any
    x: ast.expr
    modulation: list[ast.expr]


class _Modulation(NamedTuple):
    """`n * (1 + scale) + shift`."""

    n: Any
    scale: ast.expr
    shift: ast.expr

    def is_of(self, name: str) -> bool:
        """Whether n is that name, and neither of the others has it."""
        named = (node for t in (self.scale, self.shift) for node in ast.walk(t))
        return _is_name(self.n, {name}) and not any(_is_name(node, {name}) for node in named)


def _modulation_of(node: ast.AST) -> _Modulation | None:
    match node:
        case ast.BinOp(
            left=ast.BinOp(left=n, op=ast.Mult(), right=factor), op=ast.Add(), right=shift
        ):
            scale = _less_one(factor)
            if scale is not None and _is_lookup(scale) and _is_lookup(shift):
                return _Modulation(n, scale, shift)
    return None


def _less_one(factor: ast.expr) -> ast.expr | None:
    """The scale of `1 + scale`, and of `(1 + scale)[:, None]`."""
    match factor:
        case ast.BinOp(left=ast.Constant(value=1), op=ast.Add(), right=scale):
            return scale
        case ast.BinOp(left=scale, op=ast.Add(), right=ast.Constant(value=1)):
            return scale
        case ast.Subscript(value=ast.BinOp() as value, slice=at):
            inside = _less_one(value)
            return None if inside is None else ast.Subscript(inside, at, ast.Load())
    return None


def _is_lookup(node: ast.AST) -> bool:
    """Whether nothing is computed but views: names, attributes, and `[:, None]` of them."""
    match node:
        case ast.Name() | ast.Constant():
            return True
        case ast.Attribute(value=value):
            return _is_lookup(value)
        case ast.Subscript(value=value, slice=at):
            return _is_lookup(value) and _is_lookup(at)
        case ast.Tuple(elts=parts):
            return all(map(_is_lookup, parts))
        case ast.Slice(lower=lower, upper=upper, step=step):
            return all(part is None or _is_lookup(part) for part in (lower, upper, step))
    return False


def _blocks_of(node: ast.AST) -> list[tuple[str, list[ast.stmt]]]:
    return [
        (name, value)
        for name, value in ast.iter_fields(node)
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt)
    ]


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _is_name(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _names_of_sum(first: ast.stmt, behind: list[ast.stmt]) -> tuple[set[str], list[ast.stmt]]:
    """The names that a sum has, and the statements behind it that give it more; none if no sum."""
    match first:
        case ast.Assign(targets=[ast.Name(id=name)], value=total) if _is_sum(total):
            names = {name}
        case _:
            return set(), []
    aliases: list[ast.stmt] = []
    for statement in behind:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=known)) if (
                known in names
            ):
                names.add(name)
                aliases.append(statement)
            case _:
                break
    return names, aliases


def _first_call(statement: ast.stmt | None) -> ast.Call | None:
    """The call that a statement begins with: before it nothing is computed, only looked up."""
    match statement:
        case ast.Assign(value=value) | ast.Return(value=value) | ast.Expr(value=value):
            pass
        case ast.AugAssign(target=ast.Name(), value=value):
            pass
        case _:
            return None
    first = next((node for node in _evaluated(value) if not _is_lookup(node)), None)
    return first if isinstance(first, ast.Call) else None


def _evaluated(node: ast.expr | None) -> Iterator[ast.expr]:
    """The parts of an expression in the order in which they are evaluated, it being the last.

    Of one whose parts may not all be evaluated, or several times, there is only itself.
    """
    match node:
        case ast.Call():
            parts = [node.func, *node.args, *(k.value for k in node.keywords)]
        case ast.BinOp():
            parts = [node.left, node.right]
        case ast.Attribute() | ast.Starred():
            parts = [node.value]
        case ast.Tuple() | ast.List():
            parts = node.elts
        case None:
            return
        case _:
            parts = []
    for part in parts:
        yield from _evaluated(part)
    yield node


def _replace(statement: ast.AST | None, old: ast.expr, new: ast.expr) -> None:
    class Replacing(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.copy_location(new, old) if node is old else self.generic_visit(node)

    if statement is not None:
        Replacing().visit(statement)
