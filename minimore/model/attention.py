"""A flat stream of tokens cut into segments, and causal attention over it. No padding token exists.

A prompt P with its responses C and R is stored once, as [P C R]. C sees P and itself, and R sees P
and itself:

    tokens     P P P P  C C C  R R  | P P  C C C C  R R R | ...
    positions  0 1 2 3  4 5 6  4 5  | 0 1  2 3 4 5  2 3 4 |

For attention each response is one *segment* of queries: [P C] with its own keys, and [R] with the
keys of P in front.

N tokens, S texts, H heads, G key/value heads, C head width, T segments in a tile, Q and L padded
query and key lengths, M keys of all segments together.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE_AREA = 1 << 22  # largest padded score area (segments x queries x keys) of one tile
TILE_WASTE = 1.3  # padded / real score area that a tile may reach


# ---- the stream ----------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Tokens [start, end) of the stream, which ask; of the first `silent` ones no result is needed.

    They see keys [prefix, prefix_end), and then themselves, causally.
    """

    start: int
    end: int
    prefix: int
    prefix_end: int
    silent: int = 0

    @property
    def is_square(self) -> bool:
        """Whether there is a query for every key, so that query i sees keys 0 to i."""
        return self.queries == self.keys

    @property
    def queries(self) -> int:
        """How many queries the segment has."""
        return self.end - self.start - self.silent

    @property
    def keys(self) -> int:
        """How many keys its last query sees."""
        return self.prefix_end - self.prefix + self.end - self.start

    @property
    def query_places(self) -> list[int]:
        """Where its queries are in the stream."""
        return list(range(self.start + self.silent, self.end))

    @property
    def key_places(self) -> list[int]:
        """Where its keys are in the stream, in the order of their positions."""
        return [*range(self.prefix, self.prefix_end), *range(self.start, self.end)]


@dataclass(eq=False)
class Stream:
    """Texts in one line, and the segments that attention sees.

    tokens: (N,) int64; positions: (N,) int64; last: (S,) the index of each text's last token.
    asked: (Q,) the places of all queries, where not every token asks; else None.
    """

    tokens: Tensor
    positions: Tensor
    last: Tensor
    segments: list[Segment]
    asked: Tensor | None = None
    _tilings: dict[tuple[int | None, torch.dtype], "Tiling"] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Stream":
        """The same stream on another device."""
        return Stream(
            self.tokens.to(device),
            self.positions.to(device),
            self.last.to(device),
            self.segments,
            None if self.asked is None else self.asked.to(device),
        )

    @cached_property
    def at_ends(self) -> "Stream":
        """The same tokens, of which only the last of each text is a query (it "asks").

        That is enough for the last block where texts are read at their ends alone. Each segment
        ends where its text ends, so all its tokens but the last are silent.
        """
        silent = [segment.end - segment.start - 1 for segment in self.segments]
        segments = [segment._replace(silent=n) for segment, n in zip(self.segments, silent)]
        return Stream(self.tokens, self.positions, self.last, segments, self.last)

    @cached_property
    def longest(self) -> int:
        """The largest number of keys that a query could see."""
        return max(segment.keys for segment in self.segments)

    @cached_property
    def varlen(self) -> "Cuts":
        """Where queries and keys are cut into segments."""
        return cuts_of(self)

    def tiling(self, window: int | None, dtype: torch.dtype) -> "Tiling":
        """The segments in tiles of similar length, made once for every window and type of masks.

        window: a query sees its last so many positions only, itself included.
        """
        if (window, dtype) not in self._tilings:
            self._tilings[window, dtype] = tiling_of(self, window, dtype)
        return self._tilings[window, dtype]


