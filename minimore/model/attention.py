"""A flat stream of tokens cut into segments, and causal attention over it. No padding token exists anywhere.

A prompt P with its responses C and R is stored once, as [P C R]. C sees P and itself, R sees P and itself:

    tokens     P P P P  C C C  R R  | P P  C C C C  R R R | ...
    positions  0 1 2 3  4 5 6  4 5  | 0 1  2 3 4 5  2 3 4 |

For attention each response is one *segment* of queries: [P C] with its own keys, and [R] with the keys of P in front.

N tokens, S texts, H heads, G key/value heads, C head width, T segments in a tile, Q and L padded query and key lengths.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:  # flash attention over segments: torch >= 2.10 with CUDA
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build without it still has the other route
    varlen_attn = None

TILE_AREA = 1 << 22  # largest padded score area (segments x queries x keys) of one tile
TILE_WASTE = 1.3  # padded / real score area that a tile may reach


class Segment(NamedTuple):
    """Queries [start, end) of the stream, which see keys [prefix, prefix_end) and then themselves, causally."""

    start: int
    end: int
    prefix: int
    prefix_end: int

    @property
    def queries(self):
        return self.end - self.start

    @property
    def keys(self):
        return self.queries + self.prefix_end - self.prefix


@dataclass(eq=False)
class Stream:
    """tokens (N,) int64, positions (N,) int64, last (S,) the index of each text's last token, and the attention segments."""

    tokens: Tensor
    positions: Tensor
    last: Tensor
    segments: list[Segment]
    _tiles: dict = field(default_factory=dict)

    def to(self, device) -> "Stream":
        """The same stream on another device."""
        return Stream(
            self.tokens.to(device), self.positions.to(device), self.last.to(device), self.segments
        )

    @cached_property
    def varlen(self):
        """Index of the keys (M,), or None if every segment sees only itself, and the arguments that cut both sides."""
        index = [
            i
            for r in self.segments
            for i in (*range(r.prefix, r.prefix_end), *range(r.start, r.end))
        ]
        cuts = [
            [0, *accumulate(getattr(r, side) for r in self.segments)]
            for side in ("queries", "keys")
        ]
        cu_q, cu_k = (torch.tensor(c, dtype=torch.int32, device=self.tokens.device) for c in cuts)
        shared = len(index) != len(self.tokens)
        index = torch.tensor(index, device=self.tokens.device) if shared else None
        return (
            index,
            cu_q,
            cu_k,
            max(r.queries for r in self.segments),
            max(r.keys for r in self.segments),
        )

    @cached_property
    def longest(self) -> int:
        """The largest number of keys that a query could see."""
        return max(r.keys for r in self.segments)

    def tiles(self, window: int | None = None):
        """Runs of similar length, padded together: query index (T, Q), its mask (T, Q), key index (T, L), scores' mask.

        window: a query sees its last so many positions only, itself included. Made once per window.
        """
        if window not in self._tiles:
            self._tiles[window] = [
                self._tile(segments, window) for segments in _group(self.segments)
            ]
        return self._tiles[window]

    @cached_property
    def row(self) -> Tensor:
        """Where the result of each token (N,) is among the padded queries of all tiles."""
        padded = torch.cat(
            [
                torch.where(real, q, -1).flatten()
                for q, real, _, _ in next(iter(self._tiles.values()))
            ]
        )
        rows = torch.arange(len(padded), device=padded.device)[padded >= 0]
        return torch.empty_like(self.tokens).index_copy_(0, padded[padded >= 0], rows)

    def _tile(self, segments, window):
        Q, L = max(r.queries for r in segments), max(r.keys for r in segments)
        device, positions = self.tokens.device, self.positions
        q = torch.tensor(
            [[*range(r.start, r.end)] + [r.start] * (Q - r.queries) for r in segments],
            device=device,
        )
        k = torch.tensor(
            [
                [*range(r.prefix, r.prefix_end), *range(r.start, r.end)] + [r.start] * (L - r.keys)
                for r in segments
            ],
            device=device,
        )
        real_q = torch.arange(Q, device=device) < torch.tensor(
            [[r.queries] for r in segments], device=device
        )
        real_k = torch.arange(L, device=device) < torch.tensor(
            [[r.keys] for r in segments], device=device
        )
        behind = (
            positions[q][:, :, None] - positions[k][:, None, :]
        )  # in positions, not in places of the stream
        visible = (behind >= 0) & real_k[:, None, :]  # (T, Q, L)
        if window is not None:
            visible &= behind < window
            visible[..., -1] |= ~visible.any(-1)  # a padded query sees something, or softmax is NaN
        return q, real_q, k, visible[:, None]


