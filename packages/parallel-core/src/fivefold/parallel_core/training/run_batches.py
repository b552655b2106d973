"""The batches of a run's text, and its losses in bits."""

import math
from collections.abc import Mapping

from fivefold.parallel_core.sequence_split import Split
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.config import TrainingConfig
from fivefold.parallel_core.training.data import EvaluationBatches, TextBatches
from fivefold.parallel_core.training.ends import Report
from fivefold.parallel_core.training.tokens import TokenDataset


def place_of(topology: Topology) -> dict[str, int]:
    """This rank's place in the data: what ``TextBatches`` asks for."""
    return {
        f"{axis}_{what}": getattr(topology, what)(axis)
        for axis in ("dp", "cp")
        for what in ("rank", "size")
    }


def check_text(training: TrainingConfig, dataset: TokenDataset) -> None:
    """Check that the text is long enough for one sample.

    Raises:
        DataError: it is not.
    """
    TextBatches(
        dataset.tokens("train"),
        sequence_length=training.sequence_length,
        global_batch_size=1,
        seed=training.seed,
    )


def training_batches(
    training: TrainingConfig,
    dataset: TokenDataset,
    topology: Topology,
    split: Split,
    *,
    separate_documents: bool = False,
) -> TextBatches:
    """This rank's batches of the training text.

    Args:
        training: sizes and the seed.
        dataset: the text.
        topology: the ranks.
        split: how those of "cp" split a sequence.
        separate_documents: say where documents start, so that they do not see each other. Without,
            a sequence is one text.
    """
    return TextBatches(
        dataset.tokens("train"),
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        seed=training.seed,
        **place_of(topology),
        split=split,
        end_of_text_id=dataset.end_of_text_id if separate_documents else None,
    )


def heldout_batches(
    training: TrainingConfig,
    dataset: TokenDataset,
    topology: Topology,
    split: Split,
    *,
    separate_documents: bool = False,
) -> EvaluationBatches | tuple[()]:
    """This rank's batches of the held-out text; none where there is none.

    Args:
        training: sizes and the seed.
        dataset: the text.
        topology: the ranks.
        split: how those of "cp" split a sequence.
        separate_documents: say where documents start, so that they do not see each other. Without,
            a sequence is one text.
    """
    if dataset.num_tokens("heldout") < 2:
        return ()
    return EvaluationBatches(
        dataset.tokens("heldout"),
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        num_windows=training.evaluation_sequences,
        **place_of(topology),
        split=split,
        end_of_text_id=dataset.end_of_text_id if separate_documents else None,
    )


def in_bits(report: Report, dataset: TokenDataset) -> Report:
    """Add bits per byte of text to every loss; they compare across tokenizers."""

    def tell(step: int, measured: Mapping[str, float]) -> None:
        more = dict(measured)
        for split, key in (("train", "loss"), ("heldout", "heldout_loss")):
            if key in measured:
                tokens = dataset.num_tokens(split)
                bits = measured[key] / math.log(2) * tokens / max(dataset.num_bytes[split], 1)
                more[key.replace("loss", "bits_per_byte")] = bits
        report(step, more)

    return tell
