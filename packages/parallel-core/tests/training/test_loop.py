"""The training loop equals plain torch step by step, and goes on after a stop as if without it.

Legend: B sequences of the global batch, S tokens of a sequence, V vocabulary.
"""

import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fivefold.parallel_core import checkpoint
from fivefold.parallel_core.build import build, make_runner
from fivefold.parallel_core.checkpoint import Checkpoints
from fivefold.parallel_core.errors import CheckpointError, ConfigError, ParallelError
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.losses import SideOutputs
from fivefold.parallel_core.pipeline import LocalRunner
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.loop import Outcome, Trainer, TrainingConfig
from fivefold.parallel_core.training.optimizer import AdamWConfig
from fivefold.parallel_core.training.schedule import WarmupCosine

from ..rig import DOUBLE, SEED, plain_model
from ..toy import HEAD, TAIL, Toy, ToyConfig, plan, rule

BATCH, LENGTH, STEPS, CLIP = 8, 6, 3, 0.5
MODEL = ToyConfig(num_experts=2, bias=False)
PEAK, WARMUP = 3e-2, 2
# A large eps: with a small one AdamW hardly notices by how much all gradients are scaled.
ADAMW = AdamWConfig(eps=1e-2, betas=(0.8, 0.9), weight_decay=0.2)

Batch = tuple[Tensor, Tensor]
Told = list[tuple[int, dict[str, float]]]


def batch(step: int) -> Batch:
    """The ids and targets (B, S) of a step; ranks have unequal numbers of targets that count."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs, targets = torch.randint(0, MODEL.vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, : 2 + step % 3] = targets[3] = targets[6, -1] = -100
    return inputs, targets


@dataclass
class Data:
    """This rank's rows of every step's batch; ``interrupt`` is called before those of a step."""

    rank: int = 0
    size: int = 1
    interrupt: Mapping[int, Callable[[], None]] = field(default_factory=dict)

    def batch(self, step: int) -> Batch:
        self.interrupt.get(step, lambda: None)()
        inputs, targets = batch(step)
        return inputs.chunk(self.size)[self.rank], targets.chunk(self.size)[self.rank]

    def heldout(self) -> list[Batch]:
        return [self.batch(1001), self.batch(1002)]


def figures(sums: Mapping[str, Tensor], num_sequences: int) -> dict[str, float]:
    """The side loss of a sequence; the loop's own sums are none of it."""
    assert set(sums) == {"square"}
    return {"square": float(sums["square"]) / num_sequences}


def make_trainer(
    topology: Topology,
    heldout: Iterable[Batch] | None = None,
    *,
    folder: Path | None = None,
    interrupt: Mapping[int, Callable[[], None]] | None = None,
    seed: int = SEED,
    keep: int = 9,
    **options: Any,
) -> tuple[Trainer, Told]:
    """A trainer of two microbatches a step on each rank, and the list of what it tells."""
    axis = topology.axis("dp")
    config = TrainingConfig(
        **{"steps": STEPS, "gradient_clip": CLIP, "seed": SEED, **options},
        global_batch_size=BATCH,
        microbatch_size=BATCH // 2 // axis.size,
        sequence_length=LENGTH,
        optimizer=ADAMW,
        schedule=WarmupCosine(learning_rate=PEAK, warmup_steps=WARMUP, total_steps=9),
        precision=DOUBLE,
    )
    model = build(
        lambda: Toy(MODEL),
        topology,
        plan(MODEL),
        head=HEAD,
        tail=TAIL,
        pipeline=config.pipeline,
        precision=DOUBLE,
    )
    model.initialise(rule, seed)
    runner = make_runner(
        model,
        config.pipeline,
        num_microbatches=config.num_microbatches(axis.size, topology.size("pp")),
        microbatch_size=config.microbatch_size,
        sequence_length=LENGTH,
        hidden_size=MODEL.hidden_size,
        vocab_size=MODEL.vocab_size,
        dtype=torch.float64,
    )
    data = Data(axis.rank, axis.size, interrupt or {})
    trainer = Trainer(
        config,
        model,
        runner,
        data,
        data.heldout() if heldout is None else heldout,
        checkpoints=Checkpoints(folder, keep) if folder else None,
        summarise=figures,
    )
    told: Told = []
    trainer.report = lambda step, measured: told.append((step, dict(measured)))
    return trainer, told


