"""``rotary`` on every backend."""

import pytest
import torch

from fivefold.kernels.errors import KernelInputError
from fivefold.kernels.ops.rotary import op, rotary
from fivefold.kernels.ops.rotary.samples import SAMPLES
from fivefold.kernels.testing import op_tests

TestLaws = op_tests(SAMPLES, ops=(op.rotary,))

BACKENDS = op.BACKENDS


def angles(num_tokens, num_pairs, start=0, theta=10000.0):
    frequencies = theta ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    return (torch.arange(start, start + num_tokens)[:, None] * frequencies).float()


def tables(*shape, **options):
    table = angles(*shape, **options)
    return table.cos(), table.sin()


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_convention_of_transformers(backend):
    """Queries (B, H, T, D) and a table (B, T, D) that repeats each half."""
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    table = torch.stack((angles(5, 4), angles(5, 4, start=7))).repeat(1, 1, 2)
    cos, sin = table.cos(), table.sin()
    expected = x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)
    found = rotary(x, cos[..., :4], sin[..., :4], heads_first=True, backend=backend)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(2, 3, 5, 8)
    gradients = (torch.autograd.grad(y, x, dy) for y in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_what_the_models_here_compute(backend):
    """Queries (B, T, H, D) and a table (T, 1, D), the angles of positions from 3 on."""
    x = torch.randn(2, 5, 3, 8)
    table = angles(5, 4, start=3).repeat(1, 2).unsqueeze(1)
    expected = x * table.cos() + rotate_half(x) * table.sin()
    found = rotary(x, *tables(5, 4, start=3), backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_is_a_product_of_complex_numbers(backend):
    x = torch.randn(2, 5, 3, 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(
        torch.ones(5, 1, 4), angles(5, 4).unsqueeze(1)
    )
    found = rotary(x, *tables(5, 4), interleaved=True, backend=backend)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_norms_and_what_is_not_rotated(backend, interleaved):
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    found = rotary(x, *tables(5, 4), interleaved=interleaved, backend=backend)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(found[..., 8:], x[..., 8:])
    assert not torch.equal(found[:, 1:, :, :8], x[:, 1:, :, :8])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_distances_alone(backend, interleaved):
    q, k = (torch.randn(8).expand(9, 1, 8) for _ in range(2))
    q, k = (rotary(x, *tables(9, 4), interleaved=interleaved, backend=backend) for x in (q, k))
    scores = torch.einsum("mhd,nhd->mn", q, k)
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_rotates_back(backend):
    x, table = torch.randn(2, 3, 2, 6, requires_grad=True), tables(3, 3)
    y = rotary(x, *table, backend=backend)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_differentiable_twice(backend):
    x, v = torch.randn(2, 3, 2, 6, requires_grad=True), torch.randn(2, 3, 2, 6)
    energy = rotary(x, *tables(3, 3), backend=backend).square().sum()
    (dx,) = torch.autograd.grad(energy, x, create_graph=True)
    # Rotations keep the norm: the energy is that of x, and its second derivative 2.
    (second,) = torch.autograd.grad(dx, x, v)
    torch.testing.assert_close(second, 2 * v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_angles_of_bfloat16_values(backend):
    x, (cos, sin) = torch.randn(1, 40, 2, 6).bfloat16(), tables(40, 3)
    found = rotary(x, cos, sin, backend=backend)
    expected = rotary(x.float(), cos, sin, backend="reference").bfloat16()
    assert found.dtype == torch.bfloat16
    # Rounded once; but Triton's interpreter cuts bfloat16 off instead of rounding it, and a sum of
    # opposite products may be a unit of float32 away.
    digits = 2**-7 if backend == "triton" else 0
    torch.testing.assert_close(found, expected, rtol=digits, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_threads_share_the_work(interleaved):
    x, table = torch.randn(3, 49, 8, 64), tables(49, 32)
    torch.set_num_threads(2)
    found, expected = (
        rotary(x, *table, interleaved=interleaved, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_keeps_nothing_of_x():
    x, (cos, sin) = torch.randn(1, 3, 2, 6, requires_grad=True), tables(3, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(x, cos, sin)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_is_contiguous_in_its_own_layout():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    for backend in BACKENDS:
        assert rotary(x, *tables(5, 4), heads_first=True, backend=backend).is_contiguous()


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((3, 8), (3, 4), (3, 4), r"\(\.\.\., T, H, D\), found torch.float32 of shape \(3, 8\)"),
        ((2, 3, 1, 8), (2, 4), (2, 4), r"\(3, R/2\).* or \(2, 3, R/2\).*found \(2, 4\)"),
        ((3, 1, 8), (4,), (4,), r"cos of shape \(3, R/2\) with R/2 up to 4, found \(4,\)"),
        ((3, 1, 8), (3, 5), (3, 5), r"R/2 up to 4, found \(3, 5\)"),
        ((3, 1, 8), (3, 4), (3, 3), r"found torch.float32 \(3, 4\) and torch.float32 \(3, 3\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(x, cos, sin, message):
    with pytest.raises(KernelInputError, match=message):
        rotary(torch.ones(x), torch.ones(cos), torch.ones(sin))


def test_says_where_tokens_are_when_heads_are_first():
    with pytest.raises(
        KernelInputError, match=r"which is \(\.\.\., H, T, D\), takes cos of .*\(5,"
    ):
        rotary(torch.ones(2, 3, 5, 8), *tables(3, 4), heads_first=True)


def test_refuses_dtypes_and_devices_that_do_not_fit():
    x, cos = torch.ones(3, 1, 8), torch.ones(3, 4)
    with pytest.raises(KernelInputError, match=r"found torch\.int64"):
        rotary(x.long(), cos, cos)
    with pytest.raises(KernelInputError, match=r"cos and sin of one shape and dtype"):
        rotary(x, cos, cos.double())
    with pytest.raises(KernelInputError, match=r"cos and sin of one shape and dtype"):
        rotary(x, cos.long(), cos.long())
    with pytest.raises(KernelInputError, match=r"one device, found cpu, meta and meta"):
        rotary(x, cos.to("meta"), cos.to("meta"))


def test_refuses_to_differentiate_angles():
    x, cos, sin = torch.ones(3, 1, 8), *tables(3, 4)
    for table in ((cos.requires_grad_(), sin), (cos.detach(), sin.requires_grad_())):
        with pytest.raises(KernelInputError, match=r"no gradient of cos and sin.*detach"):
            rotary(x, *table)
    with torch.no_grad():
        rotary(x, cos, sin)
