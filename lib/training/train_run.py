"""A training as every worker needs to know it, and the models that it can train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..storage.folder import Folder
from .config import FinetuneConfig, FinetunePlan
from .data.job import TrainingPlan
from .losses import TEXT
from .losses.m3_unified import M3Unified
from .models.bge_m3 import BgeM3Trainable
from .models.embedder import EmbedderTrainable
from .models.reranker import RerankerTrainable
from .models.retromae import RetroMAETrainable
from .step.optimizer import Optimization
from .step.trainable import ALL_LINEAR, Adapters, Trainable

EXPORTS, FAILURE = "exports", "_failure.json"
OUT_OF_MEMORY = (
    "a worker's memory does not hold a chunk. Lower --token-budget, take --gradient-checkpointing, --parallel fsdp or "
    "--lora-rank, and start in a new --output"
)


@dataclass(frozen=True)
class TrainRun:
    """A training, or an interval of it.

    output: the run's folder, the same in every process. until: the last step of this interval. virtual_ranks: see
    collectives.Rank. dtype: "float32" | "bfloat16". threads: of a worker on CPUs.
    """

    config: FinetuneConfig
    plan: FinetunePlan
    data: TrainingPlan
    output: Folder
    trainable: Trainable
    optimization: Optimization
    until: int
    virtual_ranks: int
    dtype: str
    token_budget: int
    threads: int | None

    def export(self, step: int) -> Folder:
        """The folder of the model as it is after a step."""
        return self.output.below(f"{EXPORTS}/step-{step:07d}")


def make_train_run(
    config: FinetuneConfig, plan: FinetunePlan, data: TrainingPlan, run_config: Mapping[str, Any], threads: int | None
) -> TrainRun:
    """The whole training. run_config: has what was decided by the machines of its first command."""
    stage = plan.stage
    rates = (stage.learning_rate, stage.schedule, stage.warmup, stage.weight_decay, stage.beta2)
    return TrainRun(
        config,
        plan,
        data,
        output=config.folder,
        trainable=_trainable(plan, config.pairs.seed),
        optimization=Optimization(*rates, clip=config.optimizer.clip),
        until=data.steps,
        virtual_ranks=run_config["virtual_ranks"],
        dtype=run_config["dtype"],
        token_budget=run_config["token_budget"],
        threads=threads,
    )


def _trainable(plan: FinetunePlan, seed: int) -> Trainable:
    """The model that the losses train. Adapters where a rank is given."""
    stage, adapters = plan.stage, None
    if stage.lora_rank:
        adapters = Adapters(stage.lora_rank, stage.lora_alpha or 2 * stage.lora_rank, stage.lora_targets or ALL_LINEAR)
    if plan.kind == TEXT:
        return RetroMAETrainable(plan.spec, plan.tokens[1], seed)
    if plan.reranker is not None:
        return RerankerTrainable(plan.reranker, adapters)
    of_tokens = any(isinstance(loss, M3Unified) for loss in plan.losses.values())
    return (BgeM3Trainable if of_tokens else EmbedderTrainable)(plan.spec, plan.prompts, plan.tokens, adapters)