def pack(items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Stream:
    """Lay out (prefix, continuations) items as one stream.

    Each continuation is one text, read at its last token. A pair is (P, [C, R]) and a lone text
    ([], [T]). Raises ValueError for an empty continuation.

    >>> pack([([7, 8], [[1], [2, 3]])]).positions.tolist()
    [0, 1, 2, 2, 3]
    """
    tokens: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    segments: list[Segment] = []
    for prefix, continuations in items:
        if not all(len(continuation) for continuation in continuations):
            raise ValueError("every text needs at least one token of its own")
        start, shared = len(tokens), len(prefix)
        prefix_end = start + shared
        tokens.extend(prefix)
        positions.extend(range(shared))
        for continuation in continuations:
            first = len(tokens)
            tokens.extend(continuation)
            positions.extend(range(shared, shared + len(continuation)))
            last.append(len(tokens) - 1)
            if first == prefix_end:  # the first segment carries the prefix along
                segments.append(Segment(start, len(tokens), start, start))
            else:
                segments.append(Segment(first, len(tokens), start, prefix_end))
    return Stream(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(last, dtype=torch.int64),
        segments,
    )


# ---- attention -----------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None = None) -> Tensor:
    """Causal attention of every segment over its keys: softmax(q kᵀ / sqrt(C)) v.

    q: (N, H, C), or (Q, H, C) where not every token asks; k, v: (N, G, C), where G divides H.
    window: a query sees its last so many positions only, itself included. Returns the shape of q.

    bf16 and fp16 on CUDA (sm80 or newer) take flash attention over segments. Everything else, and
    a window shorter than the longest segment, takes `scaled_dot_product_attention` over masked
    tiles of segments.
    """
    if window is not None and window >= stream.longest:
        window = None  # plain causal
    if window is None and has_flash_attention(q):
        return _attend_varlen(q, k, v, stream)
    return _attend_tiles(q, k, v, stream, window)


def has_flash_attention(q: Tensor) -> bool:
    """Whether flash attention over segments takes these queries, where they are."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and varlen_attention() is not None
    )


@cache
def varlen_attention() -> Callable | None:
    """torch's `varlen_attn`, flash attention over segments; None in a build without it.

    It is imported where it is first needed: torch's compiler comes with it, and importing that
    takes as long as importing torch. A command on a CPU starts in half the time without it.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


# ---- one route: keys gathered by an index, queries and keys cut into segments --------------------


class Copies(NamedTuple):
    """Where the tokens of a stream are copied to, in an order in which each segment has its keys.

    source: (M,) the token that a place is a copy of. first: (N,) the place of every token's first
    copy. others: (tokens, places) of every second copy, of every third copy, and so on. Only the
    tokens of a shared prefix have them. A place that is padding is a copy in `source` alone.
    """

    source: Tensor
    first: Tensor
    others: list[tuple[Tensor, Tensor]]


class Cuts(NamedTuple):
    """How flash attention cuts N queries and M keys into segments.

    keys: the keys of one segment after those of another; None if that is the stream itself, because
    no prefix is shared. query_cuts, key_cuts: (segments + 1,) int32, where each segment begins, and
    the end. most_queries, most_keys: of the longest segment.
    """

    keys: Copies | None
    query_cuts: Tensor
    key_cuts: Tensor
    most_queries: int
    most_keys: int


def cuts_of(stream: Stream) -> Cuts:
    """The cuts of a stream, on its device."""
    device = stream.tokens.device
    queries = [segment.queries for segment in stream.segments]
    keys = [segment.keys for segment in stream.segments]
    copies = None
    if sum(keys) != len(stream.tokens):
        places = np.concatenate([segment.key_places for segment in stream.segments])
        copies = copies_of(places, np.zeros(len(places), dtype=bool), device)
    query_cuts, key_cuts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (queries, keys)
    )
    return Cuts(copies, query_cuts, key_cuts, max(queries), max(keys))


def copies_of(source: np.ndarray, is_padding: np.ndarray, device: torch.device) -> Copies:
    """Which of the M places are copies of each token: place i is a copy of token source[i].

    Every token of 0 to N - 1 has a place that is no padding. is_padding: (M,) the places that only
    fill a tile up. Their gradients are zero, so backward leaves them out.

    >>> copies_of(np.array([0, 1, 0, 2]), np.zeros(4, dtype=bool), torch.device("cpu")).others
    [(tensor([0]), tensor([2]))]
    """

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    real = np.flatnonzero(~is_padding)
    places = real[np.argsort(source[real], kind="stable")]  # of token 0 in order, of token 1, ...
    tokens = source[places]  # the token of each of them: 0, 0, 1, 2, ...
    counts = np.bincount(tokens)  # (N,) copies of each token
    starts = np.cumsum(counts) - counts  # (N,) where the copies of each token start in `places`
    number = np.arange(len(places)) - starts[tokens]  # 0 for a first copy, 1 for a second, ...
    others = []
    for n in range(1, counts.max()):
        is_nth = number == n
        others.append((on_device(tokens[is_nth]), on_device(places[is_nth])))
    return Copies(on_device(source), on_device(places[number == 0]), others)