# ---- the same by hand ----------------------------------------------------------------------


class Collected(SideOutputs):
    """Keeps side losses with their graphs, to be added to the loss by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def loss(self, name: str, value: Tensor, onto: Tensor) -> Tensor:
        self.values.append(value)
        return onto


@dataclass
class Reference:
    """Plain torch: what each step measured, and all tensors after the last."""

    told: list[dict[str, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    heldout_loss: float = math.nan


def by_hand() -> Reference:
    """Three steps on whole batches in one piece, without anything of the training loop."""
    model, reference = plain_model(MODEL), Reference()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-2,
    )
    for step, rate in enumerate((PEAK / 3, 2 * PEAK / 3, PEAK)):
        side = Collected()
        for layer in model.layers.values():
            layer.side = side
        inputs, targets = batch(step)
        # Over the valid tokens; every sequence has the same weight in the side loss.
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        square = torch.stack(side.values).sum() / BATCH
        (loss + square).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        assert norm > 2 * CLIP, "clipping has to bite"
        # clip_grad_norm_ divides by norm + 1e-6; with this limit it scales by CLIP / norm.
        limit = CLIP * (1 + 1e-6 / norm.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        reference.told.append(
            {
                "loss": loss.item(),
                "square": square.item(),
                "grad_norm": norm.item(),
                "learning_rate": rate,
            }
        )
    for name, parameter in model.named_parameters():
        reference.tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            reference.tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    heldout = [torch.cat(pair) for pair in zip(batch(1001), batch(1002), strict=True)]
    with torch.no_grad():
        logits = model(heldout[0]).flatten(0, 1)
        reference.heldout_loss = F.cross_entropy(logits, heldout[1].flatten()).item()
    return reference


@pytest.fixture(scope="module")
def reference() -> Reference:
    return by_hand()


def distance(trainer: Trainer, reference: Reference) -> float:
    """Largest distance of any parameter or moment on this rank from the reference."""
    parts = trainer.parts()
    assert parts
    assert dist.is_initialized() or set(parts) == set(reference.tensors)
    return max(
        (part.tensor - reference.tensors[name][part.box.slices]).abs().max().item()
        for name, part in parts.items()
        if part.box.numel
    )


def check_told(told: Told, reference: Reference) -> None:
    """All figures of all steps."""
    assert [step for step, _ in told] == [1, 2, 3]
    for (step, measured), expected in zip(told, reference.told, strict=True):
        tokens = int((batch(step - 1)[1] != -100).sum())
        rate = measured.pop("tokens_per_second")
        assert rate * measured.pop("seconds") == pytest.approx(tokens)
        assert measured == pytest.approx(expected, rel=1e-11)


def test_three_steps_equal_plain_torch(reference: Reference) -> None:
    trainer, told = make_trainer(Topology.local())
    assert isinstance(trainer.runner, LocalRunner)
    assert trainer.runner.num_microbatches == 2
    assert [trainer.train_step() for _ in range(STEPS)] == [False] * STEPS
    assert trainer.step == STEPS
    check_told(told, reference)
    assert distance(trainer, reference) < 1e-10


def test_a_limit_above_the_norm_or_none_changes_nothing() -> None:
    ends = []
    for limit in (None, 1e6):
        trainer, _ = make_trainer(Topology.local(), gradient_clip=limit)
        trainer.train_step()
        ends.append({name: part.tensor.clone() for name, part in trainer.parts().items()})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


# ---- two ranks -----------------------------------------------------------------------------


def interrupt_self() -> None:
    """What a cluster does to a rank before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


def on_two_ranks(reference: Reference) -> list[tuple[float, Told, float | None, Outcome]]:
    """Train under each layout; then again, where only the second rank is asked to stop."""
    results = []
    for degrees in ({}, {"pp": 2}):
        topology = Topology(Layout(2, **degrees))
        trainer, told = make_trainer(topology)
        for _ in range(STEPS):
            trainer.train_step()
        found = distance(trainer, reference)
        steps = list(told)
        loss = trainer.evaluate()
        interrupt = {1: interrupt_self} if topology.world_rank == 1 else {}
        outcome = make_trainer(topology, interrupt=interrupt)[0].fit()
        results.append((found, steps, loss, outcome))
    return results


