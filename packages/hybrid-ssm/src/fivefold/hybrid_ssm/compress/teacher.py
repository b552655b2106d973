"""The parent's logits in a distillation: computed for each batch, or kept on disk.

Legend: B sequences, S tokens, V vocabulary of this rank.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.parallel_core.collectives import sum_over
from fivefold.parallel_core.files import atomic_write_bytes
from fivefold.parallel_core.topology import Topology


class Teacher:
    """Gives logits (B, S, V) of what this rank holds of a batch.

    Args:
        load: makes the model; called when logits are first needed that are not kept.
        topology: the ranks.
        cache: folder of kept logits, which other students of the same parent may share; None
            keeps none.
    """

    def __init__(
        self, load: Callable[[], HybridForCausalLM], topology: Topology, cache: Path | None = None
    ):
        self._load = load
        self._model: HybridForCausalLM | None = None
        self._topology, self._cache = topology, cache

    def logits(self, ids_bs: Tensor, starts_bs: Tensor | None = None) -> Tensor:
        """Logits of a batch, and where its documents start."""
        if self._cache is None:
            return self._compute(ids_bs, starts_bs)
        path = self._cache / f"{self._key(ids_bs, starts_bs)}.safetensors"
        missing = torch.tensor(float(not path.exists()), device=ids_bs.device)
        # Together: ranks that compute speak with each other.
        if float(sum_over(missing, self._topology.axis("tp-cp"))) > 0:
            logits = self._compute(ids_bs, starts_bs)
            self._keep(path, logits)
            return logits
        return self._read(path).to(ids_bs.device)

    @torch.no_grad()
    def _compute(self, ids_bs: Tensor, starts_bs: Tensor | None) -> Tensor:
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False)
        logits: Tensor = self._model(ids_bs, document_starts=starts_bs)
        return logits

    def _key(self, ids_bs: Tensor, starts_bs: Tensor | None) -> str:
        """What the logits depend on beside the parent: the tokens, and the part that is here."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (ids_bs, starts_bs):
            digest.update(b"" if part is None else part.cpu().numpy().tobytes())
        place = [f"{axis}{self._topology.rank(axis)}" for axis in ("tp", "cp")]
        return f"{digest.hexdigest()}-{'-'.join(place)}"

    def _keep(self, path: Path, logits: Tensor) -> None:
        from safetensors.torch import save

        atomic_write_bytes(path, save({"logits": logits.detach().cpu().contiguous()}))

    def _read(self, path: Path) -> Tensor:
        from safetensors.torch import load

        return load(path.read_bytes())["logits"]
