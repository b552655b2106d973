"""One token of the selective state-space scan: what generation does at each step."""

import math

from torch import Tensor

from fivefold.hybrid_ssm.ops.state_update import op

__all__ = ["state_update", "state_update_"]


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - the paper's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` of one token from a state; has gradients.

    Args:
        state: (B, H, P, N), stays as it is.
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N).
        C: like B.
        D: see ``ssd_scan``, as what follows.
        z: like x.
        dt_bias: (H,).
        dt_softplus: whether dt goes through softplus.
        dt_limit: least and greatest step size.
        backend: the default is the best there is.

    Returns:
        ``y`` like x, and the new state, like state.

    Raises:
        HybridInputError: the tensors do not fit together.

    >>> import torch
    >>> one = torch.ones(1, 1, 1)
    >>> y, state = state_update(one.unsqueeze(3), one, one[0], torch.zeros(1), one, 3 * one)
    >>> y.item(), state.item()
    (6.0, 2.0)
    """
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    inputs = op.Inputs(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *limits)
    return op.apply(inputs, backend)


def state_update_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str | None = None,
) -> Tensor:
    """``state_update`` that writes the new state over the old one and returns ``y``.

    Raises:
        HybridInputError: the tensors do not fit together, or one of them requires a gradient.
    """
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    inputs = op.Inputs(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *limits)
    return op.apply_(inputs, backend)
