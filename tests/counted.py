"""What a test counts while tensors are computed: live bytes, and products of matrices."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were at a time."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.alive:
            self.alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, address)

    def drop(self, address):
        self.now -= self.alive.pop(address)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


class Products(TorchDispatchMode):
    """Counts 2 x rows x inner x columns of every matrix product.

    torch's own counter cannot be used with autograd.grad.
    """

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = arguments[-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*arguments, **named or {})
