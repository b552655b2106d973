"""Break a kernel on purpose, one place at a time, and see that the tests notice.

A mutant is the source of a kernel with one sign, comparison or mask changed. It runs in a child
process, because a wrong address may well end it.
"""

import ast
import faulthandler
import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, invalidate_caches
from math import ceil
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

from fivefold.kernels import op as ways
from fivefold.kernels.samples import OpSamples

# A mutant that computes longer than this (seconds) loops for ever: it was noticed.
_PATIENCE = 60.0
# And one that has computed nothing for so long: a kernel that writes where it must not may leave a
# lock that nobody gives back. Compilers, which it waits for, take less.
_STUCK = 150.0


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a source file.

    Attributes:
        file: the file's name.
        function: the kernel it is in, empty in C++.
        line: its line, from 1.
        kind: "sign", "bound" or "mask".
        before: the text that was there.
        after: the text that is there now.
        source: the whole file with the change.
    """

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        place = f"{self.file} line {self.line} {self.function}".strip()
        return f"{place}: {self.before!r} became {self.after!r}"


def triton_mutants(source: str, file: str = "triton.py") -> Iterator[Mutant]:
    """Every change of one place in the ``triton.jit`` functions of a file."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and _is_kernel(function):
            for node in ast.walk(function):
                for kind, target, after in _changes(node, source):
                    yield _replace(source, file, function.name, kind, target, after)


def cpp_mutants(source: str, file: str = "cpu.cpp") -> Iterator[Mutant]:
    """Every plus and minus between spaces of a C++ file, turned round."""
    opposite = {" + ": " - ", " - ": " + ", " += ": " -= ", " -= ": " += "}
    for found in re.finditer(r" (\+|-|\+=|-=) ", source):
        line_start = source.rfind("\n", 0, found.start()) + 1
        if "//" in source[line_start : found.start()]:
            continue
        after = opposite[found.group()]
        changed = source[: found.start()] + after + source[found.end() :]
        line = source.count("\n", 0, found.start()) + 1
        before = source[line_start:].split("\n")[0].strip()
        yield Mutant(file, "", line, "sign", before, after, changed)


def folder_of(op: OpSamples) -> str:
    """The package that an op's public function, kernels and samples are in."""
    return str(op.function.__module__)


def mutants_of(folder: str, backend: str) -> list[Mutant]:
    """All mutants of an op's files for a backend; none where it has no kernel of its own.

    Those are all files of C++ or all files with ``triton.jit`` functions in the op's folder.

    Args:
        folder: the op's package, such as ``fivefold.kernels.ops.rms_norm``.
        backend: whose files, "triton" or "cpu".
    """
    endings, make = {
        "cpu": ((".cpp", ".h"), cpp_mutants),
        "triton": ((".py",), triton_mutants),
    }[backend]
    files = sorted(path for path in _path(folder).iterdir() if path.suffix in endings)
    return [mutant for path in files for mutant in make(path.read_text(), path.name)]


