"""What several ranks share: samples (DistributedDataParallel, Horovod), weights too (FSDP), or volumes (spatial)."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from saih.core import Clock, Place
from saih.errors import SaihError
from workloads.cosmology.cosmoflow.model import Regressor
from workloads.cosmology.cosmoflow.spatial import Slabs, share_out

CYCLE_MS = "0.1"
"""How often Horovod looks for gradients to reduce; at its default of 1 ms no all-reduce takes less than that."""


class Parallel:
    """A network trained by every rank of the job as if there were one; as it stands here, by one rank alone."""

    def __init__(self, network: Regressor) -> None:
        self.network = network
        self.model: nn.Module = network
        """What to call forward on."""
        self.reader = (0, 1)
        """Which of how many readers of disjoint samples this rank is."""

    def share(self, counts_BDHWC: Tensor) -> Tensor:
        """What this rank sees of the volumes it has read."""
        return counts_BDHWC

    def backward(self, loss: Tensor, clock: Clock) -> None:
        """Gradients of `loss`, averaged over ranks. `communication` is what is waited for after the last gradient."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """The whole gradient of each parameter."""
        return [cast(Tensor, each.grad) for each in self.network.parameters()]

    def weights(self) -> list[Tensor]:
        """The whole of each parameter."""
        return [each.detach() for each in self.network.parameters()]

    def silence(self) -> None:
        """From here on gradients stay on their rank."""

    def close(self) -> None:
        """Let go of threads and connections."""


def parallel(backend: str, network: Regressor, place: Place, device: str) -> Parallel:
    """`network` on one rank alone, or shared by all ranks under the backend named.

    Raises:
        SaihError: the backend is Horovod, which is not installed.
    """
    if place.world == 1:
        return Parallel(network)
    if backend == "horovod":
        return Horovod(network, place, device)
    if backend == "fsdp":
        return Fsdp(network, place, device)
    return Spatial(network, place) if backend == "spatial" else Ddp(network, place)


class Ddp(Parallel):
    """torch's DistributedDataParallel over the job's process group, NCCL or gloo: it reduces buckets in backward."""

    def __init__(self, network: Regressor, place: Place) -> None:
        super().__init__(network)
        self.model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.reader = (place.rank, place.world)

    def backward(self, loss: Tensor, clock: Clock) -> None:
        """What backward does after the last gradient of the first stage is waiting for the reduction."""
        first = list(self.network.stages[0].parameters())
        left = len(first)

        def arrived(_: Tensor) -> None:
            nonlocal left
            left -= 1
            if not left:
                clock.enter("communication")

        hooks = [each.register_post_accumulate_grad_hook(arrived) for each in first]
        loss.backward()
        clock.enter("compute")
        for hook in hooks:
            hook.remove()

    def silence(self) -> None:
        cast(DistributedDataParallel, self.model).require_backward_grad_sync = False


class Spatial(Ddp):
    """Every rank holds a slab of each volume: `spatial.py`. All ranks read the same samples.

    DistributedDataParallel averages where slabs want a sum; what goes back through `Gather` makes up for it.
    """

    def __init__(self, network: Regressor, place: Place) -> None:
        self.slabs = Slabs(place.rank, place.world, dist.new_group())
        share_out(network, self.slabs)
        super().__init__(network, place)
        self.reader = (0, 1)

    def share(self, counts_BDHWC: Tensor) -> Tensor:
        return self.slabs.cut(counts_BDHWC, dim=1)

    def close(self) -> None:
        dist.destroy_process_group(self.slabs.group)


class Fsdp(Parallel):
    """torch's fully_shard (FSDP2): each rank stores its part of weights, gradients and momentum.

    A stage's weights are gathered before it computes and let go after it. Waiting for them is inside forward and
    backward, so it counts as `compute`.
    """

    def __init__(self, network: Regressor, place: Place, device: str) -> None:
        mesh = init_device_mesh(torch.device(device).type, (place.world,))
        for stage in network.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # or a forward alone would leave old weights
        super().__init__(network)
        self.reader = (place.rank, place.world)

    def gradients(self) -> list[Tensor]:
        return [cast(DTensor, each.grad).full_tensor() for each in self.network.parameters()]

    def weights(self) -> list[Tensor]:
        return [cast(DTensor, each.detach()).full_tensor() for each in self.network.parameters()]


class Horovod(Parallel):
    """Horovod: a hook of each gradient hands it over in backward; a thread of its own fuses and reduces them.

    Its optimizer wrapper refuses the gradients of channels-last weights, which are dense but not contiguous in order of
    their dimensions; so they are handed over flat, as they lie in memory.
    """

    def __init__(self, network: Regressor, place: Place, device: str) -> None:
        super().__init__(network)
        self.reader = (place.rank, place.world)
        self.hvd, self.rendezvous = start_horovod(place, device)
        self.hvd.broadcast_parameters({name: _flat(each.data) for name, each in network.named_parameters()}, 0)
        self.handles: list[int] = []
        self.hooks = [each.register_post_accumulate_grad_hook(self._reduce) for each in network.parameters()]

    def backward(self, loss: Tensor, clock: Clock) -> None:
        loss.backward()
        clock.enter("communication")
        for handle in self.handles:
            self.hvd.synchronize(handle)
        self.handles.clear()
        clock.enter("compute")

    def silence(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def close(self) -> None:
        """Stop its thread, or it would wake up beside the points that follow."""
        for hook in self.hooks:
            hook.remove()
        self.hvd.shutdown()
        if self.rendezvous is not None:
            self.rendezvous.stop()

    def _reduce(self, parameter: Tensor) -> None:
        name = f"gradient {len(self.handles)}"  # backward's order is the same on every rank
        self.handles.append(self.hvd.allreduce_async_(_flat(cast(Tensor, parameter.grad)), name=name))


def _flat(dense: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order of memory, shared with it: [numel]."""
    return dense.as_strided((dense.numel(),), (1,))


