"""The block of ``gpt.py`` between an embedding and a head, cut into pipeline stages.

Legend: B sequences of a microbatch, S tokens, H hidden width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from fivefold.parallel_core.in_flight import Order, orders_of
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.losses import CrossEntropy
from fivefold.parallel_core.pipeline import PipelineRunner, keep_stage
from fivefold.parallel_core.pipeline_config import ONE_STAGE, PipelineConfig
from fivefold.parallel_core.regions import recompute
from fivefold.parallel_core.topology import Topology

from .gpt import GPT, B, Block, H, S

V = 13
HEAD, TAIL = ("embed_tokens",), ("norm", "lm_head")


class Embedding(nn.Embedding):
    """Keeps ids of its own and not a view of those of the whole step."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.clone())


class Loss(CrossEntropy):
    """Keeps targets of its own."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits, targets.clone())


class StagedGPT(GPT):
    """Ids (B, S) to logits (B, S, V); a stage reads or gives hidden states."""

    def __init__(self, num_layers: int):
        super().__init__(0)
        self.embed_tokens = Embedding(V, H)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(num_layers)})
        self.norm = nn.LayerNorm(H)
        self.lm_head = nn.Linear(H, V, bias=False)
        self.loss = Loss()

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None else self.lm_head(self.norm(x))


def config_of(schedule: str, budget: int | None = None) -> PipelineConfig:
    """A schedule with as few stages on each rank as it has."""
    return PipelineConfig(
        schedule=schedule,  # type: ignore[arg-type]
        stages_per_rank=1 if schedule in ONE_STAGE else 2,
        activation_budget=budget,
    )


def layers_of(num_stages: int) -> int:
    """How many layers a model of so many stages has; two or one in each."""
    return max(4, num_stages)


def part_of(stage: int, num_stages: int) -> StagedGPT:
    """A stage of the model, in float64, the same wherever it is made."""
    torch.manual_seed(5)
    model = StagedGPT(layers_of(num_stages))
    part = keep_stage(model.double(), stage, num_stages, head=HEAD, tail=TAIL)
    assert isinstance(part, StagedGPT)
    return part


class Pipeline:
    """This rank's stages and what runs them."""

    def __init__(self, config: PipelineConfig, num_ranks: int, num_microbatches: int):
        topology = Topology(Layout(num_ranks, pp=num_ranks))
        self.rank, self.num_stages = topology.rank("pp"), num_ranks * config.stages_per_rank
        self.stages = [
            config.stage_index(self.rank, i, num_ranks) for i in range(config.stages_per_rank)
        ]
        self.parts = [part_of(stage, self.num_stages) for stage in self.stages]
        if config.activation_budget is not None:
            for part in self.parts:
                recompute(part, "full", only_on_request=True)
        self.runner = PipelineRunner(
            self.parts,
            topology,
            config,
            num_microbatches,
            ids=(B, S),
            hidden=(B, S, H),
            logits=(B, S, V),
            dtype=torch.float64,
        )
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(0, V, (2, num_microbatches * B, S), generator=generator)
        self.inputs, self.targets = ids

    @property
    def order(self) -> Order:
        """What this rank does in a step."""
        return orders_of(self.runner.schedule)[self.rank]

    def step(self) -> list[Tensor]:
        """The loss and all gradients of a step with the same random numbers each time."""
        torch.manual_seed(11 + self.rank)
        loss = self.runner.train(self.inputs, self.targets, 1 / self.targets.numel())
        named = [p for part in self.parts for p in part.parameters()]
        gradients = [p.grad.clone() for p in named if p.grad is not None]
        assert len(gradients) == len(named)
        for part in self.parts:
            part.zero_grad()
        return [loss, *gradients]
