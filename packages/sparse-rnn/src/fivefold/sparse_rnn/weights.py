"""The weights of a sparse recurrent layer under the names that torch.nn gives them.

``weight_hh_*`` is a parameter of the nonzeros (N,) alone, row by row; optimizers, norms and
gradients see nothing else. In a state dict it is the dense matrix (G*H, H), as torch has it.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.sparse_rnn import pattern
from fivefold.sparse_rnn.dense import NUM_GATES, Weight, find_weight, suffixes
from fivefold.sparse_rnn.errors import SparseRNNInputError


class SparseWeights(nn.Module):
    """Parameters of all layers and directions, and their way into and out of a state dict.

    Args:
        mode: as torch spells it, "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        sizes: input size, hidden size, number of layers.
        bias: whether there are biases.
        bidirectional: whether layers run both ways.
        density: share of nonzeros of each recurrent matrix, drawn at random.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        mode: str,
        sizes: tuple[int, int, int],
        *,
        bias: bool,
        bidirectional: bool,
        density: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        pattern.check_density(density)
        self.mode = mode
        self.input_size, self.hidden_size, self.num_layers = sizes
        self.bias = bias
        self.bidirectional = bidirectional
        rows = NUM_GATES[mode] * self.hidden_size
        for layer, suffix in self._suffixes():
            width = self.input_size if layer == 0 else self.hidden_size * (1 + bidirectional)
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            mask = pattern.random_mask(rows, self.hidden_size, density)
            self._add_pattern(suffix, mask, device)
            shapes["weight_hh"] = (int(mask.sum()),)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                if kind in shapes:
                    empty = torch.empty(shapes[kind], device=device, dtype=dtype)
                    self.register_parameter(f"{kind}_{suffix}", nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights as torch does: evenly up to ``1 / sqrt(hidden_size)``."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def density(self) -> float:
        """Share of the recurrent matrices' values that are kept."""
        names = self.recurrent_names()
        held = sum(self.get_parameter(name).numel() for name in names)
        whole = sum(self._num_rows() * self.hidden_size for _ in names)
        return held / max(whole, 1)

    def recurrent_names(self) -> list[str]:
        """Names of the sparse parameters: ``weight_hh_l0`` and so on."""
        return [f"weight_hh_{suffix}" for _, suffix in self._suffixes()]

    def dense_weight(self, name: str) -> Tensor:
        """A recurrent matrix (G*H, H) with its zeros; gradients reach the nonzeros."""
        crow, col = self.pattern_of(name)
        return pattern.to_dense(self.get_parameter(name), crow, col, self.hidden_size)

    def mask(self, name: str) -> Tensor:
        """Where a recurrent matrix (G*H, H) may be other than zero."""
        crow, col = self.pattern_of(name)
        return pattern.to_mask(crow, col, self.hidden_size)

    def pattern_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Where rows begin (G*H + 1,) and the columns (N,) of a recurrent matrix's nonzeros."""
        return self.get_buffer(f"{name}_crow"), self.get_buffer(f"{name}_col")

    def set_weight(self, name: str, weight: Tensor, mask: Tensor | None = None) -> None:
        """Give a recurrent matrix other nonzeros; the parameter stays the same object.

        An optimizer that has state of the old nonzeros must be made anew.

        Args:
            name: such as ``weight_hh_l0``.
            weight: (G*H, H), dense.
            mask: (G*H, H), what is kept; the default is what is not zero.
        """
        shape = (self._num_rows(), self.hidden_size)
        for each in (weight, mask):
            if each is not None and tuple(each.shape) != shape:
                raise SparseRNNInputError(f"{name} is of shape {shape}, found {tuple(each.shape)}")
        mask = weight != 0 if mask is None else mask != 0
        parameter = self.get_parameter(name)
        values = weight.detach()[mask].to(dtype=parameter.dtype, device=parameter.device)
        self._add_pattern(name.removeprefix("weight_hh_"), mask, parameter.device)
        parameter.data = values
        parameter.grad = None

    def kept_inputs(self, suffix: str) -> Tensor | None:
        """Where ``weight_ih`` may be other than zero; None is everywhere."""
        return getattr(self, f"weight_ih_{suffix}_kept", None)

    def set_kept_inputs(self, suffix: str, mask: Tensor) -> None:
        """Keep the zeros of ``weight_ih`` from getting gradients."""
        kept = None if bool(mask.all()) else mask
        self.register_buffer(f"weight_ih_{suffix}_kept", kept, persistent=False)

    def flatten_parameters(self) -> None:
        """Nothing to do here; torch's layers have it, so programs call it."""

    def _suffixes(self) -> Iterator[tuple[int, str]]:
        return suffixes(self.num_layers, self.bidirectional)

    def _num_rows(self) -> int:
        return NUM_GATES[self.mode] * self.hidden_size

    def _add_pattern(self, suffix: str, mask: Tensor, device: torch.device | str | None) -> None:
        crow, col = pattern.from_mask(mask)
        for kind, tensor in (("crow", crow), ("col", col)):
            name = f"weight_hh_{suffix}_{kind}"
            self.register_buffer(name, tensor.to(device or tensor.device), persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.recurrent_names():
            weight = self.dense_weight(name)
            destination[prefix + name] = weight if keep_vars else weight.detach()
            # A kept value that happens to be zero would be lost: then the mask goes along.
            if bool((self.get_parameter(name) == 0).any()):
                destination[f"{prefix}{name}_mask"] = self.mask(name).to(weight.dtype)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = dict(state_dict)
        for _, suffix in self._suffixes():
            self._take(ours, prefix, f"weight_hh_{suffix}", error_msgs)
            self._take(ours, prefix, f"weight_ih_{suffix}", error_msgs)
        super()._load_from_state_dict(
            ours, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take(self, found: dict[str, Any], prefix: str, name: str, errors: list[str]) -> None:
        """Put a matrix in the form that the parameter has, and adopt its zeros."""
        weight = find_weight(found, prefix + name)
        if weight is None:
            return
        for ending in ("_orig", "_mask"):
            found.pop(f"{prefix}{name}{ending}", None)
        found[prefix + name] = weight.values
        if name.startswith("weight_ih"):
            if weight.values.shape == self.get_parameter(name).shape:
                mask = weight.mask.to(self.get_parameter(name).device)
                self.set_kept_inputs(name.removeprefix("weight_ih_"), mask)
            return
        shape = (self._num_rows(), self.hidden_size)
        if tuple(weight.values.shape) != shape:
            errors.append(f"{prefix}{name} has shape {tuple(weight.values.shape)}, not {shape}")
            found[prefix + name] = self.get_parameter(name).detach()
            return
        found[prefix + name] = self._adopt(name, weight)

    def _adopt(self, name: str, weight: Weight) -> Tensor:
        """The nonzeros (N,) of a loaded matrix, in a pattern that holds them."""
        mask = self.mask(name)
        loaded = weight.mask.to(mask.device)
        # A weight that is zero in the file keeps its place if nothing contradicts.
        if bool((loaded & ~mask).any()):
            self.set_weight(name, weight.values.to(mask.device), loaded)
            mask = loaded
        return weight.values.to(mask.device)[mask]
