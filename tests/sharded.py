"""A net that FSDP shards over two processes: what it computes, and what is saved of it.

torchrun --nproc-per-node 2 -m tests.sharded FILE
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tolerances import FLOAT32
from tnlayers import FactorizedConv1d, FactorizedLayer, LowRankLinear, Tucker, load_checkpoint, save_safetensors


def make() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = LowRankLinear(16, 12, rank=4), LowRankLinear(12, 12, rank=5)
    conv = FactorizedConv1d(1, 6, 3, method=Tucker(rank=2), plan="dense")
    return nn.Sequential(first, second, second, nn.Unflatten(1, (1, 12)), conv, nn.Linear(10, 3), nn.ReLU())


def check(path: str) -> None:
    whole, sharded, x = make().eval(), make().eval(), torch.linspace(-1, 1, 64).view(4, 16)
    mesh = init_device_mesh("cpu", (2,))
    for layer in dict.fromkeys(sharded):
        if isinstance(layer, FactorizedLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = {net: torch.optim.SGD(net.parameters(), lr=0.1) for net in (whole, sharded)}
    for _ in range(3):
        with torch.no_grad():  # in evaluation, where merged weights are kept
            torch.testing.assert_close(sharded(x), whole(x), **FLOAT32)
        for net, optimizer in optimizers.items():
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    save_safetensors(sharded, path)
    dist.barrier()
    again = make()
    print(load_checkpoint(path, again))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, **FLOAT32, msg=name)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check(sys.argv[1])
    dist.destroy_process_group()
