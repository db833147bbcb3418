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


@dataclass(frozen=True)
class TrainRun:
    """A training, or an interval of it.

    losses: by dataset, "" for all others. plan: the folder of the training plan. steps: of the whole run; until: the last one of
    this interval; epoch_steps: of one pass over the data. virtual_ranks: see collectives.Rank. dtype: "float32" | "bfloat16".
    parallel: see parallel.wrap_network. checkpoint_steps: between two checkpoints. threads: of a worker on CPUs.
    """

    trainable: Trainable
    losses: Mapping[str, Any]
    plan: Folder
    output: Folder
    steps: int
    until: int
    epoch_steps: float
    global_batch: int
    virtual_ranks: int
    seed: int
    optimization: Optimization
    dtype: str = "float32"
    parallel: str = "ddp"
    token_budget: int = 4096
    gradient_checkpointing: bool = False
    learn_temperature: bool = False
    checkpoint_steps: int = 100
    threads: int | None = None

    def export(self, step: int) -> Folder:
        """The folder of the model as it is after a step."""
        return self.output.below(f"{EXPORTS}/step-{step:07d}")


def make_train_run(
    config: FinetuneConfig, plan: FinetunePlan, data: TrainingPlan, run_config: Mapping[str, Any], threads: int | None
) -> TrainRun:
    """The whole training. run_config: has what was decided by the machines of its first command."""
    stage = plan.stage
    return TrainRun(
        trainable=_trainable(plan, config.pairs.seed),
        losses=plan.losses,
        plan=Folder(data.url, config.folder.options),
        output=config.folder,
        steps=data.steps,
        until=data.steps,
        epoch_steps=data.epoch_steps,
        global_batch=stage.batch,
        virtual_ranks=run_config["virtual_ranks"],
        seed=config.pairs.seed,
        optimization=Optimization(
            stage.learning_rate, stage.schedule, stage.warmup, stage.weight_decay, stage.beta2, clip=plan.clip
        ),
        dtype=run_config["dtype"],
        parallel=config.compute.parallel,
        token_budget=run_config["token_budget"],
        gradient_checkpointing=stage.gradient_checkpointing,
        learn_temperature=config.loss.learn_temperature,
        checkpoint_steps=config.checkpoint_steps,
        threads=threads,
    )


def _trainable(plan: FinetunePlan, seed: int) -> Trainable:
    """The model that the losses train. Adapters where a rank is given."""
    stage, adapters = plan.stage, None
    if stage.lora_rank:
        adapters = Adapters(
            stage.lora_rank, stage.lora_alpha or 2 * stage.lora_rank, 0.0, stage.lora_targets or ALL_LINEAR
        )
    if plan.kind == TEXT:
        return RetroMAETrainable(plan.spec, plan.tokens[1], seed)
    if plan.reranker is not None:
        return RerankerTrainable(plan.reranker, adapters)
    of_tokens = any(isinstance(loss, M3Unified) for loss in plan.losses.values())
    return (BgeM3Trainable if of_tokens else EmbedderTrainable)(plan.spec, plan.prompts, plan.tokens, adapters)
