"""The optimizer of fivefold-kernels on what fivefold-parallel-core leaves on each rank."""

import pytest
import torch
from torch import Tensor, nn

from fivefold.kernels import FusedAdamW
from fivefold.parallel_core import Topology, launch, parallelize
from fivefold.parallel_core.data_parallel import Precision, gather_mains, reduce_gradients
from fivefold.parallel_core.data_parallel_config import DataParallelConfig, Form
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.styles import ColumnParallel, Replicate, RowParallel
from fivefold.parallel_core.training.optimizer import (
    TORCH_ADAMW,
    AdamWConfig,
    MakeAdamW,
    ShardedAdamW,
)

FORMS: list[Form] = ["replicate", "zero1", "zero2", "zero3"]
PLAN = {
    "norm": Replicate(sequence=False),
    "up": ColumnParallel(sequence=False),
    "down": RowParallel(sequence=False),
}


class Model(nn.Module):
    """A norm and two linears; 10 features divide by no number of ranks here but 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 14), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


def trained(form: Form, make: MakeAdamW, dtype: str) -> list[Tensor]:
    """This rank's pieces after three steps on its own data."""
    topology = Topology(Layout(4, tp=2))
    model = Model().to(torch.float64 if dtype == "float64" else torch.float32)
    precision = Precision(
        parameters="float64" if dtype == "float64" else "float32",
        compute=dtype,  # type: ignore[arg-type]
    )
    data = DataParallelConfig(form=form)
    table = parallelize(model, topology, PLAN, precision, data_parallel=data)
    pieces = table.pieces(model)
    optimizer = ShardedAdamW(pieces, AdamWConfig(), make)
    for step in range(3):
        gather_mains(model)
        generator = torch.Generator().manual_seed(10 * step + topology.rank("dp"))
        x = torch.randn(6, 10, generator=generator).to(precision.compute_dtype)
        model(x).square().sum().backward()
        reduce_gradients(model)
        optimizer.step(1e-2)
    return [piece.tensor.clone() for piece in pieces]


def distances(form: Form, dtype: str) -> list[float]:
    """Of each piece, between the two optimizers; and how far both have come."""
    torch.set_num_threads(1)
    ours, theirs = (trained(form, make, dtype) for make in (FusedAdamW, TORCH_ADAMW))
    return [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True) if a.numel()]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_fused_optimizer_trains_every_form_as_torchs_does(dtype: str) -> None:
    def on_a_rank() -> dict[str, list[float]]:
        return {form: distances(form, dtype) for form in FORMS}

    limit = 1e-14 if dtype == "float64" else 1e-6
    for found in launch(on_a_rank, 4, timeout=300):
        assert set(found) == set(FORMS)
        assert all(distance <= limit for form in FORMS for distance in found[form])
        assert all(found[form] for form in FORMS)
