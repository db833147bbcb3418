"""AdamW, its learning rate by step, and the clipping of gradients."""

import math
from dataclasses import dataclass

import torch
from torch import nn

TEMPERATURE_RATE = 1e-2  # of the logarithm of the scale: hundreds of steps move it by a factor of a few


@dataclass(frozen=True)
class Optimization:
    """schedule: "linear" | "cosine" | "constant" after the warm-up, which is a share of all steps. clip: of the norm of all
    gradients. Weights of one dimension (norms, biases) do not decay."""

    learning_rate: float
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0

    def set_rates(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """The rate of a step; a learned temperature, a single number, has one of its own on the same schedule."""
        for group in optimizer.param_groups:
            single = all(weight.dim() == 0 for weight in group["params"])
            group["lr"] = rate * (TEMPERATURE_RATE / self.learning_rate if single else 1.0)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 1 to `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step <= warm:
            return self.learning_rate * step / max(warm, 1)
        return self.learning_rate * SCHEDULES[self.schedule]((step - warm) / max(steps - warm, 1))

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        """Over all weights that are trained."""
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [weight for weight in trained if weight.dim() == 1], "weight_decay": 0.0},
            {"params": [weight for weight in trained if weight.dim() == 0], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(0.9, self.beta2),
            eps=self.epsilon,
        )


SCHEDULES = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}
