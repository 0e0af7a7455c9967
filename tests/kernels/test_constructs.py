"""What no kernel may say: constructs that are gone from some Triton, wrong in its interpreter, or without an order.

A value is narrow where it comes from memory, or from a cast to a type that is not wide. It may be widened, multiplied
by `tl.dot` or stored; in the interpreter its sum, product or maximum would be wrong, and on a GPU coarse.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))

GONE = {
    "make_block_ptr": "removed from Triton 3.9",
    "advance": "removed from Triton 3.9",
    "dot_scaled": "not in the interpreter of Triton 3.6",
}
WIDE = ("tl.float32", "tl.float64", "tl.int32", "tl.int64", "tl.uint32", "wide")
TAKES_NARROW = ("tl.dot", "tl.store")


def kernels_of(tree: ast.Module) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [each for each in functions if any("triton.jit" in ast.unparse(mark) for mark in each.decorator_list)]


def faults(source: str) -> list[str]:
    """Return what is wrong in the kernels of a file, each with its line."""
    found = [fault for kernel in kernels_of(ast.parse(source)) for fault in _faults(kernel)]
    return [f"line {line}: {what}" for line, what in sorted(found)]


def _faults(kernel: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    parents = {child: node for node in ast.walk(kernel) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(kernel):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in GONE:
            yield node.lineno, f"{name}: {GONE[name]}"
        elif name.startswith("atomic_"):
            yield node.lineno, f"{name}: the order of its writes is open"
        elif isinstance(node, ast.Call) and _is_narrow(node) and not _is_let_be(node, kernel, parents):
            yield node.lineno, f"{ast.unparse(node)} is narrow: widen it at once with .to()"


def _is_narrow(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute):
        return False
    is_cast = call.func.attr == "to" and ast.unparse(call.args[0]) not in WIDE
    return is_cast or call.func.attr == "load"


def _is_let_be(value: ast.expr, kernel: ast.FunctionDef, parents: dict[ast.AST, ast.AST]) -> bool:
    """Return whether a value is only cast, multiplied by `tl.dot` or stored, by itself or by the name it gets."""
    parent = parents[value]
    if isinstance(parent, ast.Attribute):
        return parent.attr in ("to", "dtype")
    if isinstance(parent, ast.Call):
        function = ast.unparse(parent.func)
        return function in TAKES_NARROW or (function == "tl.trans" and _is_let_be(parent, kernel, parents))
    if isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name):
        name = parent.targets[0].id
        uses = [node for node in ast.walk(kernel) if isinstance(node, ast.Name) and node.id == name]
        return all(_is_let_be(use, kernel, parents) for use in uses if isinstance(use.ctx, ast.Load))
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_kernel_says_what_is_forbidden(path):
    assert not faults(path.read_text(encoding="utf-8"))


def test_the_kernels_are_found():
    found = {each.name for path in FILES for each in kernels_of(ast.parse(path.read_text(encoding="utf-8")))}
    assert {"_quantize", "_norm", "_gated", "_turn", "_gather"} <= found


@pytest.mark.parametrize(
    "line",
    [
        "p = tl.make_block_ptr(x, (8,), (1,), (0,), (8,), (0,))",
        "p = tl.advance(x, (8,))",
        "p = x.advance((8,))",
        "t = tl.dot_scaled(a, s, 'e4m3', b, s, 'e4m3')",
        "tl.atomic_add(x, 1.0)",
        "tl.atomic_cas(x, 0, 1)",
        "t = tl.load(x) * 2.0",
        "t = tl.sum(tl.load(x), 0)",
        "t = tl.load(x)\n    u = t + 1.0",
        "t = tl.load(x)\n    tl.store(y, t)\n    u = tl.max(t, 0)",
        "t = tl.load(x)\n    u = t\n    v = u * u",
        "t += tl.load(x)",
        "t = tl.load(x)[:, None]",
        "t = x.load([0, 0]) + 1.0",
        "t = tl.load(x).to(tl.bfloat16) + 1.0",
        "t = a.to(x.dtype.element_ty)\n    u = tl.sum(t, 0)",
        "t = tl.load(x)\n    u = tl.sum(tl.trans(t), 0)",
        "return tl.load(x)",
    ],
)
def test_each_construct_is_caught(line):
    source = f"@triton.jit\ndef kernel(x, y, a, b, s, wide: tl.constexpr):\n    {line}\n"
    assert faults(source)
    assert not faults(source.replace("@triton.jit\n", ""))


@pytest.mark.parametrize(
    "line",
    [
        "t = tl.load(x).to(tl.float32) * 2.0",
        "t = tl.sum(tl.load(x).to(wide)[:, None], 0)",
        "at = tl.load(x).to(tl.int64)\n    t = tl.load(y + at).to(wide)",
        "tl.store(y, tl.load(x))",
        "t = tl.load(x)\n    u = tl.load(y)\n    v = tl.dot(t, u) * 2.0",
        "t = tl.load(x)\n    u = tl.dot(a.to(t.dtype), tl.trans(t)) * 2.0",
        "t = tl.load(x)\n    u = t.to(tl.float32) * 2.0",
        "t = (a * b).to(y.dtype.element_ty)\n    tl.store(y, t)",
        "t = a.to(x.dtype.element_ty).to(tl.float32) + 1.0",
        "tl.store(y, (a * b).to(y.dtype.element_ty), mask=a < 3)",
    ],
)
def test_what_is_right_is_let_be(line):
    assert not faults(f"@triton.jit\ndef kernel(x, y, a, b, wide: tl.constexpr):\n    {line}\n")
