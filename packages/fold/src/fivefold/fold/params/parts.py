"""What a parameter of ours is made of under the names of others, and what collects that.

A table says for each of our parameters which parts it is the concatenation of, along the first dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Style = Literal["alphafold", "openfold", "mlperf"]
STYLES: tuple[Style, ...] = ("alphafold", "openfold", "mlperf")

_ROOT = "alphafold/alphafold_iteration/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some rows of one of our parameters.

    Attributes:
        num_rows: how many.
        alphafold: key in AlphaFold's ``.npz``.
        block: place along the first dim of that array; None where it is no stack of blocks.
        shape: of the array, or of its block.
        openfold: name in OpenFold's version 2.
        mlperf: name in MLPerf's reference.
    """

    num_rows: int
    alphafold: str
    block: int | None
    shape: tuple[int, ...]
    openfold: str
    mlperf: str

    def name(self, style: Style) -> str:
        """The name in one of the two styles of flat dictionaries."""
        return self.openfold if style == "openfold" else self.mlperf


Table = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True, slots=True)
class At:
    """A module under its names: ours, AlphaFold's (with the block of a stack), the two others'."""

    ours: str
    alphafold: str
    openfold: str
    mlperf: str
    block: int | None = None

    def sub(self, ours: str, alphafold: str, openfold: str, mlperf: str | None = None) -> "At":
        """A module inside; an empty name stays at this one."""
        names = (ours, alphafold, openfold, openfold if mlperf is None else mlperf)
        separators = (".", "/", ".", ".")
        held = (self.ours, self.alphafold, self.openfold, self.mlperf)
        ours, alphafold, openfold, mlperf = (
            separator.join(part for part in (old, new) if part)
            for old, new, separator in zip(held, names, separators, strict=True)
        )
        return At(ours, alphafold, openfold, mlperf, self.block)

    def in_block(self, ours: str, number: int) -> "At":
        """Block ``number`` of a stack."""
        openfold, mlperf = (f"{name}.blocks.{number}" for name in (self.openfold, self.mlperf))
        return At(ours, self.alphafold, openfold, mlperf, number)


@dataclass(slots=True)
class Maker:
    """Collects the table; shapes are those of our model."""

    shapes: Mapping[str, tuple[int, ...]]
    table: dict[str, tuple[Part, ...]] = field(default_factory=dict)

    def part(self, at: At, leaf: str, name: str, num_rows: int, shape: tuple[int, ...]) -> Part:
        """A part whose leaf is called ``leaf`` by AlphaFold and ``name`` by the others.

        A leaf that begins with two slashes lies in the module itself.
        """
        return Part(
            num_rows=num_rows,
            alphafold=_ROOT + at.alphafold + ("" if leaf.startswith("/") else "//") + leaf,
            block=at.block,
            shape=shape,
            openfold=f"{at.openfold}.{name}",
            mlperf=f"{at.mlperf}.{name}",
        )

    def joined(self, name: str, *parts: Part) -> None:
        """One of our parameters of several parts."""
        found, told = self.shapes[name][0], sum(part.num_rows for part in parts)
        if found != told:
            raise ValueError(f"{name} has {found} rows, its parts have {told}")
        self.table[name] = parts

    def linear(self, at: At, *, bias: bool = True) -> None:
        """A linear layer."""
        num_out, num_in = self.shapes[f"{at.ours}.weight"]
        shape = (num_in, num_out)
        self.joined(f"{at.ours}.weight", self.part(at, "weights", "weight", num_out, shape))
        if bias:
            self.joined(f"{at.ours}.bias", self.part(at, "bias", "bias", num_out, (num_out,)))

    def norm(self, at: At) -> None:
        """A layer norm."""
        (size,) = self.shapes[f"{at.ours}.weight"]
        for ours, leaf in (("weight", "scale"), ("bias", "offset")):
            self.joined(f"{at.ours}.{ours}", self.part(at, leaf, ours, size, (size,)))

    def heads(self, at: At, name: str, leaf: str, num_heads: int, num_rows: int) -> Part:
        """A projection (channels, heads, width) of attention, ``num_rows`` of one of ours."""
        num_in = self.shapes[name][1]
        shape = (num_in, num_heads, num_rows // num_heads)
        return self.part(at, f"{leaf}_w", f"linear_{leaf[0]}.weight", num_rows, shape)

    def output(self, at: At, num_heads: int) -> None:
        """What follows attention."""
        num_out, num_in = self.shapes[f"{at.ours}.linear_o.weight"]
        shape = (num_heads, num_in // num_heads, num_out)
        weight = self.part(at, "output_w", "linear_o.weight", num_out, shape)
        self.joined(f"{at.ours}.linear_o.weight", weight)
        bias = self.part(at, "output_b", "linear_o.bias", num_out, (num_out,))
        self.joined(f"{at.ours}.linear_o.bias", bias)

    def attention(self, at: At, num_heads: int) -> None:
        """Gated self-attention."""
        name = f"{at.ours}.linear_qkvg.weight"
        rows = self.shapes[name][0] // 4
        leaves = ("query", "key", "value", "gating")
        self.joined(name, *(self.heads(at, name, leaf, num_heads, rows) for leaf in leaves))
        gate = (num_heads, rows // num_heads)
        bias = self.part(at, "gating_b", "linear_g.bias", rows, gate)
        self.joined(f"{at.ours}.gate_bias", bias)
        self.output(at, num_heads)

    def bias_of_pairs(self, at: At, name: str, openfold: str) -> None:
        """The projection of pairs to a bias of each head."""
        num_out, num_in = self.shapes[name]
        part = self.part(at, "feat_2d_weights", f"{openfold}.weight", num_out, (num_in, num_out))
        self.joined(name, part)
