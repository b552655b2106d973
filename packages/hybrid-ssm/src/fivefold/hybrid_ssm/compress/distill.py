"""Teaching a smaller model: forward KL on logits, in the training loop of any model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.hybrid_ssm import sharding
from fivefold.hybrid_ssm.compress.config import DistillConfig
from fivefold.hybrid_ssm.compress.divergence import forward_kl
from fivefold.hybrid_ssm.compress.evaluate import IGNORED
from fivefold.hybrid_ssm.compress.teacher import Teacher
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.files import ModelFiles, load_parameters
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.pretrained import read_config
from fivefold.hybrid_ssm.train import RunConfig, check, compute_in_fp8
from fivefold.parallel_core import hub
from fivefold.parallel_core.build import ParallelModel, build
from fivefold.parallel_core.config import replace
from fivefold.parallel_core.data_parallel import Precision
from fivefold.parallel_core.pipeline import LocalRunner
from fivefold.parallel_core.topology import Topology
from fivefold.parallel_core.training.expert_load import LoadFigures
from fivefold.parallel_core.training.loop import Outcome, Trainer, TrainingConfig
from fivefold.parallel_core.training.optimizer import AdamWConfig
from fivefold.parallel_core.training.run import DataConfig
from fivefold.parallel_core.training.run_rank import text_trainer, topology_of, train_on_text
from fivefold.parallel_core.training.schedule import WarmupCosine
from fivefold.parallel_core.training.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Lesson:
    """One distillation.

    Attributes:
        teacher: folder of the parent.
        student: folder of the model that starts.
        run: folder of checkpoints and measurements.
        steps: optimizer steps.
        config: how.
        data: text; its tokenizer is both models'.
        cache: folder of kept logits of this parent; None computes them each time.
        evaluation_sequences: held-out sequences of an evaluation.
        packed: whether a document sees only itself.
    """

    teacher: Path
    student: Path
    run: Path
    steps: int
    config: DistillConfig
    data: DataConfig
    cache: Path | None = None
    evaluation_sequences: int = 64
    packed: bool = True


class DistillRunner(LocalRunner):
    """Runs a student's microbatches against the teacher's logits.

    Args:
        student: this rank's part.
        num_microbatches: of a step.
        teacher: gives logits.
        temperature: see ``forward_kl``.
        topology: the ranks.
        vocab_size: columns without padding.
    """

    def __init__(
        self,
        student: nn.Module,
        num_microbatches: int,
        teacher: Teacher,
        temperature: float,
        topology: Topology,
        vocab_size: int,
    ):
        super().__init__(student, num_microbatches)
        self.teacher, self.temperature = teacher, temperature
        self.axis, self.vocab_size = topology.axis("tp"), vocab_size

    def _loss(self, x: Tensor, y: Tensor, *starts: Tensor) -> Tensor:
        expected = self.teacher.logits(x, *starts)
        told = {"document_starts": starts[0]} if starts else {}
        logits: Tensor = self.model(x, **told)
        missing = expected.shape[-1] - logits.shape[-1]
        if missing:  # a whole vocabulary on one rank may lack the padding of the other
            expected = F.pad(expected, (0, -missing))
        each = forward_kl(
            logits.flatten(0, 1),
            expected.flatten(0, 1),
            self.temperature,
            self.axis,
            self.vocab_size,
        )
        return (each * (y.flatten() != IGNORED)).sum()


def check_pair(teacher: HybridConfig, student: HybridConfig, names: tuple[str, str]) -> None:
    """Check that two models speak of the same tokens.

    Args:
        teacher: the one that is learnt from.
        student: the one that learns.
        names: of both, for the message.

    Raises:
        HybridConfigError: their vocabularies or their ends of text differ.
    """
    for what in ("vocab_size", "eos_token_id"):
        theirs, mine = getattr(teacher, what), getattr(student, what)
        if theirs != mine:
            raise HybridConfigError(
                f"the teacher {names[0]} has {what}={theirs} and the student {names[1]} has "
                f"{what}={mine}; forward KL compares logits of the same tokens, so both must be "
                "models of one tokenizer"
            )


def check_tokenizer(folder: Path, fingerprint: str) -> None:
    """Check that a model folder with a tokenizer has the one of the text.

    Raises:
        HybridConfigError: it has another.
    """
    if not (folder / "tokenizer.json").exists():
        return
    found = load_tokenizer(str(folder)).fingerprint
    if found != fingerprint:
        raise HybridConfigError(
            f"the tokenizer of {folder} (fingerprint {found[:12]}) is not that of the text "
            f"({fingerprint[:12]}); teacher, student and text must share one"
        )


def run_config(lesson: Lesson) -> RunConfig:
    """The student's run as ``train`` would write it, so that ``export`` reads it too."""
    config = lesson.config
    student = read_config(lesson.student)
    training = TrainingConfig(
        steps=lesson.steps,
        global_batch_size=config.global_batch_size,
        microbatch_size=config.microbatch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        gradient_clip=config.gradient_clip,
        evaluate_every=config.evaluate_every,
        evaluation_sequences=lesson.evaluation_sequences,
        checkpoint_every=config.checkpoint_every,
        optimizer=AdamWConfig(weight_decay=config.weight_decay),
        schedule=WarmupCosine(
            learning_rate=config.learning_rate,
            warmup_steps=min(config.warmup_steps, lesson.steps - 1),
            total_steps=lesson.steps,
            min_ratio=config.min_ratio,
        ),
        precision=Precision(
            parameters="float64" if config.compute == "float64" else "float32",
            compute=config.compute,
        ),
    )
    # On logits only: no loss of routers.
    model = replace(student, aux_loss_coef=0.0, z_loss_coef=0.0)
    return RunConfig(
        model=model,
        layout=config.layout,
        data=lesson.data,
        training=training,
        packed=lesson.packed,
        fp8=config.fp8,
    )


