"""Starting CUDA C++ kernels: recorded where there is no GPU, run where there is one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fivefold.kernels import KernelInputError, cuda_route
from fivefold.kernels.cuda_route import start
from fivefold.kernels.launch import CudaLaunch, record

PROGRAM = cuda_route.load(Path(__file__).with_name("barrier.cu"))


def test_launches_are_recorded_with_all_that_matters() -> None:
    x = torch.empty(4, device="meta")
    with record() as launches:
        cuda_route.launch(
            PROGRAM, "normalize", (4, 2), (32,), x, 3, 0.5, None, shared_bytes=64, cluster=(2, 1)
        )
        cuda_route.launch(PROGRAM, "normalize", (1,), (64, 2), x, cooperative=True)
    clustered, cooperative = launches
    assert isinstance(clustered, CudaLaunch) and isinstance(cooperative, CudaLaunch)
    assert clustered.program is PROGRAM and clustered.kernel == "normalize"
    assert (clustered.grid, clustered.block, clustered.cluster) == ((4, 2), (32,), (2, 1))
    assert clustered.arguments == (x, 3, 0.5, None)
    assert clustered.shared_bytes == 64 and not clustered.cooperative
    assert cooperative.cooperative and cooperative.cluster == ()


def test_an_empty_grid_starts_nothing() -> None:
    with record() as launches:
        cuda_route.launch(PROGRAM, "normalize", (0,), (32,), torch.empty(0, device="meta"))
    assert launches == []
    cuda_route.launch(PROGRAM, "normalize", (4, 0), (32,), torch.empty(0))


@pytest.mark.parametrize("cluster", [(3,), (2, 1), (8,)])
def test_clusters_divide_the_grid(cluster: tuple[int, ...]) -> None:
    with pytest.raises(KernelInputError, match=r"do not divide a grid of \(4,\)"):
        cuda_route.launch(PROGRAM, "normalize", (4,), (32,), torch.empty(1), cluster=cluster)


@pytest.mark.parametrize(("arguments", "found"), [((), "none"), ((torch.empty(1), 2), "cpu")])
def test_tensors_must_be_on_a_gpu(arguments: tuple[object, ...], found: str) -> None:
    with pytest.raises(KernelInputError, match=f"normalize takes tensors .* found {found}"):
        cuda_route.launch(PROGRAM, "normalize", (4,), (32,), *arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
def test_all_blocks_wait_for_each_other_on_a_gpu() -> None:
    x = torch.rand(1 << 20, device="cuda")
    y, total = torch.empty_like(x), torch.zeros(1, device="cuda")
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cuda_route.launch(
            PROGRAM,
            "normalize",
            (blocks,),
            (256,),
            x,
            y,
            total,
            arrived,
            x.numel() // 4,
            1e-6,
            shared_bytes=64 * 1024,
            cooperative=True,
        )
    stream.synchronize()
    torch.testing.assert_close(y, x / x.sum(), rtol=1e-4, atol=0)


class OldConfig:
    """A LaunchConfig whose cooperative launches have another name."""

    def __init__(self, **options: object):
        self.options = options


class NewConfig(OldConfig):
    is_cooperative = False


@pytest.mark.parametrize(
    ("config", "name"), [(OldConfig, "cooperative_launch"), (NewConfig, "is_cooperative")]
)
def test_grids_are_counted_as_cuda_core_does(config: type[OldConfig], name: str) -> None:
    x = torch.empty(1, device="meta")
    with record() as launches:
        cuda_route.launch(
            PROGRAM, "normalize", (8, 6), (32,), x, cluster=(4, 1), cooperative=True, shared_bytes=9
        )
    options = start._config(SimpleNamespace(LaunchConfig=config), launches[0]).options
    assert options == {
        "grid": (2, 6),
        "block": (32,),
        "cluster": (4, 1),
        "shmem_size": 9,
        name: True,
    }


def test_arguments_are_of_eight_bytes() -> None:
    x = torch.zeros(4)
    found = [start._argument(value) for value in (x, x[1:], None, True, 3, 0.5)]
    assert found == [x.data_ptr(), x.data_ptr() + 4, 0, 1, 3, 0.5]
    assert [type(value) for value in found] == [int, int, int, int, int, float]


def test_the_architectures_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    start._arch.cache_clear()
    for capability, arch in {(8, 0): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        start._arch.cache_clear()
        assert start._arch(0) == arch
    start._arch.cache_clear()
