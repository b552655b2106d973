"""``fp8_quantize`` on every backend, bit for bit as torchao has it."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from torch import Tensor

from fivefold.kernels.errors import BackendError, KernelInputError
from fivefold.kernels.launch import CudaLaunch, record
from fivefold.kernels.ops.fp8_quantize import fp8_quantize, op, reference
from fivefold.kernels.ops.fp8_quantize.samples import SAMPLES
from fivefold.kernels.testing import op_tests

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BACKENDS = ("triton", "reference")
INF, NAN = float("inf"), float("nan")


@wraps(fp8_quantize)
def both_orders(
    x: Tensor, dtype: torch.dtype, power_of_2_scale: bool, backend: str | None = None
) -> tuple[Tensor, ...]:
    """The public op and the registered one with its transpose, in numbers that the kit compares."""
    x_fp8, scale = fp8_quantize(x, dtype, power_of_2_scale=power_of_2_scale, backend=backend)
    rows = x.reshape(-1, x.shape[-1] if x.numel() else 1)
    rows_fp8, x_t, _ = op.fp8_quantize(rows, dtype, power_of_2_scale, True, backend)
    return x_fp8.float(), scale, rows_fp8.float(), x_t.float()


TestLaws = op_tests(replace(SAMPLES, function=both_orders), ops=(op.fp8_quantize,))


def torchao(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor]:
    utils = pytest.importorskip("torchao.float8.float8_utils")
    scale = utils.tensor_to_scale(x, dtype, round_scales_to_power_of_2=power_of_2)
    return utils.to_fp8_saturated(x.to(torch.float32) * scale, dtype), scale


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Every bit, but for the sign and the bits of a NaN."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.double(), b.double()
        same = (a == b) & (a.signbit() == b.signbit())
        assert (same | (a.isnan() & b.isnan())).all()


def odd_values(dtype: torch.dtype) -> Tensor:
    """All magnitudes that float8 can tell apart, ties between them, and what is too small."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    around = [torch.nextafter(ties, torch.tensor(side)) for side in (INF, -INF)]
    return torch.cat([every, ties, *around, torch.randn(500) * torch.randn(500).exp2()])