def a_few(mutants: list[Mutant]) -> list[Mutant]:
    """The middle one of each kind in each function: enough to show that tests would notice."""
    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault((mutant.file, mutant.function, mutant.kind), []).append(mutant)
    return [group[len(group) // 2] for group in groups.values()]


def survives(folder: str, backend: str, mutant: Mutant, check: Callable[[], Any]) -> bool:
    """Whether ``check`` passes though the kernel is broken.

    Args:
        folder: the op's package.
        backend: whose file the mutant replaces.
        mutant: the change.
        check: raises where results are wrong; it runs in a forked child.
    """
    context = multiprocessing.get_context("fork")
    child = context.Process(target=partial(_run, folder, backend, mutant, check))
    child.start()
    _wait(child)
    if child.is_alive():
        child.kill()
        child.join()
        return False
    return child.exitcode == 0


def _wait(child: BaseProcess) -> None:
    """Until a process has ended or makes no progress."""
    used, since = -1.0, time.monotonic()
    while child.is_alive() and time.monotonic() - since < _STUCK:
        child.join(1.0)
        now = _seconds_computed(child.pid)
        if now != used:
            used, since = now, time.monotonic()


def _seconds_computed(pid: int | None) -> float:
    """Processor time of a process; where the system does not say, 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run(folder: str, backend: str, mutant: Mutant, check: Callable[[], Any]) -> None:
    faulthandler.disable()
    # Of the processor's time, which does not depend on what else runs.
    patience = ceil(_PATIENCE)
    resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))
    # No traceback, no words of a compiler or allocator: that a mutant fails is what should happen.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        with TemporaryDirectory() as scratch, replaced(folder, backend, mutant, Path(scratch)):
            check()
    except BaseException:
        sys.exit(1)


@contextmanager
def replaced(folder: str, backend: str, mutant: Mutant, scratch: Path) -> Iterator[None]:
    """Within it, the ops of a folder run the mutant on a backend."""
    for path in _path(folder).iterdir():
        if path.suffix in (".py", ".cpp", ".h"):
            (scratch / path.name).write_text(path.read_text())
    (scratch / mutant.file).write_text(mutant.source)
    module = _from_copy(folder, backend, scratch)
    implementation = ways._implementation

    def choose(of: str, named: str, name: str) -> Callable[..., Any]:
        mine = of == folder and named == backend
        return getattr(module, name) if mine else implementation(of, named, name)

    with patch.object(ways, "_implementation", choose):
        yield


def _from_copy(folder: str, backend: str, scratch: Path) -> ModuleType:
    """The backend's module, and the kernels that it imports from beside it, from a copy."""
    package = import_module(folder)
    stems = {path.stem for path in scratch.glob("*.py") if "triton.jit" in path.read_text()}
    originals = {stem: _forget(package, stem) for stem in stems | {backend}}
    invalidate_caches()
    with patch.object(package, "__path__", [str(scratch)]):
        module = import_module(f"{folder}.{backend}")
    for stem, original in originals.items():
        _forget(package, stem)
        if original is not None:
            sys.modules[f"{folder}.{stem}"] = original
            setattr(package, stem, original)
    return module


def _forget(package: ModuleType, stem: str) -> ModuleType | None:
    """Take a module out of its package, so that it is imported again; returns it."""
    package.__dict__.pop(stem, None)
    return sys.modules.pop(f"{package.__name__}.{stem}", None)


def _path(folder: str) -> Path:
    return Path(next(iter(import_module(folder).__path__)))


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(each).startswith("triton.jit") for each in function.decorator_list)


def _changes(node: ast.AST, source: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Kind, what to replace and by what text."""
    text = partial(ast.get_source_segment, source)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        sign = "-" if isinstance(node.op, ast.Add) else "+"
        yield "sign", node, f"({text(node.left)}) {sign} ({text(node.right)})"
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        sign = "-" if isinstance(node.op, ast.Add) else "+"
        yield "sign", node, f"{text(node.target)} {sign}= {text(node.value)}"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not isinstance(node.operand, ast.Constant) and "inf" not in ast.unparse(node):
            yield "sign", node, f"({text(node.operand)})"
    elif isinstance(node, ast.Compare) and isinstance(
        node.ops[0], ast.Lt | ast.Gt | ast.LtE | ast.GtE
    ):
        other = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}[type(node.ops[0])]
        yield "bound", node, f"({text(node.left)}) {other} ({text(node.comparators[0])})"
    elif isinstance(node, ast.Call):
        yield from _without_masks(node, source)


def _without_masks(node: ast.Call, source: str) -> Iterator[tuple[str, ast.AST, str]]:
    masks = [keyword.value for keyword in node.keywords if keyword.arg == "mask"]
    if ast.unparse(node.func) == "tl.where":
        masks.append(node.args[0])
    for mask in masks:
        # Equal to itself: true everywhere, in the mask's own shape.
        text = ast.get_source_segment(source, mask)
        yield "mask", mask, f"(({text}) == ({text}))"


def _replace(source: str, file: str, function: str, kind: str, node: Any, after: str) -> Mutant:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    start = starts[node.lineno - 1] + node.col_offset
    stop = starts[node.end_lineno - 1] + node.end_col_offset
    # One line, so that what follows keeps its place; brackets make that legal.
    after = " ".join(after.split())
    changed = source[:start] + after + source[stop:]
    return Mutant(file, function, node.lineno, kind, source[start:stop], after, changed)