def test_two_ranks_equal_plain_torch_and_stop_together(reference: Reference) -> None:
    first, second = launch(on_two_ranks, 2, reference, timeout=120)
    for layout, (found, told, loss, outcome) in enumerate(first):
        check_told(told, reference)
        for distance_here, _, loss_here, outcome_here in (first[layout], second[layout]):
            assert distance_here < 1e-10
            assert loss_here == loss == pytest.approx(reference.heldout_loss, rel=1e-11)
            assert outcome_here == outcome == Outcome(2, False, None)
        assert found < 1e-10
    assert [told for _, told, _, _ in second] == [[], []], "only rank 0 reports"


# ---- held-out text -------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_all_held_out_tokens(reference: Reference) -> None:
    trainer, told = make_trainer(Topology.local())
    modes: list[bool] = []
    trainer.model.parts[0].register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    for step in range(STEPS):
        trainer.train_step()
        if step < STEPS - 1:
            # Seen from the steps that follow, an evaluation has not happened.
            trainer.evaluate()
    parameters = {name: part.tensor.clone() for name, part in trainer.parts().items()}
    loss = trainer.evaluate()
    assert loss == trainer.heldout_loss == pytest.approx(reference.heldout_loss, rel=1e-11)
    assert told[-1] == (STEPS, {"heldout_loss": loss})
    assert modes == ([True] * 2 + [False] * 4) * STEPS, "training mode for training only"
    assert all(torch.equal(p.tensor, parameters[name]) for name, p in trainer.parts().items())
    assert all(parameter.grad is None for parameter in trainer.model.parts[0].parameters())
    assert distance(trainer, reference) < 1e-10


def test_side_outputs_of_an_evaluation_are_not_those_of_the_next_step(
    reference: Reference,
) -> None:
    trainer, told = make_trainer(Topology.local())
    trainer.evaluate()
    trainer.train_step()
    assert told[-1][1]["square"] == pytest.approx(reference.told[0]["square"], rel=1e-11)


def test_without_held_out_tokens_there_is_no_loss() -> None:
    inputs, targets = batch(0)
    for heldout in ([], [(inputs, torch.full_like(targets, -100))]):
        trainer, told = make_trainer(Topology.local(), heldout)
        assert trainer.evaluate() is None
        assert told == []


# ---- whole runs ----------------------------------------------------------------------------


def evaluations(told: Told) -> list[int]:
    return [step for step, measured in told if "heldout_loss" in measured]


@pytest.mark.parametrize(
    ("steps", "evaluate_every", "checkpoint_every", "evaluated", "saved"),
    [
        (5, 2, 3, [2, 4, 5], [3, 5]),
        (4, 2, 2, [2, 4], [2, 4]),
        (3, None, 100, [3], [3]),
    ],
)
def test_a_run_evaluates_and_saves_at_its_steps_and_at_the_end(
    tmp_path: Path,
    steps: int,
    evaluate_every: int | None,
    checkpoint_every: int,
    evaluated: list[int],
    saved: list[int],
) -> None:
    trainer, told = make_trainer(
        Topology.local(),
        folder=tmp_path,
        steps=steps,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
    )
    outcome = trainer.fit()
    assert outcome == Outcome(steps, True, trainer.heldout_loss)
    assert outcome.heldout_loss == told[-1][1]["heldout_loss"]
    assert evaluations(told) == evaluated
    assert [step for step, measured in told if "loss" in measured] == list(range(1, steps + 1))
    assert Checkpoints(tmp_path).steps() == saved


def drop_out(trainer: Trainer) -> Trainer:
    """Let training depend on random numbers."""
    norm = trainer.model.parts[0].get_submodule("norm")
    norm.register_forward_hook(lambda module, _, out: F.dropout(out, 0.2, module.training))
    return trainer


def end(trainer: Trainer) -> dict[str, Tensor]:
    return {name: part.tensor.clone() for name, part in trainer.parts().items()}


