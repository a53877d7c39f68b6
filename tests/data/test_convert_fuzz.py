"""Damaged public files: refused in one line, or counts that add up; never a traceback.

MINIMORE_FUZZ=20000 sets their number (default 200).
"""

import copy
import json
import os
import random

import pytest
from foreign import HELPSTEER, MESSAGES, ROWS, UKP, UNPAIRED
from test_fuzz import damage_bytes, damage_value

from minimore.cli import main
from minimore.data.foreign.shapes import shape_of
from minimore.data.forms import record_pairs
from minimore.data.records import read_records

COUNT = int(os.environ.get("MINIMORE_FUZZ", 200))
FILES = {
    **{f"{name}.jsonl": [row.record for row in rows] for name, rows in ROWS.items()},
    "oasst-messages.jsonl": MESSAGES,
    "helpsteer.jsonl": HELPSTEER,
    "unpaired.jsonl": UNPAIRED,
    "no_ban.csv": UKP,
    "columns.csv": "prompt,response_0,response_1,better_response_id,safer_response_id\nP,a,b,0,1\n",
}

# Files of no known shape, which are read by the names of their fields.
TWO = ["--prompt-field", "q", "--chosen-field", "x", "--rejected-field", "y"]
ONE = [*TWO[:4], "--score-field", "s"]
NAMED = {
    "two.jsonl": ([{"q": "Q", "x": "a", "y": "b"}], TWO),
    "winner.jsonl": (
        [{"q": "Q", "x": "a", "y": "b", "w": w} for w in (1, 0, None)],
        [*TWO, "--winner-field", "w=1,0"],
    ),
    "scores.jsonl": (
        [{"q": "Q", "x": "a", "y": "b", "s": 1, "t": 2}],
        [*TWO, "--score-field", "s,t"],
    ),
    "lists.jsonl": ([{"q": "Q", "x": ["a", "b", "c"], "s": [1, 2, 2]}], ONE),
    "rows.jsonl": ([{"q": "Q", "x": text, "s": i} for i, text in enumerate("abc")], ONE),
}
FILES |= {name: records for name, (records, _) in NAMED.items()}


def damaged(content, chance):
    """The bytes of a file with one fault in it."""
    if isinstance(content, str):
        return damage_bytes(content.encode(), chance)
    records = copy.deepcopy(content) * chance.randint(1, 3)
    place = chance.randrange(len(records))
    kind = chance.random()
    if kind < 0.6:
        records[place] = damage_value(records[place], chance)
    elif kind < 0.7:
        records.insert(place, chance.choice(chance.choice(list(ROWS.values()))).record)
    elif kind < 0.8:
        records[place] = records[place] | {chance.choice(list(records[place])): None}
    lines = [json.dumps(record) for record in records]
    if kind >= 0.8:
        lines[place] = damage_bytes(lines[place].encode(), chance).decode("utf-8", "replace")
    text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def comparisons(record):
    """How many twos of responses a record compares, by its form alone."""
    if "scores" in record:
        return len(record["responses"]) * (len(record["responses"]) - 1) // 2
    return 1


def written(directory):
    """The pairs and label ties of all files that were written, as training reads them."""
    pairs = ties = 0
    for file in directory.glob("*.jsonl"):
        for where, record in read_records(str(file)):
            of_record, tied = record_pairs(record, where)
            assert len(of_record) + tied == comparisons(record)
            assert not any(pair.is_blank or pair.chosen == pair.rejected for pair in of_record)
            pairs, ties = pairs + len(of_record), ties + tied
    return pairs, ties


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_damaged_files_are_refused_in_one_line_or_counted(part, tmp_path, capsys):
    chance, codes = random.Random(part), {0: 0, 2: 0}
    for case in range(COUNT // 2):
        name = chance.choice(list(FILES))
        data = damaged(FILES[name], chance)
        path, output = tmp_path / name, tmp_path / f"out{case}"
        path.write_bytes(data)
        options = NAMED[name][1] if name in NAMED else []
        code = main(["data", "convert", str(path), "--output", str(output), *options])
        said = capsys.readouterr()
        label = f"part {part}, case {case}, {name}, {data!r}: {said}"
        assert code in codes, label
        codes[code] += 1
        assert output.exists() == (code == 0), label
        if code == 2:
            lines = said.err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("minimore data convert: "), label
        else:
            report = json.loads((output / "converted.json").read_text("utf-8"))
            files = report["written"].values()
            counted = [sum(file[key] for file in files) for key in ("pairs", "label_ties")]
            assert tuple(counted) == written(output), label
            lines = [line for line in data.split(b"\n") if line.strip()]
            if name.endswith("jsonl"):
                assert report["records"] == len(lines), label
                total = sum(counted) + sum(report["left_out"].values())
                assert total == expected_comparisons(name, lines), label
        path.unlink()
    assert min(codes.values()) > COUNT // 40, codes  # much is refused, and much is not


def expected_comparisons(file, lines):
    """How many comparisons a file holds, from its records and by simple loops."""
    records = [json.loads(line) for line in lines]
    name = file.partition(".")[0] if file in NAMED else shape_of(records[0]).name
    if name in ("rows", "lists"):  # the first record decides
        name = "lists" if isinstance(records[0]["x"], list) else "rows"
    if name == "rows":
        return twos_of_groups(json.dumps(r["q"]) for r in records)
    if name == "oasst-messages":
        return twos_of_groups(r["parent_id"] for r in records if r["role"] == "assistant")
    if name in ("helpsteer", "unpaired"):
        scores = 5 if name == "helpsteer" else 1
        return scores * twos_of_groups(json.dumps(r["prompt"]) for r in records)
    return sum(comparisons_of(name, record) for record in records)


def twos_of_groups(keys):
    groups = {}
    for key in keys:
        groups[key] = groups.get(key, 0) + 1
    return sum(n * (n - 1) // 2 for key, n in groups.items() if key is not None)


def comparisons_of(name, record):
    """Of one record."""
    if name == "oasst-tree":
        return twos_of_tree(record["prompt"])
    if name in ("scored", "text-score", "ultrafeedback", "lists"):
        key = {"scored": "responses", "text-score": "text", "lists": "x"}.get(name, "completions")
        n = len(record[key])
        return n * (n - 1) // 2 * (5 if name == "ultrafeedback" else 1)
    if name == "domains":
        responses = record["responses"]
        return (len(responses) - ("normal" in responses)) * (len(responses) - 1)
    if name == "prism":
        messages = record["conversation_history"]
        return twos_of_groups(m["turn"] for m in messages if m["role"] == "model")
    if name in ("pairs", "rm-bench", "alpaca", "orca"):
        sides = (record["chosen"], record["rejected"])
        several = [isinstance(s, list) and not isinstance(s[0], dict) for s in sides]
        return (len(sides[0]) if several[0] else 1) * (len(sides[1]) if several[1] else 1)
    return 2 if name == "pku-saferlhf" else 1


def twos_of_tree(message):
    replies = message.get("replies") or []
    n = sum(reply["role"] == "assistant" for reply in replies)
    return n * (n - 1) // 2 + sum(map(twos_of_tree, replies))