def start_horovod(place: Place, device: str) -> tuple[Any, Any]:
    """`horovod.torch`, initialised, whichever launcher started the ranks, and the server to stop after it on rank 0.

    Ranks stand node by node. They meet at an HTTP server that horovodrun would start; here rank 0 does, on the job's
    MASTER_ADDR. Who does not come is waited for as long as HOROVOD_GLOO_TIMEOUT_SECONDS says, 30 unless set.

    Raises:
        SaihError: Horovod is not installed, or counts the ranks differently; no interface leads to MASTER_ADDR.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise SaihError(f"backend=horovod needs Horovod ({error}); build and install it with: make horovod") from None
    # The last node says where the first one is: that one may have its own name on a loopback, as Debian does.
    seen = _address_of_the_first_node() if place.rank == place.world - 1 else 0
    agreed = torch.tensor([place.local_rank + 1, seen, 0], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    per_node = int(agreed[0])
    nodes = place.world // per_node
    rendezvous, agreed[2] = _start_rendezvous(nodes, per_node) if place.rank == 0 else (None, 0)
    dist.broadcast(agreed, 0)
    address = str(ipaddress.IPv4Address(int(agreed[1])))
    os.environ.update(
        HOROVOD_RANK=str(place.rank),
        HOROVOD_SIZE=str(place.world),
        HOROVOD_LOCAL_RANK=str(place.local_rank),
        HOROVOD_LOCAL_SIZE=str(per_node),
        HOROVOD_CROSS_RANK=str(place.rank // per_node),
        HOROVOD_CROSS_SIZE=str(nodes),
        HOROVOD_HOSTNAME=_node(place.rank // per_node),
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        HOROVOD_GLOO_RENDEZVOUS_ADDR=address,
        HOROVOD_GLOO_RENDEZVOUS_PORT=str(int(agreed[2])),
        HOROVOD_GLOO_IFACE=_interface_to(address),
    )
    os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_MS)
    hvd.init()
    if (hvd.rank(), hvd.size()) != (place.rank, place.world):
        raise SaihError(f"Horovod calls rank {place.rank} of {place.world} rank {hvd.rank()} of {hvd.size()}")
    return hvd, rendezvous


def _address_of_the_first_node() -> int:
    """MASTER_ADDR as this host knows it: an IPv4 address as a number."""
    name = os.environ["MASTER_ADDR"]
    try:
        return int(ipaddress.IPv4Address(socket.gethostbyname(name)))
    except OSError as error:
        raise SaihError(f"MASTER_ADDR: {socket.gethostname()} knows no address of {name} ({error})") from None


def _start_rendezvous(nodes: int, per_node: int) -> tuple[Any, int]:
    """A server that the ranks meet at, and its port."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    hosts = ",".join(f"{_node(node)}:{per_node}" for node in range(nodes))
    server.init(get_host_assignments(parse_hosts(hosts), nodes * per_node))
    return server, int(port)


def _node(number: int) -> str:
    """A node's name among Horovod's ranks: hosts may share theirs."""
    return f"node{number}"


def _interface_to(address: str) -> str:
    """The network interface of this host that reaches `address`."""
    import psutil  # comes with Horovod

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
    for name, given in psutil.net_if_addrs().items():
        if own in {each.address for each in given}:
            return str(name)
    raise SaihError(f"no network interface of {socket.gethostname()} has {own}, by which it reaches {address}")