def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = drop_out(make_trainer(Topology.local(), steps=5)[0])
    assert whole.resume() == 0
    finished = whole.fit()

    torch.manual_seed(1)
    handler = signal.getsignal(signal.SIGTERM)
    stopped, told = make_trainer(
        Topology.local(), folder=tmp_path, interrupt={2: interrupt_self}, steps=5
    )
    assert drop_out(stopped).fit() == Outcome(3, False, None)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [step for step, _ in told] == [1, 2, 3], "the step at hand is finished"
    assert Checkpoints(tmp_path).steps() == [3]

    torch.manual_seed(2)
    resumed = drop_out(make_trainer(Topology.local(), folder=tmp_path, seed=99, steps=5)[0])
    assert resumed.resume() == 3
    assert resumed.fit() == finished
    expected = end(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in end(resumed).items())


def spoil(trainer: Trainer, steps: set[int], value: float) -> Trainer:
    """Make the gradients of these steps (from 0) infinite or NaN, once each."""
    weight = trainer.model.parts[0].get_parameter("norm.weight")
    weight.register_hook(lambda grad: grad * (value if trainer.step in steps else 1.0))
    return trainer


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_steps_whose_gradient_is_not_finite_change_nothing_and_are_counted(
    tmp_path: Path, value: float
) -> None:
    trainer, told = make_trainer(Topology.local(), folder=tmp_path, steps=4, checkpoint_every=1)
    spoil(trainer, {0, 2}, value)
    trainer.train_step()
    fresh, _ = make_trainer(Topology.local())
    assert all(torch.equal(end(trainer)[name], x) for name, x in end(fresh).items())
    assert all(p.grad is None for p in trainer.model.parts[0].parameters())
    assert trainer.fit() == Outcome(4, True, trainer.heldout_loss)
    counts = [measured["skipped_steps"] for _, measured in told if "loss" in measured]
    assert counts == [1, 1, 2, 2]

    # The optimizer has made two updates, also where it goes on from a checkpoint.
    resumed, _ = make_trainer(Topology.local(), folder=tmp_path, steps=5)
    assert resumed.resume() == 4
    assert resumed.skipped == 2
    trainer.config = resumed.config
    for each in (trainer, resumed):
        each.train_step()
    assert all(torch.equal(end(resumed)[name], x) for name, x in end(trainer).items())


def on_ranks_with_one_bad(degrees: Mapping[str, int]) -> tuple[int, bool]:
    """Only the last rank's gradient is not finite; all skip the step."""
    topology = Topology(Layout(4, **degrees))
    trainer, _ = make_trainer(topology, steps=1)
    if topology.world_rank == 3:
        modules = trainer.model.parts[0].named_modules()
        layer = next(module for name, module in modules if name.endswith(".mlp"))
        layer.register_forward_hook(lambda *call: call[-1] * math.nan)
    before = end(trainer)
    trainer.train_step()
    return trainer.skipped, all(torch.equal(before[name], x) for name, x in end(trainer).items())


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}, {"pp": 2, "ep": 2}, {"etp": 2}])
def test_one_bad_rank_makes_all_skip(degrees: dict[str, int]) -> None:
    assert launch(on_ranks_with_one_bad, 4, degrees) == [(1, True)] * 4


def test_too_many_bad_steps_in_a_row_stop_the_run() -> None:
    trainer, told = make_trainer(Topology.local(), steps=9, skip_nonfinite=2)
    spoil(trainer, {0, 1, 3, 4, 5}, math.nan)
    with pytest.raises(ParallelError, match=r"step 6: .* nan, after 2 skipped .*skip_nonfinite=2"):
        trainer.fit()
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]


def test_a_finished_run_is_evaluated_and_not_trained_again(tmp_path: Path) -> None:
    first, _ = make_trainer(Topology.local(), folder=tmp_path)
    outcome = first.fit()
    again, told = make_trainer(Topology.local(), folder=tmp_path, seed=99)
    assert again.resume() == STEPS
    assert again.fit() == outcome
    assert told == [(STEPS, {"heldout_loss": outcome.heldout_loss})]


