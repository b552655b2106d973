"""The first stages of a compression: importance, candidates, ranking."""

from typing import Any

from fivefold.hybrid_ssm.compress import plots
from fivefold.hybrid_ssm.compress.candidates import grid_of, list_candidates
from fivefold.hybrid_ssm.compress.evaluate import ranked
from fivefold.hybrid_ssm.compress.importance import Scores, load_sums, save_sums, score_pass
from fivefold.hybrid_ssm.compress.job import Job, candidate_of, quality_of
from fivefold.hybrid_ssm.compress.memory import shown
from fivefold.hybrid_ssm.compress.prune import Candidate, counts_of, pruned_config
from fivefold.hybrid_ssm.compress.tables import read_table, write_table
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, MAMBA, MLP
from fivefold.parallel_core.training.data import TextBatches

_COUNTS = {ATTENTION: "attention", MAMBA: "mamba", MLP: "mlp", EXPERTS: "moe"}


def importance(job: Job) -> Scores:
    """Score the parent's parts; kept after each batch."""
    asked, path = job.config.importance, job.output / "importance.safetensors"
    sums = load_sums(path)
    text = TextBatches(
        job.dataset().tokens("train"),
        sequence_length=asked.sequence_length,
        global_batch_size=asked.batch_size,
        seed=asked.seed,
        end_of_text_id=job.end_id(),
    )
    total = max(asked.layer_samples, asked.neuron_samples)
    while max(sums.layer_samples, sums.neuron_samples) < total:
        done = max(sums.layer_samples, sums.neuron_samples)
        batch = job.batches([text.batch(done // asked.batch_size)])[0]
        score_pass(
            job.stream,
            batch.ids_bs,
            batch.context,
            sums,
            asked,
            layers=sums.layer_samples < asked.layer_samples,
            neurons=sums.neuron_samples < asked.neuron_samples,
        )
        save_sums(sums, path)
    scores = sums.scores(asked)
    _show_importance(job, scores)
    return scores


def _show_importance(job: Job, scores: Scores) -> None:
    stem = job.output / "importance"
    if read_table(stem) is not None:
        return
    layers = scores.layers.tolist()
    order = sorted(range(len(layers)), key=lambda index: (layers[index], -index))
    rows = [
        {
            "layer": index,
            "kind": job.parent.pattern[index],
            "score": layers[index],
            "removed_as": order.index(index) + 1,
            "neurons_of_score_0": _dead(scores, index),
        }
        for index in range(len(layers))
    ]
    write_table(stem, rows)
    plots.draw(plots.plot_importance, job.parent.pattern, layers, stem.with_suffix(".png"))
    first = order[0]
    job.tell(
        f"importance: {len(layers)} layers scored; the least important is layer {first} "
        f"({job.parent.pattern[first]}), {layers[first]:.3g}"
    )


def _dead(scores: Scores, index: int) -> int:
    return int((scores.neurons[index] == 0).sum()) if index in scores.neurons else 0


def candidates(job: Job, scores: Scores) -> list[dict[str, Any]]:
    """List every candidate that the budget holds."""
    stem, search = job.output / "candidates", job.config.search
    found = read_table(stem)
    if found is not None:
        return found
    grid = grid_of(job.parent, search)
    listed = list_candidates(
        job.parent, scores.layers, grid, job.config.memory, job.budget, search.least_use
    )
    rows = [
        {
            "candidate": number,
            **_describe(job, each.candidate),
            "memory_bytes": each.memory.total,
            "weights_bytes": each.memory.weights + each.memory.embeddings,
            "keys_values_bytes": each.memory.keys_values,
            "states_bytes": each.memory.states,
            "removed_score": float(scores.layers.sum())
            - sum(float(scores.layers[index]) for index in each.candidate.layers),
        }
        for number, each in enumerate(listed, 1)
    ]
    write_table(stem, rows)
    job.tell(
        f"candidates: {len(rows)} of {grid.size} need at most {shown(job.budget)} of the "
        f"parent's {shown(job.whole)}"
    )
    return rows


def _describe(job: Job, candidate: Candidate) -> dict[str, Any]:
    counts = counts_of(job.parent, candidate)
    return {
        "pattern": pruned_config(job.parent, candidate).pattern,
        **{_COUNTS[letter]: count for letter, count in counts.items()},
        **candidate.to_dict(),
    }


def ranking(job: Job, scores: Scores, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure every candidate on validation text; the best come first."""
    stem = job.output / "ranking"
    found = read_table(stem)
    if found is not None:
        return found
    partial = job.output / "ranking_so_far"
    measured = {row["candidate"]: row for row in read_table(partial) or []}
    batches = job.validation()
    for row in rows:
        if row["candidate"] in measured:
            continue
        quality = job.quality(candidate_of(row), scores, batches)
        measured[row["candidate"]] = {**row, **quality.to_dict()}
        write_table(partial, list(measured.values()))
    order = ranked([quality_of(measured[row["candidate"]]) for row in rows])
    best = [{"place": place, **measured[rows[i]["candidate"]]} for place, i in enumerate(order, 1)]
    write_table(stem, best)
    first = best[0]
    job.tell(
        f"ranking: {first['pattern']} of width {first['width']} is first, agreement "
        f"{first['agreement']:.3f}, accuracy {first['accuracy']:.3f}"
    )
    return best
