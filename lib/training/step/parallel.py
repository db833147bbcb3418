"""How the ranks share one network: alone, replicated (DDP), or sharded (FSDP2). One interface, three classes.

peek(batch)         outputs without gradients
__call__(batch)     outputs with gradients
syncing(last)       a context for a forward and its backward: gradients are reduced over the ranks in the last one only
chunks(count)       how many forwards this rank must run where it has `count` chunks
clear(optimizer)    gradients of zero, before a step
clip(most)          the norm of all gradients, which are scaled down to `most`
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import greatest

Outputs = tuple[Tensor, ...]


class SingleProcess:
    """One process."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def peek(self, batch: Any) -> Outputs:
        return self.network(batch)

    def __call__(self, batch: Any) -> Outputs:
        return self.network(batch)

    def syncing(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def chunks(self, count: int) -> int:
        return count

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """In place: gradients that are made anew at each step lie among a chunk's activations, in the way of the next's."""
        for weight in self.network.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        optimizer.zero_grad(set_to_none=False)

    def clip(self, most: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class DDPModel(SingleProcess):
    """Every rank holds the whole network; its gradients are averaged once a step."""

    def __init__(self, network: nn.Module) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(network)
        self.ddp = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, batch: Any) -> Outputs:
        return self.ddp(batch)

    def syncing(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.ddp.no_sync()

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)  # they lie in the buckets that are reduced


class FSDPModel(SingleProcess):
    """Every rank holds a part of each weight (FSDP2); layers are gathered for the time that they compute.

    All ranks must run as many forwards: one with fewer chunks repeats its last one, with gradients of zero.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(network)
        self.device = device
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        self.root: Any = fully_shard(network, mesh=mesh)

    @contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield

    def chunks(self, count: int) -> int:
        return greatest(count, self.device)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the longest list of equal modules that it has."""
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    alike = [found for found in lists if len({type(each) for each in found}) == 1]
    return max(alike, key=len) if alike else []


WRAPPERS: dict[str, Callable[[nn.Module, torch.device], SingleProcess]] = {
    "ddp": lambda network, device: DDPModel(network),
    "fsdp": lambda network, device: FSDPModel(network, layers_of(network), device),
}


def wrapped(network: nn.Module, kind: str, device: torch.device, world: int) -> SingleProcess:
    """The network as `world` ranks share it: "ddp" | "fsdp"; one rank alone needs neither."""
    return WRAPPERS[kind](network, device) if world > 1 else SingleProcess(network)
