"""What launches know of the device that they are for."""

import pytest
import torch

from fivefold.kernels import attention
from fivefold.kernels.launch import Launch, TensorCores, record, tensor_cores


@pytest.mark.parametrize(
    ("capability", "cores"),
    [
        ((8, 0), TensorCores.REGISTERS),
        ((8, 9), TensorCores.REGISTERS),
        ((9, 0), TensorCores.SHARED_MEMORY),
        ((10, 0), TensorCores.TENSOR_MEMORY),
        ((10, 3), TensorCores.TENSOR_MEMORY),
        ((12, 0), TensorCores.REGISTERS),
    ],
)
def test_tensor_cores_are_those_of_the_architecture(
    capability: tuple[int, int], cores: TensorCores
) -> None:
    x = torch.empty(1, device="meta")
    with record(capability):
        assert tensor_cores(x) is cores
        with record():
            assert tensor_cores(x) is TensorCores.SHARED_MEMORY
        assert tensor_cores(x) is cores
    assert tensor_cores(x) is tensor_cores(torch.empty(1)) is TensorCores.SHARED_MEMORY


def test_launches_are_recorded_for_the_architecture() -> None:
    query = torch.empty(1, 2, 256, 64, device="meta", dtype=torch.bfloat16)
    warps = []
    for capability in ((8, 0), (9, 0), (10, 0)):
        with record(capability) as launches:
            attention(query, query, query, backend="triton")
        (launch,) = launches
        assert isinstance(launch, Launch)
        warps.append(launch.num_warps)
    assert warps == [8, 4, 4]