@pytest.mark.parametrize("name", ["seed", "data"])
def test_a_run_with_other_data_is_not_resumed(tmp_path: Path, name: str) -> None:
    make_trainer(Topology.local(), folder=tmp_path)[0].save()
    other, _ = make_trainer(Topology.local(), folder=tmp_path)
    other.identity[name] = "another"
    with pytest.raises(ConfigError):
        other.resume()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("skip_nonfinite", -1),
        ("evaluate_every", 0),
        ("checkpoint_every", 0),
        ("gradient_clip", 0.0),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}; "):
        make_trainer(Topology.local(), **{name: value})


def test_a_batch_that_does_not_divide_is_refused_with_its_numbers() -> None:
    config = make_trainer(Topology.local())[0].config
    assert config.num_microbatches(2, 1) == 1
    with pytest.raises(ConfigError, match=r"global_batch_size=8 is not .* = 3 \* 4 = 12"):
        config.num_microbatches(3, 1)


# ---- checkpoints in the background ---------------------------------------------------------


def test_a_run_that_saves_in_the_background_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_every": 1, "checkpoint_in_background": True}
    whole, _ = make_trainer(Topology.local(), steps=4)
    whole.fit()
    first, _ = make_trainer(Topology.local(), folder=tmp_path, steps=3, **options)
    first.fit()
    assert first.checkpoints is not None and not first.checkpoints.is_busy
    assert Checkpoints(tmp_path).steps() == [1, 2, 3]
    resumed, _ = make_trainer(Topology.local(), folder=tmp_path, seed=99, steps=4, **options)
    assert resumed.resume() == 3
    resumed.fit()
    expected = end(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in end(resumed).items())


def full(*args: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def on_ranks_that_cannot_save(folder: Path) -> tuple[str, int]:
    """Both ranks end at the same step, with the reason."""
    topology = Topology(Layout(2))
    trainer, _ = make_trainer(
        topology, folder=folder, steps=50, checkpoint_every=40, checkpoint_in_background=True
    )
    trainer.train_step()
    checkpoint.save = full
    trainer.save(in_background=True)
    with pytest.raises(CheckpointError) as caught:
        trainer.fit()
    return str(caught.value), trainer.step


def test_a_save_that_fails_in_the_background_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    (text, step), other = launch(on_ranks_that_cannot_save, 2, tmp_path, timeout=200)
    assert (text, step) == other
    assert "the checkpoint after step 1 cannot be saved" in text and "No space left" in text
    assert step < 40, "before the next one is due"


def test_an_error_in_training_waits_for_the_checkpoint(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("a bad file")

    trainer, _ = make_trainer(
        Topology.local(),
        folder=tmp_path,
        checkpoint_every=1,
        checkpoint_in_background=True,
        interrupt={2: fail},
    )
    with pytest.raises(ValueError, match="a bad file"):
        trainer.fit()
    assert trainer.checkpoints is not None and not trainer.checkpoints.is_busy
    assert Checkpoints(tmp_path).latest() == trainer.checkpoints.path(2)


def test_the_best_and_the_regular_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer, _ = make_trainer(
        Topology.local(),
        steps=5,
        keep_checkpoints=1,
        keep_checkpoints_every=2,
        keep_best_checkpoints=1,
        checkpoint_every=1,
        evaluate_every=1,
    )
    trainer.checkpoints = Checkpoints(tmp_path, trainer.config.retention)
    losses: list[float] = []
    trainer.report = lambda step, told: losses.extend(
        [told["heldout_loss"]] if "heldout_loss" in told else []
    )
    trainer.fit()
    assert len(losses) == 5
    best = losses.index(min(losses)) + 1
    assert trainer.checkpoints.steps() == sorted({2, 4, 5, best})


def test_a_corrupt_checkpoint_is_left_out_when_resuming(tmp_path: Path) -> None:
    trainer, _ = make_trainer(Topology.local(), folder=tmp_path, checkpoint_every=1)
    trainer.fit()
    file = next((tmp_path / "step-00000003").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resumed, _ = make_trainer(Topology.local(), folder=tmp_path, seed=99)
    assert resumed.resume() == 2
    resumed.fit()
    expected = end(trainer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in end(resumed).items())