class CopyTokens(torch.autograd.Function):
    """x (N, G, C) -> its copies (M, G, C). Backward adds up the gradients of a token's copies.

    That of `index_select` adds them in whatever order the GPU's threads come by, so that the sum
    differs from run to run, and takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        """(N, G, C) -> (M, G, C)."""
        ctx.copies = copies
        return x.index_select(0, copies.source)

    @staticmethod
    def backward(ctx: Any, d_copies: Tensor) -> tuple[Tensor, None]:
        """(M, G, C) -> (N, G, C)."""
        d_x = d_copies.index_select(0, ctx.copies.first)
        for tokens, places in ctx.copies.others:
            total = d_x.index_select(0, tokens) + d_copies.index_select(0, places)
            d_x.index_copy_(0, tokens, total)
        return d_x, None


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, stream: Stream) -> Tensor:
    """Attention through torch's `varlen_attn`."""
    cuts = stream.varlen
    if cuts.keys is not None:  # [P C], [P R], ...
        k, v = CopyTokens.apply(k, cuts.keys), CopyTokens.apply(v, cuts.keys)
    queries_per_key = q.shape[1] // k.shape[1]
    if queries_per_key > 1:
        k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
    varlen_attn = varlen_attention()
    assert varlen_attn is not None  # `has_flash_attention` has asked
    result = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cuts.query_cuts,
        cuts.key_cuts,
        cuts.most_queries,
        cuts.most_keys,
        **causal_argument(varlen_attn),
    )
    assert isinstance(result, Tensor)  # nothing else was asked for
    return result


@cache
def causal_argument(varlen: Callable) -> dict[str, Any]:
    """The argument that makes torch's `varlen_attn` causal, aligned at the bottom right.

    The last query of a segment sees its last key, the one before all keys but the last, and so on.
    The argument's name is another one in torch 2.11 than in 2.13.
    """
    if "is_causal" in inspect.signature(varlen).parameters:
        return {"is_causal": True}
    return {"window_size": (-1, 0)}


# ---- the other route: padded tiles of segments ---------------------------------------------------


class Tile(NamedTuple):
    """T segments of similar length, padded at their ends to Q queries and L keys each.

    mask: (T, 1, Q, L), 0 where a query sees a key and -inf where it does not, for every head. None
    where segments are square: there query i sees keys 0 to i, which are never padding if it is
    none itself.
    """

    segments: int
    queries: int
    keys: int
    mask: Tensor | None


class Tiling(NamedTuple):
    """All tiles of a stream: its tokens are copied once, and every tile is a part of the copies.

    queries: of P places, those of one tile after those of another; keys: of M places.
    """

    queries: Copies
    keys: Copies
    tiles: list[Tile]


def tiling_of(stream: Stream, window: int | None, dtype: torch.dtype) -> Tiling:
    """The tiles of a stream, on its device, with masks of this type."""
    device, positions = stream.tokens.device, stream.positions.cpu().numpy()
    query_rows, key_rows, tiles = [], [], []
    for segments in group_by_length(stream.segments):
        queries, query_is_padding = padded([segment.query_places for segment in segments])
        keys, key_is_padding = padded([segment.key_places for segment in segments])
        mask = None
        if window is not None or not segments[0].is_square:
            visible = visible_keys(positions[queries], positions[keys], key_is_padding, window)
            mask = torch.zeros(visible.shape, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(~visible), -torch.inf)
            mask = mask[:, None].to(device)
        tiles.append(Tile(len(segments), queries.shape[1], keys.shape[1], mask))
        query_rows.append((queries.ravel(), query_is_padding.ravel()))
        key_rows.append((keys.ravel(), key_is_padding.ravel()))
    places, is_padding = map(np.concatenate, zip(*query_rows))
    # q has one row for each token that asks; k and v have one for each token of the stream.
    query_copies = copies_of(numbered(places), is_padding, device)
    places, is_padding = map(np.concatenate, zip(*key_rows))
    return Tiling(query_copies, copies_of(places, is_padding, device), tiles)


