"""How sources are mixed: shares of every step, pairs of single sources, and what cannot be."""

import re

import numpy as np
import pytest

from minimore.data.sampling import DataOptions, Mix, epoch_steps, mix_of
from minimore.options import InputError


def test_every_step_has_the_shares_that_were_asked_for():
    sizes, per_step = [3, 10, 7], (3, 2, 1)
    steps = epoch_steps(sizes, "shares", None, 6, 1, 0, per_step)
    assert len(steps) == 3  # as under equal sampling: 6 pairs of each source, 6 in a step
    assert all(np.bincount(step[:, 0]).tolist() == [3, 2, 1] for step in steps)
    pool = np.concatenate(steps)
    of = {k: sorted(pool[pool[:, 0] == k, 1].tolist()) for k in range(3)}
    assert of[0] == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # 9 of 3 pairs: each three times
    assert len(set(of[1])) == 6 and len(set(of[2])) == 3  # and of the others none twice
    assert len(epoch_steps(sizes, "shares", 20, 6, 1, 0, per_step)) == 10
    again, other = (epoch_steps(sizes, "shares", None, 6, 1, e, per_step) for e in (0, 1))
    assert np.array_equal(steps, again) and not np.array_equal(steps, other)


def test_a_source_may_have_its_own_number_of_pairs():
    pool = np.concatenate(epoch_steps([5, 8, 4], "proportional", (20, None, 2), 4, 1, 0))
    counts = [np.bincount(pool[pool[:, 0] == k, 1]).tolist() for k in range(3)]
    assert counts[:2] == [[4] * 5, [1] * 8]
    assert sum(counts[2]) == max(counts[2]) * 2 == 2


NAMES = ("ana", "b=n", "cleo")  # a name may hold "="


@pytest.mark.parametrize(
    "options, mix",
    [
        ({}, Mix("equal", 48)),
        ({"pairs_per_source": 7, "batch_size": 6}, Mix("equal", 6, 7)),
        ({"shares": "ana=2,b=n=1,cleo=1"}, Mix("shares", 48, None, (24, 12, 12))),
        ({"shares": "cleo=.2,ana=0.5,b=n=.3"}, Mix("shares", 50, None, (25, 15, 10))),
        (
            {"shares": "ana=50,b=n=25,cleo=25", "batch_size": 8, "pairs_per_source": 9},
            Mix("shares", 8, 9, (4, 2, 2)),
        ),
        (
            {"sampling": "proportional", "batch_size": 5, "pairs_per_source": "cleo=4_000,ana=9"},
            Mix("proportional", 5, (9, None, 4000)),
        ),
    ],
)
def test_how_sources_are_mixed(options, mix):
    assert mix_of(DataOptions(**options), NAMES) == mix
    assert mix.per_step is None or sum(mix.per_step) == mix.batch_size


BY_CHANCE = {"sampling": "proportional"}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"shares": "ana=1,b=n=1"}, "expected a share of source 'cleo'"),
        ({"shares": "ana=1,b=n=1,dora=1"}, "no source that is trained on is called 'dora'"),
        ({"shares": "ana=1,ana=1"}, "names 'ana' twice"),
        ({"shares": "ana,b=n=1,cleo=1"}, "expected NAME=VALUE,NAME=VALUE"),
        ({"shares": "ana=0,b=n=1,cleo=1"}, "ana=0: expected a number above 0"),
        ({"shares": "ana=1e9,b=n=1,cleo=1"}, "ana=1e9: expected a number above 0"),
        ({"shares": "ana=nan,b=n=1,cleo=1"}, "ana=nan: expected a number above 0"),
        ({"shares": "ana=2,b=n=1,cleo=1", "batch_size": 6}, "expected a multiple of 4"),
        ({"shares": "ana=.123457,b=n=99991,cleo=7.654321"}, "expected rounder shares"),
        (BY_CHANCE | {"shares": "ana=1,b=n=1,cleo=1"}, "leave one of them out"),
        ({"pairs_per_source": "ana=5"}, "mix them by --shares, or give --sampling proportional"),
        ({"pairs_per_source": 0}, "--pairs-per-source 0: expected 1 to 10000000"),
        ({"pairs_per_source": "many"}, "--pairs-per-source many: expected NAME=VALUE"),
        (BY_CHANCE | {"pairs_per_source": "ana=0"}, "ana=0: expected 1 to 10000000"),
        (BY_CHANCE | {"pairs_per_source": "ana=x"}, "ana=x: expected 1 to 10000000"),
        (BY_CHANCE | {"pairs_per_source": "dora=5"}, "there are ana, b=n, cleo"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        mix_of(DataOptions(**options), NAMES)
