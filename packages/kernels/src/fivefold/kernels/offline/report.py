"""All kernels of ops, compiled and read; and what went wrong, for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fivefold.kernels.backends import interpreting
from fivefold.kernels.errors import BackendError, CompileError
from fivefold.kernels.offline.builds import Build
from fivefold.kernels.offline.compare import Comparison
from fivefold.kernels.offline.compile import TARGETS, Compiled, UnsupportedError
from fivefold.kernels.offline.gather import Failure, Found, Origin, gather
from fivefold.kernels.offline.pool import compile_all, show_progress
from fivefold.kernels.offline.records import Record


def survey(
    ops: Sequence[tuple[str, str]], targets: Sequence[str], processes: int | None = None
) -> tuple[list[Record], list[Failure]]:
    """Compile all kernels of ops for targets, and read them.

    Args:
        ops: packages and names.
        targets: architectures, of ``compile.TARGETS``.
        processes: how many to use; the default is one a core.

    Raises:
        BackendError: Triton's interpreter is on, and so kernels cannot be compiled.
    """
    if interpreting():
        raise BackendError(
            "kernels cannot be compiled in Triton's interpreter: unset TRITON_INTERPRET"
        )
    builds, failures = _gather_all(ops, targets)
    jobs = [(build, target) for target in targets for build in builds[target]]
    variants = {target: _variants(found) for target, found in builds.items()}
    found = []
    for index, made in compile_all(jobs, processes, show_progress):
        build, target = jobs[index]
        origin = builds[target][build]
        if isinstance(made, CompileError):
            expected = isinstance(made, UnsupportedError)
            failures.append(
                Failure(
                    origin=origin,
                    kernel=build.kernel,
                    target=target,
                    error=str(made),
                    expected=expected,
                )
            )
        else:
            found.append(_record(build, target, origin, variants[target][build], made))
    found.sort(key=lambda record: record.key)
    failures.sort(key=lambda failure: (failure.origin.package, failure.origin.op, failure.kernel))
    return found, failures


def _gather_all(
    ops: Sequence[tuple[str, str]], targets: Sequence[str]
) -> tuple[dict[str, Found], list[Failure]]:
    """The kernels for each target, and what went wrong, told once."""
    builds: dict[str, Found] = {}
    failures: list[Failure] = []
    for target in targets:
        number, _ = TARGETS[target]
        builds[target], failed = gather(ops, divmod(number, 10))
        failures += [each for each in failed if each not in failures]
    return builds, failures


def describe(failure: Failure) -> str:
    """A failure for people."""
    where = f"{failure.origin.package}/{failure.origin.op} {failure.kernel}".strip()
    details = ", ".join(
        each for each in (failure.origin.sample, failure.origin.dtype, failure.target) if each
    )
    if failure.expected:
        # The last line names the reason; those before it point into the kernel.
        return f"not for this target: {where} ({details}): {failure.error.splitlines()[-1]}"
    return f"FAILED: {where}" + (f" ({details})" if details else "") + f": {failure.error}"


def differences(comparison: Comparison) -> list[str]:
    """What differs from a table, the worst last."""
    lines = []
    for title, titled in (
        ("notes", comparison.notes),
        ("not in the table", comparison.unknown),
        ("only in the table", comparison.gone),
        ("WORSE than in the table", comparison.worse),
    ):
        if titled:
            lines += ["", f"{title}:", *(f"  {line}" for line in titled)]
    return lines


def _variants(builds: dict[Build, Origin]) -> dict[Build, int]:
    """Numbers of kernels of the same name in one call."""
    seen: Counter[tuple[str, ...]] = Counter()
    numbers = {}
    for build, origin in builds.items():
        key = (origin.package, origin.op, origin.sample, origin.dtype, build.kernel)
        numbers[build] = seen[key]
        seen[key] += 1
    return numbers


def _record(build: Build, target: str, origin: Origin, variant: int, made: Compiled) -> Record:
    options = dict(build.options)
    return Record(
        package=origin.package,
        op=origin.op,
        kernel=build.kernel,
        target=target,
        sample=origin.sample,
        dtype=origin.dtype,
        variant=variant,
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 0),
        registers=made.registers,
        shared_bytes=made.shared_bytes,
        moved_bytes=origin.moved_bytes,
        lost_load_bytes=max(0, made.tile_load_bytes - made.code.wide_load_bytes),
        lost_store_bytes=max(0, made.tile_store_bytes - made.code.wide_store_bytes),
        has_dot=made.has_dot,
        needs_tensor_cores=origin.tensor_cores and made.has_narrow_dot,
        needs_wide=not made.has_dot and not origin.follows_indices,
        compiler=made.compiler,
        **_kept(made),
    )


def _kept(made: Compiled) -> dict[str, Any]:
    """What instructions show, without what only ``lost_load_bytes`` and its like need."""
    facts = asdict(made.code)
    del facts["wide_load_bytes"], facts["wide_store_bytes"]
    return facts
