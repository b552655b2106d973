"""Calls of ``recurrence``: odd ones for tests, those of models for machine code and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from fivefold.kernels.samples import Cost, Inputs, Maker, OpSamples, Sample
from fivefold.sparse_rnn.ops.recurrence import recurrence
from fivefold.sparse_rnn.ops.recurrence.cells import CELLS
from fivefold.sparse_rnn.ops.recurrence.reference import recurrence_forward


def _sample(
    cell: str,
    steps: int,
    batch: int,
    hidden: int,
    density: float,
    *,
    lengths: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> Sample:
    def inputs(make: Maker) -> Inputs:
        rows = CELLS[cell].num_gates * hidden
        crow, col = _pattern(make, rows, hidden, density)
        scale = (1 + hidden * density) ** -0.5
        memory = CELLS[cell].has_memory
        return {
            "gates": make.normal(steps, batch, rows),
            "h0": make.normal(batch, hidden, scale=0.5),
            "c0": make.normal(batch, hidden) if memory else None,
            "values": make.normal(col.shape[0], scale=scale),
            "crow": crow,
            "col": col,
            "bias_n": make.normal(hidden) if cell == "gru" else None,
            "cell": cell,
            "lengths": None if lengths is None else make.values(lengths),
            "reverse": reverse,
        }

    name = f"{cell} {steps}x{batch}x{hidden} {density:.0%}" + " back" * reverse
    return Sample(name=name + (" ragged" if lengths else ""), inputs=inputs)


def _pattern(make: Maker, rows: int, hidden: int, density: float) -> tuple[Tensor, Tensor]:
    """The same pattern for every maker: as many nonzeros in each row, a row without any first."""
    each = round(density * hidden)
    generator = torch.Generator().manual_seed(rows)
    crow = torch.arange(-1, rows, dtype=torch.int32).clamp(min=0) * each
    drawn = torch.rand((max(rows - 1, 0), hidden), generator=generator).argsort(-1)[:, :each]
    col = drawn.sort(-1).values.to(torch.int32).flatten()
    return crow.to(make.device), col.to(make.device)


def _eager(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a user of torch alone writes."""
    order = ("gates", "h0", "c0", "values", "crow", "col", "bias_n", "lengths", "cell", "reverse")
    arguments = [*(inputs[name] for name in order), False]
    y, h_n, c_n, _ = recurrence_forward(*arguments)
    return y, h_n, c_n


def cost(inputs: Inputs) -> tuple[Cost, Cost]:
    """Forward reads the nonzeros once and the gates; backward reads them too, and what was kept."""
    gates, values, h0 = inputs["gates"], inputs["values"], inputs["h0"]
    nonzeros = values.numel() * (values.element_size() + 4)
    steps = gates.numel() * gates.element_size()
    outputs = gates.shape[0] * h0.numel() * gates.element_size()
    return Cost(bytes=nonzeros + steps + outputs), Cost(bytes=2 * nonzeros + 3 * steps + outputs)


SAMPLES = OpSamples(
    name="recurrence",
    function=recurrence,
    small=(
        _sample("lstm", 3, 2, 37, 0.3),
        _sample("gru", 4, 3, 19, 0.4, lengths=(2, 4, 1), reverse=True),
        _sample("lstm", 3, 3, 7, 0.5, lengths=(1, 3, 2), reverse=True),
        _sample("rnn_tanh", 3, 9, 17, 0.2),
        _sample("rnn_relu", 2, 5, 33, 0.3, lengths=(2, 1, 2, 1, 2)),
        _sample("gru", 2, 1, 5, 0.0),
        _sample("rnn_tanh", 2, 1, 1, 1.0),
    ),
    real=(_sample("lstm", 16, 4, 2304, 0.1),),
    laptop=(
        _sample("lstm", 50, 1, 1024, 0.1),
        _sample("lstm", 50, 1, 1024, 0.3),
        _sample("gru", 50, 4, 1024, 0.1),
    ),
    cost=cost,
    eager=_eager,
    dtypes=(torch.float64, torch.float32, torch.bfloat16),
    real_dtypes=(torch.float32,),
    follows_indices=True,
)
