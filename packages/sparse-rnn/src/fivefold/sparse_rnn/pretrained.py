"""Layers that are saved, loaded and uploaded."""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fivefold.sparse_rnn import files
from fivefold.sparse_rnn.errors import SparseRNNFileError
from fivefold.sparse_rnn.weights import SparseWeights


class PretrainedWeights(SparseWeights):
    """Weights of a layer with their way into files and out of them.

    Attributes:
        dense_class: torch's layer of the same kind.
    """

    dense_class: ClassVar[type[nn.RNNBase]]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a layer that ``save_pretrained`` wrote, in evaluation mode.

        Args:
            name_or_path: its folder, or a repository of the Hugging Face Hub.
            dtype: of the parameters; the default is the file's.
            revision: branch, tag or commit of the repository.

        Raises:
            SparseRNNFileError: there is none, or it is damaged or of another class.
        """
        config, state = files.read(name_or_path, revision)
        allowed = (
            {"RNN_TANH", "RNN_RELU"} if cls.dense_class is nn.RNN else {cls.dense_class.__name__}
        )
        if config["mode"] not in allowed:
            raise SparseRNNFileError(
                f"{name_or_path} holds a {config['mode']}, not a {cls.__name__}"
            )
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
        options = {n: config[n] for n in (*names, "bidirectional", "nonlinearity") if n in config}
        layer = cls(density=0.0, dtype=dtype or state["weight_ih_l0"].dtype, **options)
        try:
            layer.load_state_dict(state)
        except RuntimeError as error:
            raise SparseRNNFileError(
                f"{name_or_path} does not fit its config.json: {error}"
            ) from None
        return layer.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and a card: ``fivefold.sparse_rnn.files``.

        Args:
            folder: made if missing; a card that is there is kept.
        """
        sizes = {n: getattr(self, n) for n in ("mode", "input_size", "hidden_size", "num_layers")}
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            if name.startswith("weight_hh"):
                crow, col = self.pattern_of(name)
                fields = files.compress(parameter, crow, col, self.hidden_size)
                tensors |= {f"{name}.{field}": tensor for field, tensor in fields.items()}
            else:
                tensors[name] = parameter.detach().cpu().contiguous()
        files.write(folder, sizes | self._options() | {"density": self.density}, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload layer",
        token: str | None = None,
    ) -> str:
        """Save and upload; the repository's address. Arguments as ``hub.push``."""
        return files.push(
            self.save_pretrained, repo_id, private=private, token=token, message=commit_message
        )

    def _options(self) -> dict[str, Any]:
        """Arguments of torch's layer beside its sizes."""
        return {"bias": self.bias, "bidirectional": self.bidirectional}
