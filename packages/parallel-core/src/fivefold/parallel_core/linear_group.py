"""Several linear layers that read one input."""

from collections.abc import Mapping

from torch import Tensor, nn


class LinearGroup(nn.Module):
    """Linear layers of the same input, called together: ``q, k, v = group(x)``.

    One module instead of several calls lets a parallel style gather a sequence-sharded input
    once for all of them (arXiv 2205.05198, section 4.2.2: "shared QKV input").

    Args:
        linears: name to ``nn.Linear``; the names are kept as submodule names, and all
            ``in_features`` must be equal.

    Raises:
        ValueError: the linears do not read inputs of one width.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]):
        super().__init__()
        widths = {name: linear.in_features for name, linear in linears.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(
                f"LinearGroup reads one input; found in_features {widths}, they must be equal"
            )
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(..., in_features)`` to one ``(..., out_features)`` for each linear, in order."""
        return tuple(linear(x) for linear in self.children())
