"""Files that last: whole or not at all, never over another, and JSON that is read back."""

import json
import signal
import subprocess
import sys

import pytest
from power_cut import DIRECTORY, Disk

from minimore.checksums import read_checked_json, records_written_whole, write_checked_json
from minimore.files import (
    beside,
    directory_written_whole,
    one_line,
    read_json,
    refuse_existing,
    sweep,
    write_json,
    write_text,
    written_whole,
)
from minimore.options import InputError


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_takes_its_place_only_at_the_end(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text("old")
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old" and unfinished.parent == tmp_path
    assert path.read_text() == "new" and names_in(tmp_path) == ["report.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "report.txt"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise error
    assert path.read_text() == "old" and names_in(tmp_path) == ["report.txt"]


def test_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "text")
    with pytest.raises(OSError, match="No space left"), directory_written_whole(tmp_path / "b"):
        pass
    assert names_in(tmp_path) == []


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr("os.fsync", lambda _: events.append("to disk"))
    monkeypatch.setattr("os.replace", lambda *_: events.append("renamed"))
    write_text(tmp_path / "a", "text")
    assert events == ["to disk", "renamed", "to disk"]  # the file, its name


def test_a_directory_is_on_the_disk_with_all_that_it_holds(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    with directory_written_whole(tmp_path / "a") as directory:
        (directory / "b").mkdir()
        (directory / "b" / "c").write_text("text")
    assert disk.lazy == {"a": DIRECTORY, "a/b": DIRECTORY, "a/b/c": b"text"}


def test_two_names_beside_a_file_differ_and_fit(tmp_path):
    path = tmp_path / ("x" * 250)
    first, second = beside(path), beside(path)
    assert first != second and first.parent == second.parent == tmp_path
    first.write_text("a name of 255 bytes at most")


@pytest.mark.parametrize("letter", ["é", "語", "😀"])
def test_a_name_that_fits_is_written_whatever_its_letters_take(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text and names_in(tmp_path) == [path.name]


def test_a_file_of_records_needs_a_name_beside_which_a_checksum_fits(tmp_path):
    (tmp_path / "taken.crc32").mkdir()
    for name, message in (
        ("x" * 250, "a name of 250 bytes; expected at most 249"),
        ("taken", "taken.crc32: is a directory"),
        ("zipped.jsonl.gz", "leave out the .gz"),
    ):
        with pytest.raises(InputError, match=message), records_written_whole(tmp_path / name):
            pytest.fail("the work has begun")
    assert names_in(tmp_path) == ["taken.crc32"]
    with records_written_whole(tmp_path / ("x" * 249)) as file:
        file.write("{}")
    assert len(names_in(tmp_path)) == 3


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "report.txt"
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys\n"
            "from minimore.files import written_whole\n"
            "with written_whole(sys.argv[1]) as unfinished:\n"
            "    unfinished.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n",
            path,
        ]
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "half"
    other = tmp_path / "report.txt.copy.0123abcd.partial"
    other.write_text("of another file")
    write_text(path, "whole")
    assert path.read_text() == "whole" and names_in(tmp_path) == ["report.txt", other.name]


def test_what_a_living_process_writes_stays(tmp_path):
    path = tmp_path / "report.txt"
    with written_whole(path) as first:
        with written_whole(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second" and first.exists()
    assert path.read_text() == "first" and names_in(tmp_path) == ["report.txt"]


def test_a_sweep_leaves_what_a_living_process_writes(tmp_path):
    (tmp_path / "old.partial").write_text("of a killed process")
    (tmp_path / "dir.partial").mkdir()
    with written_whole(tmp_path / "report.txt") as unfinished:
        unfinished.write_text("half")
        sweep(tmp_path)
        assert names_in(tmp_path) == [unfinished.name]
    assert names_in(tmp_path) == ["report.txt"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    path, left = tmp_path / "report.txt", tmp_path / "report.txt.0123abcd.partial"
    left.write_text("half")
    monkeypatch.setattr("minimore.files.lock", lambda _: None)
    write_text(path, "whole")
    assert names_in(tmp_path) == ["report.txt", left.name]
    monkeypatch.setattr("minimore.files.fcntl", None)
    write_text(path, "again")
    assert path.read_text() == "again" and names_in(tmp_path) == ["report.txt", left.name]


def test_a_directory_takes_its_place_only_at_the_end(tmp_path):
    path = tmp_path / "cell"
    (tmp_path / "cell.partial").mkdir()
    (tmp_path / "cell.partial" / "stale").write_text("of a killed process")
    with directory_written_whole(path) as unfinished:
        (unfinished / "a").write_text("a")
        assert not path.exists()
    assert names_in(tmp_path) == ["cell"] and names_in(path) == ["a"]
    with pytest.raises(ValueError), directory_written_whole(tmp_path / "other") as unfinished:
        (unfinished / "a").write_text("a")
        raise ValueError
    assert names_in(tmp_path) == ["cell"]


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("value", [{}, {"a": [1, 2.5, None]}, {"name": "é"}, {"name": "\ud800"}])
def test_json_is_read_back(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, value)
    assert read_json(path) == value and path.read_text("utf-8").endswith("}\n")
    assert ("\\u" in path.read_text("utf-8")) == (value == {"name": "\ud800"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_not_written(tmp_path, value):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": value})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "content, kind, expected",
    [
        (b"[1, 2]", dict, "holds list; expected a JSON object"),
        (b"{}", list, "holds dict; expected a JSON list"),
        (b"3", dict, "holds int; expected a JSON object"),
        (b"{", dict, "not readable as JSON"),
        (b"", dict, "not readable as JSON"),
        (b'{"a": "\xff"}', dict, "not readable as JSON"),
        (b"[" * 100_000, list, "not readable as JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path, content, kind, expected):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as refusal:
        read_json(path, kind)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "changed",
    ['{"a": 2, ', '{"a": NaN, ', '{"a": Infinity, ', '{"a": ' + "[" * 600 + "]" * 600 + ", ", "{"],
)
def test_a_file_with_a_checksum_is_refused_whatever_else_it_holds(tmp_path, changed):
    path = tmp_path / "a.json"
    write_checked_json(path, {"a": 1})
    assert read_checked_json(path) == {"a": 1}
    path.write_text(changed + path.read_text().partition(",")[2])
    with pytest.raises(InputError, match="a.json: (is not as it was written|not readable as JSON)"):
        read_checked_json(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="expected a Hugging Face checkpoint directory"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a plain file"):
        read_json(tmp_path)


def test_outputs_are_never_overwritten(tmp_path):
    refuse_existing(None)
    refuse_existing(tmp_path / "new")
    refuse_existing(tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InputError, match="--json .*exists already"):
            refuse_existing(path, "--json")
    with pytest.raises(InputError, match="path is empty"):
        refuse_existing("")
    with pytest.raises(InputError, match="file is not a directory; choose another place"):
        refuse_existing(tmp_path / "file" / "deep" / "deeper")


def test_directories_above_an_output_are_made_and_go_again_if_nothing_comes(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr("minimore.files.to_disk", named.append)
    write_text(tmp_path / "a" / "b" / "file", "x")
    with directory_written_whole(tmp_path / "c" / "d" / "out") as directory:
        write_text(directory / "file", "y")
    assert (tmp_path / "c" / "d" / "out" / "file").read_text("utf-8") == "y"
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "c"} <= set(named)
    for writer in (written_whole, directory_written_whole):
        with pytest.raises(InputError), writer(tmp_path / "c" / "e" / "f" / "out"):
            raise InputError("bad input")
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["d"]


def test_an_error_is_told_on_one_short_line():
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line(ValueError("")) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 160


def test_json_is_indented_by_two(tmp_path):
    write_json(tmp_path / "a.json", {"a": {"b": 1}})
    assert (tmp_path / "a.json").read_text() == json.dumps({"a": {"b": 1}}, indent=2) + "\n"


def test_a_json_file_of_many_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)  # a hole: it takes no room on the disk
    with pytest.raises(InputError, match="more than 500 million bytes of JSON"):
        read_json(tmp_path / "config.json")