def pack(items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Stream:
    """Lay out (prefix, continuations) items as one stream; each continuation is one text, read at its last token.

    A pair is (P, [C, R]) and a lone text ([], [T]). Raises ValueError for an empty continuation.

    >>> pack([([7, 8], [[1], [2, 3]])]).positions.tolist()
    [0, 1, 2, 2, 3]
    """
    tokens, positions, last, segments = [], [], [], []
    for prefix, continuations in items:
        if not all(len(c) for c in continuations):
            raise ValueError("every text needs at least one token of its own")
        start, shared = len(tokens), len(prefix)
        tokens.extend(prefix)
        positions.extend(range(shared))
        for continuation in continuations:
            first = (
                start if len(tokens) == start + shared else len(tokens)
            )  # the first segment carries the prefix along
            tokens.extend(continuation)
            positions.extend(range(shared, shared + len(continuation)))
            last.append(len(tokens) - 1)
            segments.append(
                Segment(first, len(tokens), start, start if first == start else start + shared)
            )
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int64)
    return Stream(as_tensor(tokens), as_tensor(positions), as_tensor(last), segments)


def attend(q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None = None) -> Tensor:
    """Causal attention of every segment over its keys: softmax(q k^T / sqrt(C)) v.

    q: (N, H, C); k, v: (N, G, C), G dividing H. window: see only so many last positions, itself included. Returns (N, H, C).
    bf16 and fp16 on CUDA (sm80 or newer) take flash attention over segments; everything else, and a window shorter than the
    longest segment, takes `scaled_dot_product_attention` over masked tiles of segments.
    """
    if window is not None and window >= stream.longest:
        window = None  # plain causal
    if (
        window is None
        and varlen_attn is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    ):
        return _attend_varlen(q, k, v, stream)
    return _attend_tiles(q, k, v, stream, window)


def _attend_varlen(q, k, v, stream):
    index, cu_q, cu_k, max_q, max_k = stream.varlen
    if index is not None:
        k, v = k.index_select(0, index), v.index_select(0, index)  # [P C], [P R], ...
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # Bottom-right aligned: the last query of a segment sees the last key. Spelled differently by torch 2.11 and 2.13.
    spelled = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in spelled else {"window_size": (-1, 0)}
    return varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, max_q, max_k, **causal
    )


def _attend_tiles(q, k, v, stream, window):
    out = []
    for q_index, _, k_index, visible in stream.tiles(window):
        T, Q = q_index.shape
        gather = lambda x, index: (
            x.index_select(0, index.flatten()).view(T, -1, *x.shape[1:]).transpose(1, 2)
        )
        tile = F.scaled_dot_product_attention(
            gather(q, q_index),
            gather(k, k_index),
            gather(v, k_index),
            attn_mask=visible,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (T, H, Q, C)
        out.append(tile.transpose(1, 2).reshape(T * Q, *q.shape[1:]))
    return torch.cat(out).index_select(0, stream.row)  # (N, H, C)


def tile_shapes(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """(T, Q, L) of every tile that these segments make."""
    return [
        (len(tile), max(r.queries for r in tile), max(r.keys for r in tile))
        for tile in _group(segments)
    ]


def _group(segments):
    """Greedy tiles of segments sorted by length, within TILE_WASTE and TILE_AREA."""
    tiles, area, queries, keys = [], 0, 0, 0
    for segment in sorted(segments, key=lambda r: (r.queries, r.keys)):
        queries, keys, area = (
            max(queries, segment.queries),
            max(keys, segment.keys),
            area + segment.queries * segment.keys,
        )
        if tiles and (len(tiles[-1]) + 1) * queries * keys <= min(TILE_AREA, TILE_WASTE * area):
            tiles[-1].append(segment)
        else:
            tiles.append([segment])
            queries, keys, area = segment.queries, segment.keys, segment.queries * segment.keys
    return tiles
