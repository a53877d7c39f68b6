"""The host's memory as a second, slower shelf of a GPU: pinned, and copied on streams of its own, one each way, beside the computation.

On a CPU both are the same memory; the copies are made all the same, so that what is tested there is what runs on a GPU.
"""

import re
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor


def pinned(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, page-locked if there is a GPU, which may then read it without the CPU.

    Registered rather than allocated as such: torch's allocator of pinned memory rounds up to the next power of two.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    if torch.cuda.is_available() and copy.nbytes:
        runtime, place = torch.cuda.cudart(), copy.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(place, copy.nbytes, 0))
        finalize(
            copy, runtime.cudaHostUnregister, place
        ).atexit = False  # before its memory is given to somebody else
    return copy.copy_(tensor)


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping, within the container's limit; 0 where the system does not say."""
    try:
        free = 1024 * int(
            re.search(r"MemAvailable: *([0-9]+) kB", Path("/proc/meminfo").read_text()).group(1)
        )
    except (OSError, AttributeError):
        return 0
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(
                free,
                max(
                    0,
                    int(Path("/sys/fs/cgroup", limit).read_text())
                    - int(Path("/sys/fs/cgroup", used).read_text()),
                ),
            )
        except (OSError, ValueError):  # none, or "max"
            pass
    return free


class Host:
    """Tensors that are kept on the host. A tensor on the host is its own ticket: `put` gives it, `fetch` and `get` take it.

    The device's memory is allocated on the stream that computes, and what is under way is held until its copy is made, by a GPU that is told to wait:
    an allocator that hears of several streams would keep every freed piece until the CPU, far ahead, sees that the copy is over.
    """

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self.down, self.up = (
            torch.cuda.Stream(self.device) if self.device.type == "cuda" else None for _ in range(2)
        )  # both ways at once
        self.coming: dict[
            int, tuple
        ] = {}  # id of a ticket -> the ticket, its copy on the device, the event that ends the copying
        self.leaving, self.left = (
            [],
            [],
        )  # (tensor, event that ends its copying) of this part of the walk, and of the one before
        self.arrived: dict[
            int, tuple
        ] = {}  # id of a ticket -> the ticket, the event after which the host has it

    def put(self, tensor: Tensor) -> Tensor:
        """Send a tensor to the host."""
        ticket = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.down is not None)
        self.put_back(tensor, ticket)
        return ticket

    def put_back(self, tensor: Tensor, ticket: Tensor):
        """Send new numbers to the place where a tensor is kept."""
        if self.down is None:
            ticket.copy_(tensor)
            return
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            ticket.copy_(tensor, non_blocking=True)
            self.leaving.append((tensor, self.down.record_event()))
        self.arrived[id(ticket)] = ticket, self.leaving[-1][1]

    def part(self):
        """A part of the walk is over: what left in the part before must be gone before its memory is used again."""
        for _, event in self.left:
            torch.cuda.current_stream(self.device).wait_event(event)
        self.leaving, self.left = [], self.leaving

    def fetch(self, ticket: Tensor | None):
        """Begin to bring a tensor to the device."""
        if ticket is None or id(ticket) in self.coming:
            return
        if self.up is None:
            self.coming[id(ticket)] = ticket, ticket.clone(), None
            return
        copy = torch.empty(ticket.shape, dtype=ticket.dtype, device=self.device)
        self.up.wait_stream(
            torch.cuda.current_stream(self.device)
        )  # whoever had this memory is done with it
        if id(ticket) in self.arrived:
            self.up.wait_event(self.arrived.pop(id(ticket))[1])
        with torch.cuda.stream(self.up):
            copy.copy_(ticket, non_blocking=True)
            self.coming[id(ticket)] = ticket, copy, self.up.record_event()

    def get(self, ticket: Tensor) -> Tensor:
        """The tensor on the device; the GPU waits for a `fetch` that is under way."""
        self.fetch(ticket)
        _, copy, event = self.coming.pop(id(ticket))
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return copy

    def settle(self):
        """Wait until every copy is made."""
        for stream in filter(None, (self.down, self.up)):
            stream.synchronize()
        self.leaving, self.left, self.arrived = [], [], {}
