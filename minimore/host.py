"""The host's memory as a second, slower shelf of a GPU: pinned, and copied on a stream of its own beside the computation.

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
        finalize(copy, runtime.cudaHostUnregister, place).atexit = False         # before its memory is given to somebody else
    return copy.copy_(tensor)


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping; 0 where the system does not say."""
    try:
        return 1024 * int(re.search(r"MemAvailable: *([0-9]+) kB", Path("/proc/meminfo").read_text()).group(1))
    except (OSError, AttributeError):
        return 0


class Host:
    """Tensors that are kept on the host. A tensor on the host is its own ticket: `put` gives it, `fetch` and `get` take it."""

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.coming: dict[int, tuple] = {}       # id of a ticket -> (the ticket, its copy on the device, the event that ends the copying)

    def put(self, tensor: Tensor) -> Tensor:
        """Send a tensor to the host; the device's memory is free as soon as the copy is made."""
        ticket = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None)
        self.put_back(tensor, ticket)
        return ticket

    def put_back(self, tensor: Tensor, ticket: Tensor):
        """Send new numbers to the place where a tensor is kept."""
        if self.stream is None:
            ticket.copy_(tensor)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            ticket.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)        # its memory is not given away before the copy is made

    def fetch(self, ticket: Tensor | None):
        """Begin to bring a tensor to the device."""
        if ticket is None or id(ticket) in self.coming:
            return
        if self.stream is None:
            self.coming[id(ticket)] = ticket, ticket.clone(), None
            return
        with torch.cuda.stream(self.stream):     # after whatever was sent there before
            copy = ticket.to(self.device, non_blocking=True)
            self.coming[id(ticket)] = ticket, copy, self.stream.record_event()

    def get(self, ticket: Tensor) -> Tensor:
        """The tensor on the device; waits for a `fetch` that is under way."""
        self.fetch(ticket)
        _, copy, event = self.coming.pop(id(ticket))
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            copy.record_stream(current)
        return copy

    def settle(self):
        """Wait until every copy is made."""
        if self.stream is not None:
            self.stream.synchronize()
