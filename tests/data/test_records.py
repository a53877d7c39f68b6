"""Files that are damaged, or larger than anybody needs: one line, and little memory."""

import gzip
import io
import json
import tracemalloc

import pytest

from minimore.data import records
from minimore.data.columns import read_rows
from minimore.data.foreign.convert import ConvertOptions, convert
from minimore.data.forms import record_pairs
from minimore.data.records import ListReader, json_line, read_records
from minimore.options import InputError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LINE = json.dumps(PAIR) + "\n"


def refused(read, *words):
    with pytest.raises(InputError) as error:
        list(read())
    for word in words:
        assert word in str(error.value), str(error.value)


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    twice = '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}'
    path = written(tmp_path / "a.jsonl", LINE + twice + "\n")
    refused(lambda: read_records(path), "a.jsonl:2", '"chosen" stands twice')
    path = written(tmp_path / "b.json", f"[{LINE},{twice}]")
    refused(lambda: read_records(path), "b.json:2", '"chosen" stands twice')
    deep = '{"prompt": {"role": "user", "content": "a", "content": "b"}}'
    refused(lambda: read_records(written(tmp_path / "c.jsonl", deep)), '"content" stands twice')


@pytest.mark.parametrize("at_once", (1, 2, 7, 1000))
def test_a_list_is_read_in_parts_of_any_size(at_once, monkeypatch):
    monkeypatch.setattr(records, "READ_AT_ONCE", at_once)
    items = [PAIR | {"prompt": "\U0001f600 é" * i, "n": [i, 1.5]} for i in range(20)]
    for text in (json.dumps(items, ensure_ascii=False), json.dumps(items, indent=3), " [ ] "):
        data = text.encode()
        reader = ListReader("x", data[:1], io.BytesIO(data[1:]))
        found = list(reader.items())
        assert [record for _, record in found] == json.loads(text)
        assert [where for where, _ in found] == [f"x:{i + 1}" for i in range(len(found))]


@pytest.mark.parametrize(
    "text",
    ("[{}", "[{},", "[{},]", "[,{}]", "[{} {}]", "[{}]{}", "[{}],", "[1]", "[12", '[{"a": 1e}]')
    + ("[[]]", '["a"]', "[tru", "[{}]\n[{}]", "[NaN]", "[" * 10**5, '[{"a": "'),
)
def test_a_list_that_is_none_is_refused(text, tmp_path):
    refused(lambda: read_records(written(tmp_path / "a.json", text)), "a.json")


def test_of_a_list_only_a_part_is_in_memory(tmp_path, monkeypatch):
    for bound in ("READ_AT_ONCE", "LONGEST_LINE"):
        monkeypatch.setattr(records, bound, 1 << 12)
    text = b"[" + b'{"a": "%s"},' % (b"x" * 500) * 2000 + b"{}]"
    path = written(tmp_path / "a.json.gz", gzip.compress(text, 1))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 2001
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(text) / 2


def test_blank_lines_have_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_BLANK_LINES", 9)
    assert len(list(read_records(written(tmp_path / "a.jsonl", "\n" * 9 + LINE)))) == 1
    path = written(tmp_path / "b.jsonl", LINE + "\n" * 10)
    refused(lambda: read_records(path), "b.jsonl:11", "blank lines")


def test_what_lies_in_a_directory_and_would_not_be_read_is_refused(tmp_path):
    written(tmp_path / "a.jsonl", LINE)
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    refused(lambda: read_records(str(tmp_path)), "b.jsonl", "no file")
    (tmp_path / "b.jsonl").unlink()
    written(tmp_path / "c.CSV", "prompt,chosen,rejected\n")
    refused(lambda: read_records(str(tmp_path)), "c.CSV", "name the files")
    (tmp_path / "c.CSV").unlink()
    written(tmp_path / "notes.txt", "")
    assert len(list(read_records(str(tmp_path)))) == 1


