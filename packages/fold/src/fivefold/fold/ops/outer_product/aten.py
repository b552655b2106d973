"""``outer_product`` by torch's products, of some rows at a time.

Legend: S sequences, I and J residues, i some of the I, C and D channels, Z channels of the result.
"""

from collections.abc import Iterator

from torch import Tensor

from fivefold.kernels import linear
from fivefold.kernels.operands import sum_dtype

# So many products of channels exist at once. On a CPU they stay in its cache, and memory for them
# is taken again and again instead of asked for anew.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 19, 1 << 26


def refuses(name: str, *inputs: object) -> str | None:
    """Nothing but what is empty."""
    a, b = inputs[1:3] if name == "outer_product_backward" else inputs[:2]
    if isinstance(a, Tensor) and isinstance(b, Tensor) and 0 in (*a.shape, *b.shape):
        return f"there is nothing to multiply in {tuple(a.shape)} and {tuple(b.shape)}"
    return None


def outer_product_forward(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int | None
) -> Tensor:
    """``a`` (B, S, I, C), ``b`` (B, S, J, D), ``weight`` (Z, C * D) to the result (B, I, J, Z)."""
    batch, _, num_i, _ = a.shape
    out = a.new_empty(batch, num_i, b.shape[2], weight.shape[0])
    for each in range(batch):
        b_jds = b[each].flatten(1).t()
        for some in _some(a, b, num_rows):
            outer = _outer(a[each][:, some].flatten(1).t(), b_jds, a.shape[3], b.shape[3])
            out[each, some] = linear(outer, weight, bias).unflatten(0, (-1, b.shape[2]))
    return out


def outer_product_backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, num_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``a``, ``b`` and ``weight``."""
    num_c, num_d = a.shape[3], b.shape[3]
    wide = sum_dtype(a.dtype)
    da, db = a.new_empty(a.shape), b.new_zeros(b.shape, dtype=wide)
    dweight = weight.new_zeros(weight.shape, dtype=wide)
    for each in range(a.shape[0]):
        b_sjd = b[each].flatten(1)
        db_sjd = db[each].flatten(1)
        for some in _some(a, b, num_rows):
            a_sic = a[each][:, some].flatten(1)
            dout_ijz = dout[each, some].flatten(0, 1)
            outer_ijcd = _outer(a_sic.t(), b_sjd.t(), num_c, num_d)
            dweight += linear(dout_ijz.t(), outer_ijcd.t())
            douter = linear(dout_ijz, weight.t()).view(-1, b.shape[2], num_c, num_d)
            douter_icjd = douter.transpose(1, 2).reshape(-1, b_sjd.shape[1])
            da[each][:, some] = linear(b_sjd, douter_icjd).unflatten(1, (-1, num_c))
            db_sjd += linear(a_sic, douter_icjd.t())
    return da, db.to(b.dtype), dweight.to(weight.dtype)


def _outer(a_ics: Tensor, b_jds: Tensor, num_c: int, num_d: int) -> Tensor:
    """Products (i J, C D) of (i C, S) and (J D, S)."""
    outer_icjd = linear(a_ics, b_jds).view(-1, num_c, b_jds.shape[0] // num_d, num_d)
    return outer_icjd.transpose(1, 2).reshape(-1, num_c * num_d)


def _some(a: Tensor, b: Tensor, num_rows: int | None) -> Iterator[slice]:
    """Slices of the I rows."""
    if num_rows is None:
        most = _AT_ONCE_ON_CPU if a.device.type == "cpu" else _AT_ONCE
        num_rows = max(1, most // (b.shape[2] * a.shape[3] * b.shape[3]))
    for start in range(0, a.shape[2], num_rows):
        yield slice(start, start + num_rows)
