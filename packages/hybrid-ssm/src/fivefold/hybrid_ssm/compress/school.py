"""The last stages of a compression: short distillation, choice, long distillation, the result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fivefold.hybrid_ssm.compress import plots
from fivefold.hybrid_ssm.compress.distill import Lesson, distill_rank
from fivefold.hybrid_ssm.compress.evaluate import ranked
from fivefold.hybrid_ssm.compress.importance import Scores
from fivefold.hybrid_ssm.compress.job import Job, candidate_of, quality_of
from fivefold.hybrid_ssm.compress.memory import shown
from fivefold.hybrid_ssm.compress.student import copy_companions, write_card, write_student
from fivefold.hybrid_ssm.compress.tables import read_table, write_table
from fivefold.hybrid_ssm.export import load_run_model
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.training.report import METRICS

Benchmark = Callable[[Path], float]
"""From a model folder to a score, more being better: the paper's average over benchmarks."""


class Stopped(Exception):  # noqa: N818 - a wish and no error
    """A distillation was asked to stop and has saved what it had."""


def finalists(
    job: Job, rows: list[dict[str, Any]], scores: Scores, benchmark: Benchmark | None
) -> list[dict[str, Any]]:
    """Write the finalists' folders and distill each for a short time."""
    stem, search = job.output / "finalists", job.config.search
    chosen = read_table(stem)
    if chosen is None:
        chosen = rows[: search.num_ranked]
        if benchmark is not None:
            scored = [_benchmarked(job, row, scores, benchmark) for row in chosen]
            chosen = sorted(scored, key=lambda row: -row["benchmark"])
        chosen = chosen[: search.num_finalists]
        for row in chosen:
            write_student(job.model, candidate_of(row), scores, _pruned(job, row))
        write_table(stem, chosen)
        names = [row["candidate"] for row in chosen]
        plots.draw(plots.plot_candidates, rows, names, job.output / "ranking.png")
    for row in chosen:
        _distill(job, _pruned(job, row), _run(job, row), job.config.distill.short_steps)
    return chosen


def _benchmarked(
    job: Job, row: dict[str, Any], scores: Scores, benchmark: Benchmark
) -> dict[str, Any]:
    folder = _pruned(job, row)
    write_student(job.model, candidate_of(row), scores, folder)
    return {**row, "benchmark": float(benchmark(folder))}


def _pruned(job: Job, row: dict[str, Any]) -> Path:
    return job.output / "pruned" / str(row["candidate"])


def _run(job: Job, row: dict[str, Any]) -> Path:
    return job.output / "short" / str(row["candidate"])


def _distill(job: Job, student: Path, run: Path, steps: int, *, again: bool = False) -> None:
    """Teach a student; goes on where it was.

    Args:
        job: the compression.
        student: folder that the student starts from.
        run: folder of the run.
        steps: of the optimizer.
        again: whether it has learnt before; it then reads the text in another order, and what
            only one student reads is not worth keeping.

    Raises:
        Stopped: it was asked to stop.
    """
    distill = job.config.distill
    cache = job.output / "logits" if distill.cache_logits and not again else None
    distill = replace(distill, seed=distill.seed + again)
    lesson = Lesson(
        job.model,
        student,
        run,
        steps,
        distill,
        job.config.data,
        cache,
        job.config.search.validation_sequences,
        job.config.packed,
    )
    outcome = launch(distill_rank, job.nproc, lesson, job.nproc)[0]
    if not outcome.finished:
        raise Stopped(f"stopped after step {outcome.step} of {run}")


def choice(
    job: Job, finalists: list[dict[str, Any]], benchmark: Benchmark | None
) -> dict[str, Any]:
    """Choose among the finalists, after their distillation and not before."""
    stem = job.output / "choice"
    found = read_table(stem)
    if found is not None:
        return found[0]
    rows = [_after(job, row, benchmark) for row in finalists]
    if benchmark is not None:
        order = sorted(range(len(rows)), key=lambda i: -rows[i]["distilled_benchmark"])
    else:
        order = ranked([quality_of(row, "distilled_") for row in rows])
    rows = [rows[i] for i in order]
    write_table(stem, rows)
    runs = {f"candidate {row['candidate']}": _run(job, row) / METRICS for row in rows}
    plots.draw(plots.plot_distillation, runs, stem.with_suffix(".png"))
    return rows[0]


def _after(job: Job, row: dict[str, Any], benchmark: Benchmark | None) -> dict[str, Any]:
    """Measure a finalist after its distillation."""
    folder = job.output / "distilled" / str(row["candidate"])
    _export(job, _run(job, row), row, folder, job.config.distill.short_steps)
    after = {f"distilled_{key}": value for key, value in job.measured(folder).to_dict().items()}
    if benchmark is not None:
        after["distilled_benchmark"] = float(benchmark(folder))
    return {**row, **after}


def _export(job: Job, run: Path, row: dict[str, Any], folder: Path, steps: int) -> None:
    """Write a run's model as a plain folder with its lineage."""
    candidate = candidate_of(row)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(job.model, folder)
    facts = {
        "memory": f"{shown(row['memory_bytes'])} of the parent's {shown(job.whole)} "
        f"({job.config.memory.weight_bits:g}-bit weights, "
        f"{job.config.memory.context_length:,} tokens of context)",
        "agreement with the parent before distillation": f"{row['agreement']:.3f}",
        "distillation": f"{steps} steps of {job.config.distill.global_batch_size} sequences "
        f"of {job.config.distill.sequence_length} tokens, forward KL on logits, temperature "
        f"{job.config.distill.temperature:g}",
    }
    write_card(folder, job.parent, job.name, candidate, facts)
    load_run_model(run)[0].to(job.stream.file_dtype).save_pretrained(folder)


def finish(job: Job, row: dict[str, Any]) -> Path:
    """Distill the chosen one for long, if that is asked, and write the result."""
    folder, distill = job.output / "model", job.config.distill
    if distill.long_steps:
        start = job.output / "distilled" / str(row["candidate"])
        _distill(job, start, job.output / "long", distill.long_steps, again=True)
        run, steps = job.output / "long", distill.short_steps + distill.long_steps
    else:
        run, steps = _run(job, row), distill.short_steps
    _export(job, run, row, folder, steps)
    quality = job.measured(folder)
    write_table(job.output / "result", [{**row, **quality.to_dict(), "steps": steps}])
    job.tell(
        f"result: {folder}, {row['pattern']}, {shown(row['memory_bytes'])}, agreement "
        f"{quality.agreement:.3f}, accuracy {quality.accuracy:.3f}"
    )
    return folder