def test_a_directory_of_tables_is_read_in_order_of_name(tmp_path):
    for name in ("b.tsv", "a.csv", "c.CSV"):
        mark = "\t" if name == "b.tsv" else ","
        written(tmp_path / name, mark.join(("prompt", "chosen")) + f"\nq{mark}{name}\n")
    read = list(read_rows(str(tmp_path)))
    assert [where for where, _ in read] == [
        f"{tmp_path}/{n}:2" for n in ("a.csv", "b.tsv", "c.CSV")
    ]
    assert [record["chosen"] for _, record in read] == ["a.csv", "b.tsv", "c.CSV"]
    refused(lambda: read_records(str(tmp_path)), "without a file of data; expected .jsonl, ")
    written(tmp_path / "d.json", "[]")
    refused(lambda: read_rows(str(tmp_path)), "a.csv, d.json, tables and JSON; name the files")
    (tmp_path / "d.json").unlink()
    (tmp_path / "a.csv").rename(tmp_path / "a.train.csv")
    (tmp_path / "b.tsv").rename(tmp_path / "b.test.tsv")
    refused(lambda: read_rows(str(tmp_path)), "training and test files (a.train.csv, b.test.tsv,")
    for name in ("a.train.csv", "b.test.tsv", "c.CSV"):
        (tmp_path / name).unlink()
    refused(lambda: read_rows(str(tmp_path)), ".csv, .tsv", ".parquet")


@pytest.mark.parametrize("read", (read_records, read_rows))
def test_a_run_is_no_data(read, tmp_path):
    for name in ("best.json", "config.json", "metrics.jsonl"):
        written(tmp_path / name, "{\n}\n")
    refused(lambda: read(str(tmp_path)), "is a run or a checkpoint (it has config.json)")


def test_names_that_a_message_leaves_out_are_shown_by_dots(tmp_path):
    for name in ("converted.json", *(f"{taste}.jsonl" for taste in "abcde")):
        written(tmp_path / name, "")
    refused(lambda: read_records(str(tmp_path)), "(a.jsonl, b.jsonl, c.jsonl, d.jsonl, ...)")


def test_a_row_of_a_table_is_bounded_as_a_line_is(tmp_path, monkeypatch):
    monkeypatch.setattr("minimore.data.columns.LONGEST_LINE", 100)
    row = '"' + "x" * 40 + '\n",'
    path = written(tmp_path / "a.csv", "prompt,chosen,rejected\n" + 3 * row + "y\n")
    refused(lambda: read_rows(path), "a.csv:4", "a row of more than")
    path = written(tmp_path / "b.csv", "x" * 101 + ",chosen\na,b\n")
    refused(lambda: read_rows(path), "b.csv:1", "a row of more than")
    rows = "".join(f'"{"x" * 40}\n",{i},c\n' for i in range(9))
    path = written(tmp_path / "c.csv", "prompt,chosen,rejected\n" + rows)
    assert [record["chosen"] for _, record in read_rows(path)] == [str(i) for i in range(9)]


@pytest.mark.parametrize("side", ({"chosen": ["a"] * 100, "rejected": ["b"] * 100}, {}))
def test_pairs_of_one_record_are_bounded_together(side, tmp_path):
    """A line of 30,000 characters could become a file of 300 million."""
    scored = {"responses": list("ab") * 50, "scores": list(range(100))}
    record = {"prompt": "x" * 30_000} | (side or scored)
    refused(lambda: record_pairs(record, "x:1"), "x:1", "million characters")
    path = written(tmp_path / "a.jsonl", json.dumps(record) + "\n")
    options = ConvertOptions(file=path, output=str(tmp_path / "out"))
    refused(lambda: convert(options) or (), "a.jsonl:1", "million characters")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_value_that_json_has_not_is_one_line():
    refused(lambda: json_line({"date": object()}, "x:1"), "x:1", "cannot be written as JSON")
