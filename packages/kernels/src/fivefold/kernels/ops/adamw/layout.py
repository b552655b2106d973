"""Where values lie: kernels walk all tensors of a parameter side by side, without gaps.

A row is a list of tensors, one for each parameter, or an empty list.
"""

from torch import Tensor

Rows = list[list[Tensor]]


def lie_alike(rows: Rows) -> bool:
    """Whether values at one place of the rows lie in the same order and without gaps."""
    if all(all(map(Tensor.is_contiguous, row)) for row in rows):
        return True
    return all(
        _gapless(rows[0][index]) and all(_same(row[index], rows[0][index]) for row in rows if row)
        for index in range(len(rows[0]))
    )


def alike(rows: Rows) -> Rows:
    """The tensors, or copies of those that do not lie like the first row's, made gapless."""
    layouts = [each.stride() if _gapless(each) else None for each in rows[0]]
    return [
        [_laid(each, layout) for each, layout in zip(row, layouts, strict=True)] if row else []
        for row in rows
    ]


def _laid(x: Tensor, layout: tuple[int, ...] | None) -> Tensor:
    if layout is None:
        return x if x.is_contiguous() else x.new_empty(x.shape).copy_(x)
    if x.stride() == layout:
        return x
    return x.new_empty(x.numel()).as_strided(x.shape, layout).copy_(x)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


def _gapless(x: Tensor) -> bool:
    """Whether some order of the dims makes it contiguous."""
    if x.is_contiguous():
        return True
    step = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True
