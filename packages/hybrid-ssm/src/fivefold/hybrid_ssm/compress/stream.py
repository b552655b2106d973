"""A model folder read layer by layer, so that it never has to be in memory as a whole.

Legend: B sequences, S tokens, H hidden width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.files import ModelFiles, load_parameters
from fivefold.hybrid_ssm.hf import EMBEDDING, check_names
from fivefold.hybrid_ssm.model import HybridForCausalLM, Layer
from fivefold.hybrid_ssm.pretrained import read_config
from fivefold.parallel_core import hub
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.losses import SideOutputs
from fivefold.parallel_core.parameters import ParameterTable


class Stream:
    """The layers of a model on disk, each made when it is asked for and freed by whoever asked.

    Args:
        folder: in Hugging Face form.
        dtype: of the parameters that are handed out; those that need it are wider.
        device: where they go.

    Attributes:
        config: the model's.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.config: HybridConfig = read_config(folder)
        self._reader = hub.SafetensorsReader(folder)
        check_names(self.config, self._reader.names())
        self._files = ModelFiles(self._reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def layer(self, index: int) -> Layer:
        """Layer ``index`` with its weights."""
        with torch.device("meta"):
            layer = Layer(self.config, index, SideOutputs())
        loaded: Layer = self._load(f"layers.{index}", layer)
        return loaded

    def embed(self, ids_bs: Tensor) -> Tensor:
        """Hidden states (B, S, H) before the first layer."""
        with torch.device("meta"):
            module = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        x: Tensor = self._load("embed_tokens", module)(ids_bs.to(self.device))
        wide = torch.promote_types(self.dtype, torch.float32)
        return x.to(wide) if self.config.residual_in_fp32 else x

    @property
    def file_dtype(self) -> torch.dtype:
        """What the embedding is in on disk, once scales are applied."""
        return self._files.dtype(EMBEDDING)

    def ends(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of the parameters outside the layers, the embedding first."""
        with torch.device("meta"):
            model = HybridForCausalLM(_without_layers(self.config))
        tied = self.config.tie_word_embeddings
        for name in ("embed_tokens", "norm", *(() if tied else ("lm_head",))):
            module = self._load(name, model.get_submodule(name))
            yield f"{name}.weight", module.weight

    def tail(self) -> "Tail":
        """What comes after the last layer."""
        config = self.config
        with torch.device("meta"):
            whole = HybridForCausalLM(_without_layers(config))
        name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        norm, head = whole.get_submodule("norm"), whole.get_submodule("lm_head")
        return Tail(self._load("norm", norm), self._load(name, head))

    def _load(self, name: str, module: Any) -> Any:
        """Fill a module that was made under any device from the files."""
        holder = _held(name, module)
        holder.to(dtype=self.dtype).to_empty(device=self.device)
        table = ParameterTable.of(holder)
        pieces = [*table.pieces(holder), *table.buffers(holder)]
        load_parameters(pieces, self.config, self._files)
        return holder.get_submodule(name).eval().requires_grad_(False)


class Tail(nn.Module):
    """The last norm and the output layer.

    Attributes:
        norm: before the output layer.
        head: from hidden states to logits.
    """

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        self.norm, self.head = norm, head

    def hidden(self, x_bsh: Tensor) -> Tensor:
        """What the output layer sees (B, S, H)."""
        weight = self.norm.get_parameter("weight")
        out: Tensor = self.norm(x_bsh.to(weight.dtype))
        return out

    def forward(self, x_bsh: Tensor) -> Tensor:
        """Logits (B, S, V)."""
        logits: Tensor = self.head(self.hidden(x_bsh))
        return logits


def _held(name: str, module: nn.Module) -> nn.Module:
    """A module that has ``module`` under the dotted ``name``."""
    first, _, rest = name.partition(".")
    holder = nn.Module()
    holder.add_module(first, _held(rest, module) if rest else module)
    return holder


def _without_layers(config: HybridConfig) -> HybridConfig:
    """The same ends with one layer, which costs nothing on the meta device."""
    return replace(config, pattern=config.pattern[:1], num_nextn_predict_layers=0)


def make_layer(config: HybridConfig, index: int, state: Mapping[str, Tensor]) -> Layer:
    """A layer of a model with given parameters, which it shares."""
    with torch.device("meta"):
        layer = Layer(config, index, SideOutputs())
    layer.load_state_dict(dict(state), strict=True, assign=True)
    return layer.eval().requires_grad_(False)
