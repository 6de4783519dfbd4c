"""PMEP, peer memory pooling (EnergonAI, arXiv 2209.02341): some layers' weights wait in other memory, fetched ahead.

Every k-th layer lives in the memory of a peer GPU or of the host; while the others compute, its weights are copied into
a staging buffer. The authors' code moves a layer back when it is done; weights are only read, so here their copy stays
where it is and nothing is ever written back.

`Pmep(stage, 4, "host")` makes a loaded stage run that way. A stage made with `on_host=offloaded_layers(layers, 4)`
never has more on its device than that. Without CUDA a thread copies within host memory, which is emulated, and can be
held to a link's rate. Which layers go, and when that costs no time, is in `overlap`.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saih.errors import SaihError, unknown
from workloads.llm.energonai.overlap import offloaded_layers
from workloads.llm.kv import EmulatedLink
from workloads.llm.model import Stage

ALIGNMENT_BYTES = 256
"""Where a weight begins in a buffer: CUDA's own allocations begin at multiples of it, and vector loads need less."""
KEPT_COPIES = 64


# -- Links: what copies ahead while the compute goes on ----------------------------------------------------------------


class Copy(Protocol):
    """A copy on its way."""

    def wait(self) -> None:
        """What computes from now on finds it done."""

    def seconds(self) -> float:
        """How long it took; waits for its end."""


class Link(Protocol):
    """Copies in the order they are asked for, beside the compute."""

    def start(self, into: Tensor, out_of: Tensor) -> Copy:
        """Begins when the compute asked for so far no longer needs `into`."""

    def close(self) -> None:
        """Waits for all copies."""


class SideStream:
    """A CUDA stream of its own: from a peer over NVLink or PCIe, or from pinned host memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, into: Tensor, out_of: Tensor) -> Copy:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            began.record(self.stream)
            into.copy_(out_of, non_blocking=True)
            ended.record(self.stream)
        return _StreamCopy(self.device, began, ended)

    def close(self) -> None:
        self.stream.synchronize()


@dataclass(frozen=True)
class _StreamCopy:
    device: torch.device
    began: torch.cuda.Event
    ended: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.ended)

    def seconds(self) -> float:
        self.ended.synchronize()
        return float(self.began.elapsed_time(self.ended)) / 1e3


class HostThread:
    """A thread in place of a copy engine, host memory in place of a device's. Emulated, whatever its rate."""

    def __init__(self, link: EmulatedLink | None) -> None:
        self.link, self.pool = link, ThreadPoolExecutor(1, "pmep")

    def start(self, into: Tensor, out_of: Tensor) -> Copy:
        return _ThreadCopy(self.pool.submit(self._copy, into, out_of))

    def close(self) -> None:
        self.pool.shutdown()

    def _copy(self, into: Tensor, out_of: Tensor) -> float:
        began_s = time.perf_counter()
        into.copy_(out_of)
        if self.link is not None:
            time.sleep(max(0.0, began_s + self.link.seconds(out_of.nbytes, 1) - time.perf_counter()))
        return time.perf_counter() - began_s


@dataclass(frozen=True)
class _ThreadCopy:
    future: Future[float]

    def wait(self) -> None:
        self.future.result()

    def seconds(self) -> float:
        return self.future.result()


