"""How the Triton kernels of ``ssd_scan`` are started: buffers and grids. Needs no Triton.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

# ruff: noqa: N806 - the paper's names A, B, C and D

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.op import Inputs, wide
from fivefold.hybrid_ssm.ops.ssd_scan.tiles import Tiles
from fivefold.kernels.launch import launch

# Heads of a tile of step sizes.
_HEADS = 8
# What is known of each token of each head, as the kernels number it: step
# sizes, sums of logarithms, what those lost by rounding, what is left of the state before the
# chunk, and what is left after it of what the token put in.
_NUM_DECAYS = 5
# Sums of the backward pass: gradients of step sizes, what a token keeps for later chunks, what it
# skips, what passes from it and those before it to those after it in its chunk; then, one for each
# tile of the state, what it takes from before the chunk.
_NUM_SUMS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The kernels by what they make."""

    decays: Any
    states: Any
    cb: Any
    scan: Any
    dstates: Any
    dx: Any
    dcb: Any
    dc: Any
    db: Any
    ddt: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the op.

    Attributes:
        kernels: see above.
        compute: ``COMPUTE`` and ``PRECISION`` of the kernels.
        inputs: of the op; x, B and C as ``rows`` gives them, the others without gaps.
        tiles: how they are cut.
    """

    kernels: Kernels
    compute: dict[str, Any]
    inputs: Inputs
    tiles: Tiles

    @property
    def chunks(self) -> int:
        """How many there are in a sequence."""
        return -(-self.inputs.x.shape[1] // self.tiles.chunk)

    @property
    def heads(self) -> tuple[int, int]:
        """(B, H)."""
        return self.inputs.x.shape[0], self.inputs.x.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, P, N)."""
        return (*self.inputs.x.shape[2:], self.inputs.B.shape[3])

    @property
    def grid_of_heads(self) -> tuple[int, int]:
        """Chunks of all sequences, and heads."""
        return self.heads[0] * self.chunks, self.heads[1]

    @property
    def grid_of_groups(self) -> tuple[int, int]:
        """Chunks of all sequences, and groups."""
        return self.heads[0] * self.chunks, self.inputs.B.shape[2]

    def tiles_of_state(self, size: int) -> int:
        """How many tiles of so many values the state has."""
        return -(-self.inputs.B.shape[3] // size)

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *tensors: Tensor | None,
        strided: tuple[Tensor, ...] = (),
        **constants: Any,
    ) -> None:
        """Start a kernel on tensors, the sizes, and the strides (sequence, token) of tensors."""
        num_tokens, num_heads, head_dim = self.inputs.x.shape[1:]
        num_groups, state = self.inputs.B.shape[2:]
        common: dict[str, Any] = {
            "HAS_DOCUMENTS": self.inputs.documents is not None,
            "CHUNK": self.tiles.chunk,
            "HEAD": self.tiles.head,
            "STATE": self.tiles.state,
            **self.compute,
        }
        taken = {name: value for name, value in common.items() if name in kernel.arg_names}
        taken["num_warps"] = self.tiles.warps
        launch(
            kernel,
            grid,
            *tensors,
            num_tokens,
            num_heads,
            num_heads // num_groups,
            head_dim,
            state,
            *(stride for each in strided for stride in each.stride()[:2]),
            **(taken | constants),
        )

    def start_on_steps(
        self, kernel: Any, *tensors: Tensor | None, strided: Tensor, **constants: Any
    ) -> None:
        """Start a kernel on tiles of step sizes, ``strided`` (B, S, H)."""
        batch, num_heads = self.heads
        softplus, *limits = self.inputs.limits
        launch(
            kernel,
            (batch * self.chunks, -(-num_heads // _HEADS)),
            strided,
            self.inputs.dt_bias,
            self.inputs.A,
            *tensors,
            self.inputs.x.shape[1],
            num_heads,
            *strided.stride(),
            *limits,
            HAS_BIAS=self.inputs.dt_bias is not None,
            SOFTPLUS=softplus,
            COMPUTE=self.compute["COMPUTE"],
            CHUNK=self.tiles.chunk,
            HEADS=_HEADS,
            **constants,
        )

    def decays(self) -> Tensor:
        """What is known of each token, (B, H, 5, W)."""
        documents = self.inputs.documents
        decays = self.empty(*self.heads, _NUM_DECAYS, self.chunks * self.tiles.chunk)
        self.start_on_steps(
            self.kernels.decays,
            documents,
            decays,
            strided=self.inputs.dt,
            HAS_DOCUMENTS=documents is not None,
        )
        return decays

    def walk(
        self, kernel: Any, *tensors: Tensor | None, strided: tuple[Tensor, Tensor], **constants: Any
    ) -> None:
        """Start a kernel whose programs walk over the chunks, each with a part of a state."""
        tile = self.tiles.walk
        constants |= {"STATE": tile, "num_warps": self.tiles.walk_warps}
        grid = (self.heads[0] * self.heads[1], self.tiles_of_state(tile))
        self.start(kernel, grid, *tensors, strided=strided, **constants)

    def states(self, decays: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Those before each chunk, (B, chunks, H, P, N), and the final ones."""
        x, B, batch = self.inputs.x, self.inputs.B, self.heads[0]
        states = self.empty(batch, self.chunks, *self.state_shape, dtype=x.dtype)
        final_state = self.empty(batch, *self.state_shape)
        initial = None if initial_state is None else initial_state.contiguous()
        self.walk(
            self.kernels.states,
            *(x, B, decays, initial, states, final_state),
            strided=(x, B),
            HAS_INITIAL=initial is not None,
        )
        return states, final_state

    def cb(self) -> Tensor:
        """The products of C and B, (B, chunks, G, Q, Q)."""
        B, C, chunk = self.inputs.B, self.inputs.C, self.tiles.chunk
        cb = self.empty(B.shape[0], self.chunks, B.shape[2], chunk, chunk)
        self.start(self.kernels.cb, self.grid_of_groups, B, C, cb, strided=(B, C))
        return cb

    def scan(self, decays: Tensor, states: Tensor, cb: Tensor) -> Tensor:
        """The result (B, S, H, P)."""
        x, C, D, documents = self.inputs.x, self.inputs.C, self.inputs.D, self.inputs.documents
        y = self.empty(*x.shape, dtype=x.dtype)
        self.start(
            self.kernels.scan,
            self.grid_of_heads,
            *(x, C, cb, states, decays, D, documents, y),
            strided=(x, C),
            HAS_D=D is not None,
        )
        return y

    def sums(self) -> Tensor:
        """What the backward pass finds of each token, (B, H, 4 + tiles of the state, W)."""
        num_sums = _NUM_SUMS + self.tiles_of_state(self.tiles.product)
        return self.empty(*self.heads, num_sums, self.chunks * self.tiles.chunk)

    def dstates(
        self,
        dy: Tensor,
        decays: Tensor,
        states: Tensor,
        dinitial: Tensor,
        dfinal_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Those after each chunk; how much of the loss passes through each, (B, H, chunks, T)."""
        C, dstates = self.inputs.C, self.empty(*states.shape, dtype=states.dtype)
        past = self.empty(*self.heads, self.chunks, self.tiles_of_state(self.tiles.walk))
        dfinal = None if dfinal_state is None else dfinal_state.contiguous()
        self.walk(
            self.kernels.dstates,
            *(dy, C, decays, dfinal, states, dstates, dinitial, past),
            strided=(dy, C),
            HAS_FINAL=dfinal is not None,
        )
        return dstates, past

    def dx(self, dy: Tensor, decays: Tensor, cb: Tensor, dstates: Tensor, sums: Tensor) -> Tensor:
        """Of x; of each token, what steps, keeping and skipping sum up to."""
        x, B, D, documents = self.inputs.x, self.inputs.B, self.inputs.D, self.inputs.documents
        dx = self.empty(*x.shape, dtype=x.dtype)
        self.start(
            self.kernels.dx,
            self.grid_of_heads,
            *(dy, x, B, cb, dstates, decays, D, documents, dx, sums),
            strided=(dy, x, B),
            HAS_D=D is not None,
            SUMS=sums.shape[2],
        )
        return dx

    def dcb(self, dy: Tensor, decays: Tensor, cb: Tensor, sums: Tensor) -> Tensor:
        """Of the products of C and B, like them; of each token, what passes it in its chunk."""
        x, documents = self.inputs.x, self.inputs.documents
        dcb = self.empty(*cb.shape, dtype=x.dtype)
        self.start(
            self.kernels.dcb,
            self.grid_of_groups,
            *(dy, x, cb, decays, documents, dcb, sums),
            strided=(dy, x),
            SUMS=sums.shape[2],
            num_warps=8,
        )
        return dcb

    def dc(self, dy: Tensor, decays: Tensor, dcb: Tensor, states: Tensor, sums: Tensor) -> Tensor:
        """Of C; of each token, what it takes of the state before the chunk."""
        B, C = self.inputs.B, self.inputs.C
        dC = self.empty(*C.shape, dtype=C.dtype)
        self.start(
            self.kernels.dc,
            (*self.grid_of_groups, self.tiles_of_state(self.tiles.product)),
            *(dy, B, C, dcb, states, decays, dC, sums),
            strided=(dy, B, C),
            SUMS=sums.shape[2],
            STATE=self.tiles.product,
            num_warps=8,
        )
        return dC

    def db(self, decays: Tensor, dcb: Tensor, dstates: Tensor) -> Tensor:
        """Of B."""
        x, C = self.inputs.x, self.inputs.C
        dB = self.empty(*C.shape, dtype=C.dtype)
        self.start(
            self.kernels.db,
            (*self.grid_of_groups, self.tiles_of_state(self.tiles.product)),
            *(x, C, dcb, dstates, decays, dB),
            strided=(x, C),
            STATE=self.tiles.product,
            num_warps=self.tiles.db_warps,
        )
        return dB

    def ddt(self, decays: Tensor, sums: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of dt; of A and the bias in parts, (B, H, chunks)."""
        dt = self.inputs.dt
        ddt = self.empty(*dt.shape, dtype=dt.dtype)
        dA, dbias = (self.empty(*self.heads, self.chunks) for _ in range(2))
        self.start_on_steps(
            self.kernels.ddt,
            *(decays, sums, past, ddt, dA, dbias),
            strided=dt,
            SUMS=sums.shape[2],
            PAST=past.shape[3],
        )
        return ddt, dA, dbias

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what is computed."""
        return torch.empty(
            shape, dtype=dtype or wide(self.inputs.x.dtype), device=self.inputs.x.device
        )


def rows(x: Tensor) -> Tensor:
    """(B, S, heads, values) where a token's values lie side by side."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
