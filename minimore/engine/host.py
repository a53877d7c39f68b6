"""The host's memory as a second, slower shelf of a GPU.

It is pinned, and copies run beside the computation on CUDA streams of their own, one each way. On a
CPU both shelves are the same memory. The copies are made all the same, so that what is tested there
is what runs on a GPU.
"""

import re
from pathlib import Path
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor

# Where Linux says what a container may take and has taken, in its two versions of cgroups.
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in the host's memory.

    It is page-locked if there is a GPU, which may then read it without the CPU. Existing memory is
    registered: torch's own allocator of pinned memory rounds up to the next power of two.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    if torch.cuda.is_available() and copy.nbytes:
        runtime, address = torch.cuda.cudart(), copy.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, copy.nbytes, 0))
        # Unregistered before its memory is given to somebody else.
        finalize(copy, runtime.cudaHostUnregister, address).atexit = False
    return copy.copy_(tensor)


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping, within the container's limit.

    0 where the system does not say.
    """
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    line = re.search(r"MemAvailable: *([0-9]+) kB", text)
    if line is None:
        return 0
    available = 1024 * int(line.group(1))
    for limit_file, used_file in CGROUP_FILES:
        try:
            limit = int(Path("/sys/fs/cgroup", limit_file).read_text())
            used = int(Path("/sys/fs/cgroup", used_file).read_text())
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
        available = min(available, max(0, limit - used))
    return available


class Sent(NamedTuple):
    """A tensor on its way to the host."""

    tensor: Tensor  # on the device, held until its copy is made
    copied: torch.cuda.Event


class Fetched(NamedTuple):
    """A tensor on its way to the device."""

    home: Tensor  # held, since its id is the key under which this is found
    copy: Tensor  # on the device
    copied: torch.cuda.Event | None  # None on a CPU, where a copy is made at once


class Written(NamedTuple):
    """A home whose numbers may still be on their way to it."""

    home: Tensor
    copied: torch.cuda.Event


class Host:
    """Tensors that are kept in the host's memory while the device computes with others.

    A tensor that is put on the host gets a *home* there: a tensor of the same shape, which is also
    how one asks for it again. `fetch` begins to bring its numbers to the device, and `get` waits
    for them:

        home = host.put(tensor)         device -> host
        host.fetch(home)                host -> device, while something else is computed
        tensor = host.get(home)         the numbers on the device
        host.put_back(tensor, home)     device -> host, into the same home

    A tensor that is sent away must stay until its copy is made. It is held here until the part of
    a step after the one in which it was sent, and there the GPU, not the CPU, waits for the copy
    (`end_part`). The device's memory is always allocated on the CUDA stream that computes: an
    allocator that knew of several streams would keep every freed piece until the CPU, which is far
    ahead, sees that the copy is over.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        self.to_host = torch.cuda.Stream(self.device) if on_cuda else None
        self.to_device = torch.cuda.Stream(self.device) if on_cuda else None
        self.sent_now: list[Sent] = []  # in this part of a step
        self.sent_before: list[Sent] = []  # in the part before
        self.written: dict[int, Written] = {}  # by the id of the home
        self.fetched: dict[int, Fetched] = {}  # by the id of the home

    def put(self, tensor: Tensor) -> Tensor:
        """Send a tensor to the host; returns its home there."""
        is_pinned = self.to_host is not None
        home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        self.put_back(tensor, home)
        return home

    def put_back(self, tensor: Tensor, home: Tensor) -> None:
        """Send new numbers to a home."""
        if self.to_host is None:
            home.copy_(tensor)
            return
        self.to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.to_host):
            home.copy_(tensor, non_blocking=True)
            copied = self.to_host.record_event()
        self.sent_now.append(Sent(tensor, copied))
        self.written[id(home)] = Written(home, copied)

    def end_part(self) -> None:
        """End a part of a step: what the part before has sent may lose its memory on the device."""
        for sent in self.sent_before:
            torch.cuda.current_stream(self.device).wait_event(sent.copied)
        self.sent_before, self.sent_now = self.sent_now, []

    def fetch(self, home: Tensor) -> None:
        """Begin to bring the numbers of a home to the device, if they are not coming already."""
        if id(home) in self.fetched:
            return
        if self.to_device is None:
            self.fetched[id(home)] = Fetched(home, home.clone(), None)
            return
        copy = torch.empty(home.shape, dtype=home.dtype, device=self.device)
        # The copy waits until whoever had this piece of the device's memory is done with it,
        # and until the numbers have reached their home.
        self.to_device.wait_stream(torch.cuda.current_stream(self.device))
        if id(home) in self.written:
            self.to_device.wait_event(self.written.pop(id(home)).copied)
        with torch.cuda.stream(self.to_device):
            copy.copy_(home, non_blocking=True)
            copied = self.to_device.record_event()
        self.fetched[id(home)] = Fetched(home, copy, copied)

    def get(self, home: Tensor) -> Tensor:
        """The numbers of a home on the device; the GPU waits for a `fetch` that is under way."""
        self.fetch(home)
        fetched = self.fetched.pop(id(home))
        if fetched.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(fetched.copied)
        return fetched.copy

    def settle(self) -> None:
        """Wait until every copy is made, and let go of what was sent."""
        for stream in (self.to_host, self.to_device):
            if stream is not None:
                stream.synchronize()
        self.sent_now, self.sent_before, self.written = [], [], {}
