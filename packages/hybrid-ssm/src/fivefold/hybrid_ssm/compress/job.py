"""What the stages of a compression share: its parent, text, folder and measurements."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch

from fivefold.hybrid_ssm.compress.config import CompressConfig
from fivefold.hybrid_ssm.compress.distill import check_tokenizer
from fivefold.hybrid_ssm.compress.evaluate import Batch, Quality, batch_of, measure, run_layers
from fivefold.hybrid_ssm.compress.importance import Scores
from fivefold.hybrid_ssm.compress.memory import memory_of, parse_budget
from fivefold.hybrid_ssm.compress.prune import Candidate, pruned_layers
from fivefold.hybrid_ssm.compress.stream import Stream
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.training.data import EvaluationBatches
from fivefold.parallel_core.training.tokenizer import check_vocabulary
from fivefold.parallel_core.training.tokens import TokenDataset

Tell = Callable[[str], None]
"""Called with a line about a stage."""


class Job:
    """One compression.

    Attributes:
        parent: configuration of the model.
        budget: bytes.
        whole: bytes that the parent needs.
        tell: called with a line about each stage.

    Args:
        model: its folder.
        name: what it was asked for by.
        output: folder of this compression.
        config: what is asked.
        nproc: ranks of distillation.
        tell: called with lines of text.
    """

    def __init__(
        self,
        model: Path,
        name: str,
        output: Path,
        config: CompressConfig,
        nproc: int,
        tell: Tell | None,
    ):
        self.model, self.name, self.output, self.nproc = model, name, output, nproc
        self.stream = Stream(model)
        self.parent = self.stream.config
        if (model / "tokenizer.json").exists() and config.data.tokenizer == "bytes":
            config = replace(config, data=replace(config.data, tokenizer=str(model)))
        self.config, self.tell = config, tell or (lambda text: None)
        whole = memory_of(self.parent, config.memory).total
        self.budget, self.whole = parse_budget(config.budget, whole), whole
        self._parent_hidden: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def claim(self) -> None:
        """Check the text and what can be checked, and that the folder is this compression's.

        Raises:
            HybridConfigError: something differs; names it.
        """
        self.dataset()
        mine = json.loads(json.dumps({"model": str(self.model), **self.config.to_dict()}))
        path = self.output / "compress.json"
        if path.exists():
            found = json.loads(path.read_text())
            differing = [key for key in mine if found.get(key) != mine[key]]
            if differing:
                key = differing[0]
                raise HybridConfigError(
                    f"{self.output} is of a compression with another {', '.join(differing)} "
                    f"({key}: {found.get(key)}, now {mine[key]}); go on with the same, or choose "
                    "another folder"
                )
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)

    def dataset(self) -> TokenDataset:
        """The text in tokens, which are the parent's."""
        tokenizer = self.config.data.load_tokenizer()
        check_tokenizer(self.model, tokenizer.fingerprint)
        dataset = self.config.data.prepare(tokenizer)
        check_vocabulary(dataset, self.parent.vocab_size)
        return dataset

    def end_id(self) -> int | None:
        """The token that ends a document, where documents are apart."""
        return self.dataset().end_of_text_id if self.config.packed else None

    def batches(self, parts: Iterable[tuple[torch.Tensor, ...]]) -> list[Batch]:
        """Batches as layers take them."""
        return [batch_of(each, self.parent.pattern, self.stream.device) for each in parts]

    def validation(self) -> list[Batch]:
        """The held-out sequences."""
        asked = self.config.importance
        text = EvaluationBatches(
            self.dataset().tokens("heldout"),
            sequence_length=asked.sequence_length,
            global_batch_size=asked.batch_size,
            num_windows=self.config.search.validation_sequences,
            end_of_text_id=self.end_id(),
        )
        return self.batches(text)

    def quality(self, candidate: Candidate, scores: Scores, batches: list[Batch]) -> Quality:
        """Measure the parent's parts as a model, without writing it."""
        hidden = run_layers(self.stream, pruned_layers(self.stream, candidate, scores), batches)
        head = self.stream.tail().head
        return measure(head, hidden, self._expected(batches), batches)

    def _expected(self, batches: list[Batch]) -> list[torch.Tensor]:
        """What the parent's output layer sees; made once."""
        if not self._parent_hidden:
            layers = (self.stream.layer(index) for index in range(self.parent.num_layers))
            self._parent_hidden = run_layers(self.stream, layers, batches)
        return self._parent_hidden

    def measured(self, folder: Path) -> Quality:
        """Measure a model folder on validation text, beside the parent."""
        batches = self.validation()
        with Stream(folder) as stream:
            layers = (stream.layer(index) for index in range(stream.config.num_layers))
            hidden = run_layers(stream, layers, batches)
            head, of_parent = stream.tail().head, self.stream.tail().head
        return measure(head, hidden, self._expected(batches), batches, of_parent)


def candidate_of(row: dict[str, Any]) -> Candidate:
    """The candidate that a row of a table describes."""
    keys = ("layers", "width", "experts", "mamba_heads")
    return Candidate.from_dict({key: row[key] for key in keys})


def quality_of(row: dict[str, Any], prefix: str = "") -> Quality:
    """What was measured of it."""
    return Quality(*(row[f"{prefix}{key}"] for key in ("accuracy", "agreement", "loss", "kl")))