# -- The stage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """The weights of one layer, put away one behind the other so that they move in one copy."""

    places: tuple[tuple[nn.Parameter, int, torch.Size], ...]
    """Each parameter, its first byte in a buffer, its shape."""
    stored: Tensor
    """Their bytes where they wait. Never written again."""

    @classmethod
    def put_away(cls, block: nn.Module, home: torch.device, pinned: bool) -> _Weights:
        """Copies them to `home`; the memory they took is free."""
        if any(parameter.is_mkldnn for parameter in block.parameters()):
            raise SaihError("prepacked matrices cannot be offloaded: offload the stage or prepack it, not both")
        parameters = list(block.parameters())
        ends = list(accumulate(-(-each.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for each in parameters))
        places = tuple(zip(parameters, [0, *ends[:-1]], [each.shape for each in parameters], strict=True))
        found = cls(places, torch.empty(ends[-1], dtype=torch.uint8, device=home, pin_memory=pinned))
        values = [parameter.data for parameter in parameters]
        found.bind(found.stored)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        return found

    def bind(self, buffer: Tensor) -> None:
        """The layer computes with what lies in this buffer."""
        for parameter, begin, shape in self.places:
            end = begin + shape.numel() * parameter.dtype.itemsize
            parameter.data = buffer[begin:end].view(parameter.dtype).view(shape)


@dataclass(frozen=True)
class _Flight:
    """A layer whose weights are in a staging buffer, or on their way there."""

    layer: int
    buffer: int
    copy: Copy


class Pmep:
    """A stage that only infers, every `interval`-th layer of it fetched into `depth` staging buffers before it runs.

    The buffers are all the memory that those layers take on the stage's device. As soon as a layer has run, its buffer
    is filled for the offloaded layer `depth` further on, after the last one for the first of the next pass.
    """

    def __init__(
        self, stage: Stage, interval: int, store: str = "host", *, depth: int = 1, link: EmulatedLink | None = None
    ) -> None:
        """store: "host", or "peer:N", the CUDA device with that number. link: of the emulated form only.

        Raises SaihError for an interval that offloads nothing, no staging buffer, a store that the stage's device
        cannot reach, and packed weights.
        """
        away = offloaded_layers(len(stage.layers), interval)
        home = _home(store, stage.device)
        if depth < 1:
            raise SaihError(f"depth={depth}: at least one staging buffer is needed")
        self.emulated = stage.device.type == "cpu"
        if link is not None and not self.emulated:
            raise SaihError("a link is emulated on a CPU only; a GPU has a real one")
        self.stage, self.depth = stage, min(depth, len(away))
        blocks = list(stage.layers.values())
        pinned = home.type == "cpu" and not self.emulated
        self._weights = [_Weights.put_away(blocks[layer], home, pinned) for layer in away]
        longest = max(each.stored.nbytes for each in self._weights)
        self._staging = [torch.empty(longest, dtype=torch.uint8, device=stage.device) for _ in range(self.depth)]
        self._link: Link = HostThread(link) if self.emulated else SideStream(stage.device)
        self._copies: deque[Copy] = deque(maxlen=KEPT_COPIES)
        self._flying: deque[_Flight] = deque()
        self._running: _Flight | None = None
        self._asked = 0
        for buffer in range(self.depth):
            self._fetch(buffer)
        self._hooks = [hook for place, layer in enumerate(away) for hook in self._watch(place, blocks[layer])]

    @property
    def staging_bytes(self) -> int:
        """What the offloaded layers take on the stage's device."""
        return sum(buffer.nbytes for buffer in self._staging)

    @property
    def stored_bytes(self) -> int:
        """What they take where they wait."""
        return sum(each.stored.nbytes for each in self._weights)

    def copies_s(self) -> list[float]:
        """Seconds of the latest copies, one a layer fetched; waits for them."""
        return [copy.seconds() for copy in self._copies]

    def stop(self) -> None:
        """Ends the copies. The stage must not run any more."""
        for hook in self._hooks:
            hook.remove()
        self._link.close()

    def close(self) -> None:
        """All layers are resident again, and the stage runs as before."""
        self.stop()
        for each in self._weights:
            each.bind(each.stored.to(self.stage.device, copy=True))

    def _watch(self, place: int, block: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        def enter(module: nn.Module, inputs: Any) -> None:
            if self._running is not None:  # a pass was broken off in the middle of a layer
                self._leave()
            while (flight := self._flying.popleft()).layer != place:  # or between two layers
                self._fetch(flight.buffer)
            flight.copy.wait()
            self._weights[place].bind(self._staging[flight.buffer])
            self._running = flight

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._leave()

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)

    def _leave(self) -> None:
        flight, self._running = cast(_Flight, self._running), None
        self._fetch(flight.buffer)

    def _fetch(self, buffer: int) -> None:
        """The weights of the next layer in line go into a buffer that nobody needs any more."""
        layer = self._asked % len(self._weights)
        self._asked += 1
        stored = self._weights[layer].stored
        copy = self._link.start(self._staging[buffer][: len(stored)], stored)
        self._copies.append(copy)
        self._flying.append(_Flight(layer, buffer, copy))


def _home(store: str, device: torch.device) -> torch.device:
    """Where a store is. Raises SaihError for one that there is not, or that this device cannot read directly."""
    if store == "host":
        return torch.device("cpu")
    kind, _, number = store.partition(":")
    if kind != "peer" or not number.isdecimal():
        raise unknown("store", store, ("host", "peer:N"), "PMEP")
    if device.type != "cuda":
        raise SaihError(
            f"store {store}: a peer is another GPU, and the stage is on {device}; use the host (weights=cpu-offload)"
        )
    peer, own = int(number), device.index or 0
    if peer == own or peer >= torch.cuda.device_count():
        others = [f"peer:{n}" for n in range(torch.cuda.device_count()) if n != own]
        raise SaihError(f"store {store}: {device} has the peers {', '.join(others) or 'none: there is one GPU'}")
    if not torch.cuda.can_device_access_peer(own, peer):
        raise SaihError(f"store {store}: {device} cannot access the memory of GPU {peer}; `nvidia-smi topo -p2p r`")
    return torch.device("cuda", peer)
