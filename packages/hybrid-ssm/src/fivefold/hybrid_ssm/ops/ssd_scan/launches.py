"""How the Triton kernels of ``ssd_scan`` are started: tiles, buffers, grids. Needs no Triton.

Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values of
state, W tokens padded to whole chunks.
"""

# ruff: noqa: N806 - the paper's names A, B, C and D

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fivefold.hybrid_ssm.ops.ssd_scan.op import wide
from fivefold.kernels.launch import launch, num_sms
from fivefold.kernels.sizes import next_power_of_2

# Heads of a tile of step sizes.
_HEADS = 8
# What is known of each token of each head, as the kernels number it: DECAYS in triton.py are step
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
    dc: Any
    db: Any
    ddt: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the op.

    Attributes:
        kernels: see above.
        compute: ``COMPUTE`` and ``PRECISION`` of the kernels.
        x: see the op, as what follows; x, B and C as ``rows`` gives them.
        limits: whether there is softplus, least and greatest step size.
        chunk: Q.
    """

    kernels: Kernels
    compute: dict[str, Any]
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    documents: Tensor | None
    limits: tuple[bool, float, float]
    chunk: int

    @property
    def chunks(self) -> int:
        """How many there are in a sequence."""
        return -(-self.x.shape[1] // self.chunk)

    @property
    def heads(self) -> tuple[int, int]:
        """(B, H)."""
        return self.x.shape[0], self.x.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, P, N)."""
        return self.x.shape[2], self.x.shape[3], self.B.shape[3]

    @property
    def head_tile(self) -> int:
        """P as tiles have it."""
        return max(16, next_power_of_2(self.x.shape[3]))

    @property
    def state_tile(self) -> int:
        """Values of state that are taken at once."""
        return max(16, min(128, next_power_of_2(self.B.shape[3])))

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *tensors: Tensor | None,
        strided: tuple[Tensor, ...] = (),
        **constants: Any,
    ) -> None:
        """Start a kernel on tensors, the sizes, and the strides (sequence, token) of tensors."""
        num_tokens, num_heads, head_dim = self.x.shape[1:]
        num_groups, state = self.B.shape[2:]
        common: dict[str, Any] = {
            "HAS_DOCUMENTS": self.documents is not None,
            "CHUNK": self.chunk,
            "HEAD": self.head_tile,
            "STATE": self.state_tile,
            **self.compute,
        }
        taken = {name: value for name, value in common.items() if name in kernel.arg_names}
        taken["num_warps"] = 8 if max(self.chunk, self.head_tile) > 64 else 4
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

    def decays(self) -> Tensor:
        """What is known of each token, (B, H, 5, W)."""
        batch, num_heads = self.heads
        decays = self.empty(batch, num_heads, _NUM_DECAYS, self.chunks * self.chunk)
        launch(
            self.kernels.decays,
            (batch * self.chunks, -(-num_heads // _HEADS)),
            self.dt,
            self.bias,
            self.A,
            self.documents,
            decays,
            self.x.shape[1],
            num_heads,
            *self.dt.stride(),
            *self.limits[1:],
            HAS_BIAS=self.bias is not None,
            SOFTPLUS=self.limits[0],
            HAS_DOCUMENTS=self.documents is not None,
            COMPUTE=self.compute["COMPUTE"],
            CHUNK=self.chunk,
            HEADS=_HEADS,
        )
        return decays

    def states(self, decays: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Those before each chunk, (B, chunks, H, P, N), and the final ones."""
        batch, num_heads = self.heads
        states = self.empty(batch, self.chunks, *self.state_shape, dtype=self.x.dtype)
        final_state = self.empty(batch, *self.state_shape)
        tile, num_tiles = self.walk()
        self.start(
            self.kernels.states,
            (batch * num_heads, num_tiles),
            self.x,
            self.B,
            decays,
            None if initial_state is None else initial_state.contiguous(),
            states,
            final_state,
            strided=(self.x, self.B),
            HAS_INITIAL=initial_state is not None,
            STATE=tile,
        )
        return states, final_state

    def cb(self) -> Tensor:
        """The products of C and B, (B, chunks, G, Q, Q)."""
        num_groups = self.B.shape[2]
        cb = self.empty(self.x.shape[0], self.chunks, num_groups, self.chunk, self.chunk)
        grid = (self.x.shape[0] * self.chunks, num_groups)
        self.start(self.kernels.cb, grid, self.B, self.C, cb, strided=(self.B, self.C))
        return cb

    def scan(self, decays: Tensor, states: Tensor, cb: Tensor) -> Tensor:
        """The result (B, S, H, P)."""
        y = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.start(
            self.kernels.scan,
            (self.x.shape[0] * self.chunks, self.x.shape[2]),
            self.x,
            self.C,
            cb,
            states,
            decays,
            self.D,
            self.documents,
            y,
            strided=(self.x, self.C),
            HAS_D=self.D is not None,
        )
        return y

    def sums(self) -> Tensor:
        """What the backward pass finds of each token, (B, H, 4 + tiles of the state, W)."""
        num_tiles = -(-self.B.shape[3] // self.product_tile)
        return self.empty(*self.heads, _NUM_SUMS + num_tiles, self.chunks * self.chunk)

    def dstates(
        self,
        dy: Tensor,
        decays: Tensor,
        states: Tensor,
        dinitial: Tensor,
        dfinal_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Those after each chunk; how much of the loss passes through each, (B, H, chunks, T)."""
        dstates = self.empty(*states.shape, dtype=states.dtype)
        tile, num_tiles = self.walk()
        past = self.empty(*self.heads, self.chunks, num_tiles)
        self.start(
            self.kernels.dstates,
            (self.heads[0] * self.heads[1], num_tiles),
            dy,
            self.C,
            decays,
            None if dfinal_state is None else dfinal_state.contiguous(),
            states,
            dstates,
            dinitial,
            past,
            strided=(dy, self.C),
            HAS_FINAL=dfinal_state is not None,
            STATE=tile,
        )
        return dstates, past

    def dx(self, dy: Tensor, decays: Tensor, cb: Tensor, dstates: Tensor, sums: Tensor) -> Tensor:
        """Of x; of each token, what steps, keeping and skipping sum up to."""
        dx = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.start(
            self.kernels.dx,
            (self.x.shape[0] * self.chunks, self.x.shape[2]),
            dy,
            self.x,
            self.B,
            cb,
            dstates,
            decays,
            self.D,
            self.documents,
            dx,
            sums,
            strided=(dy, self.x, self.B),
            HAS_D=self.D is not None,
            SUMS=sums.shape[2],
        )
        return dx

    @property
    def product_tile(self) -> int:
        """Values of state in a tile of the gradients of B and C, for which wide ones leave less."""
        is_wide = self.head_tile > 64 or self.B.shape[3] > 128
        return min(self.state_tile, 64 if is_wide else 128)

    def products(
        self,
        dy: Tensor,
        decays: Tensor,
        cb: Tensor,
        states: Tensor,
        dstates: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of B and C; of each token, what passes it and what it takes."""
        dB, dC = (self.empty(*self.B.shape, dtype=self.x.dtype) for _ in range(2))
        dcb = self.empty(*cb.shape, dtype=self.x.dtype)
        num_tiles = sums.shape[2] - _NUM_SUMS
        grid = (self.x.shape[0] * self.chunks, self.B.shape[2], num_tiles)
        self.start(
            self.kernels.dc,
            grid,
            dy,
            self.x,
            self.B,
            self.C,
            cb,
            states,
            decays,
            self.documents,
            dC,
            dcb,
            sums,
            strided=(dy, self.x, self.B, self.C),
            SUMS=sums.shape[2],
            STATE=self.product_tile,
            num_warps=8,
        )
        self.start(
            self.kernels.db,
            grid,
            self.x,
            self.C,
            dcb,
            dstates,
            decays,
            dB,
            strided=(self.x, self.C),
            STATE=self.product_tile,
            num_warps=8,
        )
        return dB, dC

    def ddt(self, decays: Tensor, sums: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of dt; of A and the bias in parts, (B, H, chunks)."""
        batch, num_heads = self.heads
        ddt = self.empty(*self.dt.shape, dtype=self.dt.dtype)
        dA, dbias = (self.empty(batch, num_heads, self.chunks) for _ in range(2))
        launch(
            self.kernels.ddt,
            (batch * self.chunks, -(-num_heads // _HEADS)),
            self.dt,
            self.bias,
            self.A,
            decays,
            sums,
            past,
            ddt,
            dA,
            dbias,
            self.x.shape[1],
            num_heads,
            *self.dt.stride(),
            *self.limits[1:],
            HAS_BIAS=self.bias is not None,
            SOFTPLUS=self.limits[0],
            COMPUTE=self.compute["COMPUTE"],
            SUMS=sums.shape[2],
            PAST=past.shape[3],
            CHUNK=self.chunk,
            HEADS=_HEADS,
        )
        return ddt, dA, dbias

    def walk(self) -> tuple[int, int]:
        """How programs that walk over the chunks share a head's state: tile and their number."""
        state, tile = self.B.shape[3], self.state_tile
        if self.heads[0] * self.heads[1] * -(-state // tile) < 2 * num_sms(self.x):
            tile = max(16, tile // 2)
        return tile, -(-state // tile)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what is computed."""
        return torch.empty(shape, dtype=dtype or wide(self.x.dtype), device=self.x.device)


def chunk_of(dtype: torch.dtype, asked: int, largest: int) -> int:
    """Q: a power of two, of at least the 16 rows that a tensor-core product has.

    Args:
        dtype: of x; float32 leaves half the room.
        asked: by the caller, 0 for none.
        largest: that the kernels have room for in bfloat16.
    """
    largest = largest if dtype.itemsize == 2 else 64
    return max(16, min(largest, next_power_of_2(asked or largest)))


def rows(x: Tensor) -> Tensor:
    """(B, S, heads, values) where a token's values lie side by side."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
