"""The unfinished file of a command: what is continued is what was written, to the byte."""

import json

import pytest
from runs import slow_but

from minimore.alignment.portions import alone, begin_or_continue
from minimore.checksums import checksum
from minimore.options import InputError

IDENTITY = {"seed": 1, "of": ["a", "ü\n"]}
RECORDS = [{"prompt": f"Ä {i}\r\n", "rewards": [i / 3, -i]} for i in range(7)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.unfinished"


def write(path, count=7):
    work = begin_or_continue(path, IDENTITY, resume=False)
    for record in RECORDS[:count]:
        work.append([record])
    return path.read_bytes()


def test_every_line_holds_the_checksum_of_all_before_it(path):
    so_far = checksum(b"")
    for line, value in zip(write(path).splitlines(), [IDENTITY, *RECORDS], strict=True):
        text = line.split(b" ", 1)[1]
        so_far = checksum(text, so_far)
        assert line.startswith(so_far.encode()) and json.loads(text) == value


@pytest.mark.parametrize("portion", slow_but([3], [1, 3]))
def test_a_file_cut_at_every_byte_is_continued_to_the_same_bytes(path, portion):
    whole = write(path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        work = begin_or_continue(path, IDENTITY, True, portion)
        lines = whole[:end].count(b"\n") - 1  # but for that of the identity
        assert work.records == max(0, lines - lines % portion)
        assert list(work.stored()) == RECORDS[: work.records]
        work.append(RECORDS[work.records :])
        assert path.read_bytes() == whole


def test_a_flipped_bit_ends_what_is_read(path):
    whole = write(path, 3)
    second = whole.index(b"\n") + 1
    for place in range(second, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        work = begin_or_continue(path, IDENTITY, True)
        assert work.records == whole[:place].count(b"\n") - 1
        assert whole.startswith(path.read_bytes())


def test_what_was_begun_is_neither_overwritten_nor_mixed(path):
    whole = write(path)
    with pytest.raises(InputError, match="continue it with --resume"):
        begin_or_continue(path, IDENTITY, False)
    with pytest.raises(InputError, match="begun with other options"):
        begin_or_continue(path, IDENTITY | {"seed": 2}, True)
    path.write_bytes(b"x" + whole)
    with pytest.raises(InputError, match="begun with other options"):
        begin_or_continue(path, IDENTITY, True)
    assert path.read_bytes() == b"x" + whole


def test_two_commands_do_not_write_one_file(path):
    with alone(path):
        with pytest.raises(InputError, match="another process is writing it"), alone(path):
            pass
        work = begin_or_continue(path, IDENTITY, resume=False)
        work.append(RECORDS)
    with alone(path):
        assert begin_or_continue(path, IDENTITY, resume=True).records == 7


def test_records_that_another_wrote_between_ours_are_missed(path):
    """As two processes do it where the file system has no locks."""
    ours = begin_or_continue(path, IDENTITY, resume=False)
    theirs = begin_or_continue(path, IDENTITY, resume=True)
    theirs.append(RECORDS[:1])
    ours.append(RECORDS[:3])
    with pytest.raises(InputError, match="holds 1 whole records, but 3 were written"):
        list(ours.stored())