def numbered(places: np.ndarray) -> np.ndarray:
    """The number of each place among all different ones: which row of the queries it is.

    >>> numbered(np.array([3, 3, 8, 5])).tolist()
    [0, 0, 2, 1]
    """
    return np.unique(places, return_inverse=True)[1].reshape(-1)


def visible_keys(
    queries: np.ndarray, keys: np.ndarray, key_is_padding: np.ndarray, window: int | None
) -> np.ndarray:
    """Which keys a query sees: (T, Q, L). queries (T, Q) and keys (T, L) are their positions."""
    # How far a key lies behind a query is counted in positions, not in places of the stream.
    distance = queries[:, :, None] - keys[:, None, :]
    visible = (distance >= 0) & ~key_is_padding[:, None, :]
    if window is not None:
        visible &= distance < window
        # A query that is padding may see no key at all, and the softmax of nothing is NaN.
        visible[..., -1] |= ~visible.any(-1)
    return visible


def padded(rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of places as one matrix, and where it is padding, which repeats the first place.

    >>> padded([[4, 5, 6], [8]])[0].tolist()
    [[4, 5, 6], [8, 8, 8]]
    """
    longest = max(len(row) for row in rows)
    places = [row + row[:1] * (longest - len(row)) for row in rows]
    lengths = np.array([[len(row)] for row in rows])
    return np.array(places), np.arange(longest) >= lengths


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None) -> Tensor:
    """Attention through `scaled_dot_product_attention`, tile by tile."""
    tiling = stream.tiling(window, q.dtype)
    query_sizes = [tile.segments * tile.queries for tile in tiling.tiles]
    key_sizes = [tile.segments * tile.keys for tile in tiling.tiles]
    results = []
    for tile, own_q, own_k, own_v in zip(
        tiling.tiles,
        CopyTokens.apply(q, tiling.queries).split(query_sizes),
        CopyTokens.apply(k, tiling.keys).split(key_sizes),
        CopyTokens.apply(v, tiling.keys).split(key_sizes),
    ):
        result = F.scaled_dot_product_attention(
            _heads_first(own_q, tile.segments),
            _heads_first(own_k, tile.segments),
            _heads_first(own_v, tile.segments),
            attn_mask=tile.mask,
            is_causal=tile.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (T, H, Q, C)
        results.append(result.transpose(1, 2).flatten(0, 1))  # (T Q, H, C)
    return torch.cat(results).index_select(0, tiling.queries.first)  # (N, H, C)


def _heads_first(x: Tensor, segments: int) -> Tensor:
    """(T Q, H, C) of so many segments T, as (T, H, Q, C)."""
    return x.unflatten(0, (segments, -1)).transpose(1, 2)


def group_by_length(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments of similar length together, in groups that become one tile each.

    A tile of several segments has at most TILE_AREA scores after padding, and at most TILE_WASTE
    times as many as the segments need. Square segments and others are never together: the square
    ones need no mask. Greedy: from the shortest segment on, a group takes the next if it fits.
    """

    def order(segment: Segment) -> tuple[bool, int, int]:
        return not segment.is_square, segment.queries, segment.keys

    groups: list[list[Segment]] = []
    # Of the last group together with the segment at hand: most queries, most keys, real area.
    queries = keys = area = 0
    for segment in sorted(segments, key=order):
        queries, keys = max(queries, segment.queries), max(keys, segment.keys)
        area += segment.queries * segment.keys
        largest_area = min(TILE_AREA, TILE_WASTE * area)
        if (
            not groups
            or segment.is_square != groups[-1][0].is_square
            or (len(groups[-1]) + 1) * queries * keys > largest_area
        ):
            groups.append([])
            queries, keys, area = segment.queries, segment.keys, segment.queries * segment.keys
        groups[-1].append(segment)
    return groups


def tile_shapes(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """(T, Q, L) of every tile that these segments make."""
    return [
        (
            len(group),
            max(segment.queries for segment in group),
            max(segment.keys for segment in group),
        )
        for group in group_by_length(segments)
    ]
