"""Which ops a command was asked for: ``rms_norm``, or ``moe/permute`` for another package's."""

from collections.abc import Sequence

from fivefold.kernels.errors import KernelInputError


def select(asked: Sequence[str]) -> list[tuple[str, str]]:
    """Package and name of the ops that were asked for, of all installed ones if none was.

    An op is imported by ``samples.load`` and not before, so that one that cannot be does not hide
    the others.

    Raises:
        KernelInputError: there is no such op.
    """
    from fivefold.kernels import samples

    there = [(package, op) for package, op, _ in samples.modules()]
    if not asked:
        return there
    wanted = [_split(name) for name in asked]
    for each in wanted:
        if each not in there:
            listed = ", ".join("/".join(known) for known in there)
            raise KernelInputError(f"there is no op {'/'.join(each)}; there are {listed}")
    return sorted(set(wanted), key=there.index)


def _split(name: str) -> tuple[str, str]:
    package, slash, op = name.rpartition("/")
    return (package, op) if slash else ("kernels", op)
