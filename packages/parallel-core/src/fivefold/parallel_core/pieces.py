"""What the table of parameters is about: how one parameter lies, and what a rank holds of it."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from fivefold.parallel_core.box import Box

# Axes of each view that are not data axes: a parameter is either sharded or replicated over them.
_MODEL_AXES = {"dp-cp": ("tp",), "edp": ("ep", "etp")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How one parameter lies over the ranks.

    Attributes:
        shape: of the whole parameter, without padding.
        sharded: (dim, axis) of every sharded dim. An axis may be a factor such as "tp//2", where
            pairs of neighbours along "tp" hold equal pieces (see ``Topology.axis``).
        partial: axes over which backward leaves a part of the gradient on each rank, besides the
            data axes. A norm's weight under sequence parallelism is partial over "tp".
        data: the axes whose ranks see other data for the same values: "dp-cp" in the attention
            view, "edp" in the expert view.
    """

    shape: tuple[int, ...]
    sharded: tuple[tuple[int, str], ...] = ()
    partial: tuple[str, ...] = ()
    data: str = "dp-cp"

    def replicated(self) -> tuple[str, ...]:
        """Axes of the view, or factors of them, whose ranks all hold the same values."""
        taken = {axis.partition("//")[0]: axis for _, axis in self.sharded}
        rests = (taken.get(axis, "").replace("//", "%") or axis for axis in _MODEL_AXES[self.data])
        return tuple(rest for rest in rests if rest not in taken)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What this rank holds of one parameter, or of a buffer, which has no gradient.

    Attributes:
        name: global name.
        parameter: what the optimizer steps on: the module's parameter, a DTensor under FSDP, or
            this rank's main parameter under ZeRO-1.
        box: where the piece lies in the whole parameter.
        placement: its row of the table.
        counted: whether this rank counts it in sums over all ranks; of the ranks that hold equal
            copies one does.
    """

    name: str
    parameter: Tensor
    box: Box
    placement: Placement
    counted: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.placement.shape

    @property
    def local(self) -> Tensor:
        """The rank's values with padding, as the optimizer steps on them."""
        return local_values(self.parameter)

    @property
    def tensor(self) -> Tensor:
        """The rank's values without padding: ``tensor.shape == box.size``; writable in place."""
        return self.trim(self.local)

    @property
    def grad(self) -> Tensor | None:
        """The gradient of ``local``, or None."""
        grad = self.parameter.grad
        return None if grad is None else local_values(grad)

    def trim(self, local: Tensor) -> Tensor:
        """The part of a tensor shaped like ``local`` that is not padding."""
        return local[tuple(slice(0, size) for size in self.box.size)]


def local_values(tensor: Tensor) -> Tensor:
    """The plain local tensor of a parameter or gradient, detached and sharing its memory."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()