def make_trainer(lesson: Lesson, topology: Topology) -> Trainer:
    """The trainer of one rank.

    Raises:
        HybridConfigError: teacher, student and text are not of one tokenizer.
    """
    config = run_config(lesson)
    parent = read_config(lesson.teacher)
    check_pair(parent, config.model, (str(lesson.teacher), str(lesson.student)))
    fingerprint = lesson.data.load_tokenizer().fingerprint
    for folder in (lesson.teacher, lesson.student):
        check_tokenizer(folder, fingerprint)
    student = _student(config, lesson.student, topology)
    dtype = config.training.precision.compute_dtype

    def load() -> HybridForCausalLM:
        return HybridForCausalLM.from_pretrained(lesson.teacher, topology, dtype)

    runner = DistillRunner(
        student.parts[0],
        config.training.num_microbatches(topology.size("dp"), 1),
        Teacher(load, topology, lesson.cache),
        lesson.config.temperature,
        topology,
        parent.vocab_size,
    )
    width = config.model.latent_size or config.model.hidden_size
    return text_trainer(
        config,
        student,
        runner,
        lesson.run,
        split=config.context.split,
        separate_documents=config.packed,
        identity=_identity(lesson, config),
        summarise=LoadFigures(
            ep=topology.size("ep"), edp=topology.size("edp"), row_bytes=width * dtype.itemsize
        ),
    )


def _identity(lesson: Lesson, config: RunConfig) -> dict[str, Any]:
    return {
        "packed": config.packed,
        "pattern": config.model.pattern,
        "width": config.model.intermediate_size,
        "temperature": lesson.config.temperature,
        "teacher": str(lesson.teacher),
        "student": str(lesson.student),
    }


def _student(config: RunConfig, folder: Path, topology: Topology) -> ParallelModel:
    """This rank's part of the student, with the weights of its folder."""
    model = build(
        lambda: HybridForCausalLM(config.model),
        topology,
        sharding.plan(config.model, config.context),
        head=sharding.HEAD,
        tail=sharding.TAIL,
        precision=config.training.precision,
        data_parallel=config.training.data_parallel,
    )
    with hub.SafetensorsReader(folder) as reader:
        pieces = [*model.pieces(), *model.buffers()]
        load_parameters(pieces, config.model, ModelFiles(reader))
    compute_in_fp8(model, config)
    return model


def distill_rank(lesson: Lesson, world_size: int = 1) -> Outcome:
    """Distill on this rank, from the newest checkpoint of the run if there is one.

    Every rank of the job calls it; the process group must be there where there is more than one.

    Args:
        lesson: what.
        world_size: number of ranks.
    """
    config = run_config(lesson)
    check(config, world_size)
    return train_on_text(make_trainer(lesson, topology_of(config.layout)), config, lesson.run)
