"""MiniPuzzle: the stages of a compression in order (arXiv 2504.03624, section 3)."""

from pathlib import Path

from fivefold.hybrid_ssm.compress.config import CompressConfig
from fivefold.hybrid_ssm.compress.job import Job, Tell
from fivefold.hybrid_ssm.compress.school import Benchmark, Stopped, choice, finalists, finish
from fivefold.hybrid_ssm.compress.search import candidates, importance, ranking
from fivefold.parallel_core.hub import resolve

__all__ = ["Benchmark", "Stopped", "minipuzzle"]


def minipuzzle(
    model: str | Path,
    output: str | Path,
    config: CompressConfig,
    *,
    benchmark: Benchmark | None = None,
    nproc: int = 1,
    tell: Tell | None = None,
) -> Path:
    """Compress a hybrid to a budget of memory.

    Call it again after a kill and it goes on: finished stages are read from their tables,
    importance and ranking go on after the last batch or candidate, distillation from its newest
    checkpoint, with the same results.

    Args:
        model: folder or repository in Hugging Face form.
        output: folder of tables, plots, checkpoints and the result; made if missing.
        config: see ``CompressConfig``.
        benchmark: scores a model folder; candidates are then chosen by it among the best ranked,
            and finalists after their distillation.
        nproc: ranks of distillation, forked on this machine.
        tell: called with a line about each stage.

    Returns:
        The folder of the smaller model.

    Raises:
        HybridConfigError: nothing fits the budget, the text is of another tokenizer, or the
            folder is of another compression.
        Stopped: distillation was asked to stop.
    """
    with Job(resolve(model), str(model), Path(output), config, nproc, tell) as job:
        job.claim()
        scores = importance(job)
        rows = ranking(job, scores, candidates(job, scores))
        chosen = choice(job, finalists(job, rows, scores, benchmark), benchmark)
        return finish(job, chosen)