@pytest.mark.parametrize("power_of_2", [False, True], ids=["", "power of two"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchao_bit_for_bit(backend: str, dtype: torch.dtype, power_of_2: bool) -> None:
    values = odd_values(dtype)
    for x in (
        values,
        values.double(),
        values.half(),
        values.bfloat16(),
        values * 3.7,
        values.bfloat16() * 1e-20,
        values * 1e-12,
        values * 1e30,
    ):
        found = fp8_quantize(x, dtype, power_of_2_scale=power_of_2, backend=backend)
        assert_same(found, torchao(x, dtype, power_of_2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "values",
    [
        [0.0, -0.0, 0.0],
        [1.0, INF, -2.0, 0.0],
        [1.0, -INF],
        [NAN, 1.0],
        [1.0, -NAN, INF],
        [1e-30, -1e-45],
        [3.4e38, 1.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("power_of_2", [False, True], ids=["", "power of two"])
def test_extreme_values(values: list[float], power_of_2: bool, backend: str) -> None:
    for dtype in (E4M3, E5M2):
        x = torch.tensor(values)
        found = fp8_quantize(x, dtype, power_of_2_scale=power_of_2, backend=backend)
        assert_same(found, torchao(x, dtype, power_of_2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_next_to_powers_of_two(backend: str) -> None:
    """Where the rounded logarithm is a whole number although the scale is not a power of two."""
    for exponent in (-30, -7, 0, 5, 33):
        for steps in (-3, -2, -1, 1):
            wanted = torch.tensor(2.0**exponent) * (1 + steps * 2.0**-24)
            x = (448.0 / wanted.double()).reshape(1)
            found = fp8_quantize(x, power_of_2_scale=True, backend=backend)
            assert_same(found, torchao(x, E4M3, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_numbers(backend: str) -> None:
    x = torch.tensor([0.0, 0.1, -0.3, 1.7, -2.5, 1e-4])
    x_fp8, scale = fp8_quantize(x, backend=backend)
    assert scale.item() == pytest.approx(179.2, rel=1e-7)
    assert x_fp8.tolist() == [0.0, 18.0, -52.0, 320.0, -448.0, 0.017578125]
    x_fp8, scale = fp8_quantize(x, E5M2, power_of_2_scale=True, backend=backend)
    assert scale.item() == 16384
    assert x_fp8.tolist() == [0.0, 1536.0, -5120.0, 28672.0, -40960.0, 1.75]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(37, 33), (1, 5), (5, 1), (50, 22), (0, 3), (3, 0)], ids=str)
def test_transpose_in_the_same_pass(shape: tuple[int, int], backend: str) -> None:
    for x in (torch.randn(shape), torch.randn(shape[::-1]).t(), torch.randn(*shape, 2)[..., 0]):
        x_fp8, x_t, scale = op.fp8_quantize(x, E4M3, False, True, backend)
        expected, _, expected_scale = reference.fp8_quantize(x, E4M3, False, False)
        assert_same((x_fp8, scale), (expected, expected_scale))
        assert x_t.is_contiguous() and x_t.untyped_storage() is not x_fp8.untyped_storage()
        assert_same((x_t, scale), (expected.t(), expected_scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles(backend: str) -> None:
    """More tiles than programs, so that each program walks over several."""
    x = torch.randn(61, 43)
    x[55, 33] = -30
    for transposed in (False, True):
        for each in (x, x[:, :42]):
            found = op.fp8_quantize(each, E5M2, False, transposed, backend)
            assert_same((found[0], found[2]), torchao(each, E5M2, False))


def test_it_has_no_gradient() -> None:
    x_fp8, scale = fp8_quantize(torch.randn(3, 4, requires_grad=True))
    assert not x_fp8.requires_grad and not scale.requires_grad


def test_errors() -> None:
    with pytest.raises(KernelInputError, match=r"found torch\.int64"):
        fp8_quantize(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(KernelInputError, match=r"found torch\.float8_e5m2"):
        fp8_quantize(torch.zeros(3).to(E5M2))
    with pytest.raises(KernelInputError, match=r"float8_e5m2, was asked for torch\.float16"):
        fp8_quantize(torch.zeros(3), torch.float16)


@pytest.mark.parametrize(
    ("of", "dtype"),
    [(torch.float32, E4M3), (torch.float16, E5M2), (torch.bfloat16, E4M3)],
    ids=str,
)
def test_cuda_is_one_cooperative_launch(of: torch.dtype, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.core")
    x = torch.empty(64, 48, dtype=of, device="meta")
    with record() as launches:
        fp8_quantize(x, dtype, backend="cuda")
    (launch,) = launches
    assert isinstance(launch, CudaLaunch) and launch.cooperative
    assert launch.program.cubin("sm_90a").startswith(b"\x7fELF")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_bit_for_bit_on_a_gpu(dtype: torch.dtype, backend: str) -> None:
    values = odd_values(dtype)
    for x in (values, values.bfloat16() * 1e-20, values.half()[:-5], torch.randn(3000, 1001)):
        for power_of_2 in (False, True):
            found = fp8_quantize(x.cuda(), dtype, power_of_2_scale=power_of_2, backend=backend)
            expected = reference.fp8_quantize(x.reshape(1, -1), dtype, power_of_2, False)
            assert_same(
                (found[0].cpu(), found[1].cpu()), (expected[0].reshape(x.shape), expected[2])
            )


def test_what_cuda_refuses() -> None:
    pytest.importorskip("cuda.core")
    x = torch.empty(4, 4, dtype=torch.float64, device="meta")
    with record(), pytest.raises(BackendError, match=r"not torch\.float64"):
        fp8_quantize(x, backend="cuda")
    with record(), pytest.raises(BackendError, match="no transposed copy"):
        op.fp8_quantize(x.float(), E4M3, False, True, "cuda")
