"""The network of a rank: in a single process, replicated (DDP), or sharded (FSDP2). One interface, three classes.

forward_no_grad(batch)    outputs without gradients
__call__(batch)           outputs with gradients
gradient_sync(last)       context of one forward and backward pass; only the last one reduces gradients over the ranks
forward_count(chunks)     number of forward passes this rank must run when it has `chunks` chunks
zero_gradients(optimizer) set all gradients to zero, before a step
clip_gradients(most)      scale gradients so that their norm is at most `most`; returns the norm before
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import max_over_ranks

Outputs = tuple[Tensor, ...]


class SingleProcess:
    """The network in one process, and the base of the other two."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def forward_no_grad(self, batch: Any) -> Outputs:
        return self.network(batch)

    def __call__(self, batch: Any) -> Outputs:
        return self.network(batch)

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def forward_count(self, chunks: int) -> int:
        return chunks

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero gradients in place. Gradients allocated anew in each step would lie between a chunk's activations and fragment
        the memory of the next chunk."""
        for weight in self.network.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        optimizer.zero_grad(set_to_none=False)

    def clip_gradients(self, most: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), most)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class DDPModel(SingleProcess):
    """Every rank has all weights; gradients are averaged once a step."""

    def __init__(self, network: nn.Module) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(network)
        self.ddp = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __call__(self, batch: Any) -> Outputs:
        return self.ddp(batch)

    def gradient_sync(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.ddp.no_sync()

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)  # gradients are views of the buckets that DDP reduces


class FSDPModel(SingleProcess):
    """Every rank has a shard of each weight (FSDP2); a layer is gathered while it computes.

    All ranks must run the same number of forward passes: a rank with fewer chunks repeats its last one with zero gradients.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(network)
        self.device = device
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in repeated_layers(network):
            fully_shard(layer, mesh=mesh)
        self.root: Any = fully_shard(network, mesh=mesh)

    @contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield

    def forward_count(self, chunks: int) -> int:
        return max_over_ranks(chunks, self.device)

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()


def repeated_layers(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: its longest ModuleList whose modules are all of one class."""
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    uniform = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(uniform, key=len) if uniform else []


def wrap_network(network: nn.Module, kind: str, device: torch.device, world: int) -> SingleProcess:
    """Wrap the network for `world` ranks. kind: "ddp" | "fsdp"; a single rank needs neither."""
    if world == 1:
        return SingleProcess(network)
    return DDPModel(network) if kind == "ddp" else FSDPModel(network, device)
