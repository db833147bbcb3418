"""AdamW, its learning rate schedule, and gradient clipping."""

import math
from dataclasses import dataclass

import torch
from torch import nn

LOGIT_SCALE_RATE = 1e-2  # learning rate of the learned logit scale: hundreds of steps change it by a factor of a few


@dataclass(frozen=True)
class Optimization:
    """Hyperparameters of the optimizer.

    schedule: "linear" | "cosine" | "constant" after the warm-up. warmup: share of all steps. clip: largest norm of all
    gradients. Weights of one dimension (norms, biases) do not decay.
    """

    learning_rate: float
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0

    def set_rates(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Set a step's learning rate. The logit scale, a single number, has its own rate on the same schedule."""
        for group in optimizer.param_groups:
            single = all(weight.dim() == 0 for weight in group["params"])
            group["lr"] = rate * (LOGIT_SCALE_RATE / self.learning_rate if single else 1.0)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 1 to `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step <= warm:
            return self.learning_rate * step / max(warm, 1)
        return self.learning_rate * SCHEDULES[self.schedule]((step - warm) / max(steps - warm, 1))

    def optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        """AdamW over all weights that require gradients."""
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
            {"params": [weight for weight in weights if weight.dim() == 0], "weight_decay": 0.0},
        ]
        filled = [group for group in groups if group["params"]]
        return torch.optim.AdamW(filled, lr=self.learning_rate, betas=(0.9, self.beta2))


# Factor of the learning rate by the share of the steps after the warm-up that are done.
SCHEDULES = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}
