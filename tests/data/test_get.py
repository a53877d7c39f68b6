"""Public sets: from a hub on this machine, by the real client, and from files that are here."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from foreign import ROWS
from hub import COMMIT, Hub, git_name
from runs import slow_but

import minimore.data.public.get as get_module
from minimore.checksums import read_checked_json
from minimore.cli import main
from minimore.data.foreign.comparisons import LeftOut
from minimore.data.foreign.shapes import BY_NAME, items_of
from minimore.data.public.changes import input_of
from minimore.data.public.get import description
from minimore.data.public.parts import (
    Conversion,
    copies_of_pairs,
    is_test,
    key_of,
    up_to_first_reply,
)
from minimore.data.public.sources import SETS, File
from minimore.options import InputError

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
real = pytest.mark.skipif(not (DATA / "native").is_dir(), reason=f"no native data in {DATA}")

NAME, REPOSITORY = "hh-harmless", "Anthropic/hh-rlhf"
TRAIN, TEST = "harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"


def dialogue(i, side, turn="?"):
    return f"\n\nHuman: question {i}{turn}\n\nAssistant: the {side} answer {i}"


def hh(numbers, turn="?"):
    """A file as HH has them, with a pair for each number."""
    records = [{s: dialogue(i, s, turn) for s in ("chosen", "rejected")} for i in numbers]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


FILES = {(REPOSITORY, TRAIN): hh(range(300)), (REPOSITORY, TEST): hh(range(300, 340))}


def known(**changes):
    """The small set, of which all is known that is known of a real one."""
    train, test = FILES[REPOSITORY, TRAIN], FILES[REPOSITORY, TEST]
    values = {
        "revision": COMMIT,
        "train": (File(TRAIN, sha256(train), len(train)),),
        "test": (File(TEST, sha256(test), len(test)),),
        "train_records": 300,
        "test_records": 40,
    }
    return replace(SETS[NAME], **(values | changes))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A small set under a real name, no proxies, no waiting, and a directory of our own."""
    monkeypatch.setitem(SETS, NAME, known())
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    clock = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve(monkeypatch):
    """serve(...): a hub that the client takes for its own."""
    hubs = []

    def start(files=FILES, **options):
        hub = Hub(dict(files), **options)
        hubs.append(hub)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hub

    yield start
    for hub in hubs:
        hub.stop()


def get(*more, name=NAME, output="out"):
    return main(["data", "get", name, "--output", output, *map(str, more)])


def outputs(output="out", name=NAME):
    """The bytes of what was written, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(output).glob(f"{name}.*"))}


def refused(capsys, *more, name=NAME, output="out"):
    """The one line of a command that ends in exit code 2."""
    assert get(*more, name=name, output=output) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("minimore data get: ") and "Traceback" not in error
    return error


def lay_out(directory, files=FILES):
    for (_, path), content in files.items():
        target = Path(directory) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


# ---- the hub delivers ----------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_a_set_from_the_hub(serve, capsys, large):
    hub = serve(large=large, etag=sha256 if large else git_name)
    assert get() == 0
    printed = capsys.readouterr().out
    assert printed.index("licence     MIT") < printed.index("download    2 files")
    assert f"{sum(map(len, FILES.values())):,} bytes" in printed
    names = [
        sha256(FILES[REPOSITORY, file]) if large else Path(file).name for file in (TEST, TRAIN)
    ]
    assert hub.fetched() == [(name, None) for name in names]
    test, train = lines_of("out/hh-harmless.test.jsonl"), lines_of("out/hh-harmless.train.jsonl")
    assert len(test) == 40 and len(train) == 300
    assert train[0] == {
        "prompt": "\n\nHuman: question 0?\n\nAssistant:",
        "chosen": " the chosen answer 0",
        "rejected": " the rejected answer 0",
    }
    manifest = read_checked_json("out/hh-harmless.json")
    assert manifest["commit"] == COMMIT and manifest["licence"] == "MIT"
    for file in (TRAIN, TEST):
        content = FILES[REPOSITORY, file]
        values = manifest["inputs"][file]
        assert (values["sha256"], values["bytes"]) == (sha256(content), len(content))
    for part in ("train", "test"):
        written = (Path("out") / manifest["outputs"][part]["file"]).read_bytes()
        assert manifest["outputs"][part]["sha256"] == sha256(written)


def test_a_second_run_asks_for_nothing_and_files_that_are_gone_come_back(serve, capsys):
    hub = serve()
    assert get() == 0
    before, asked = outputs(), len(hub.requests)
    assert get() == 0 and outputs() == before and len(hub.requests) == asked
    Path("out/hh-harmless.train.jsonl").unlink()
    assert get() == 0 and outputs() == before and len(hub.requests) == asked
    shutil.rmtree("out/downloads")
    Path("out/hh-harmless.test.jsonl").unlink()
    assert get() == 0 and outputs() == before and len(hub.requests) > asked


def test_what_was_downloaded_can_be_given_again(serve):
    serve()
    assert get() == 0
    assert get("--from", f"out/downloads/{REPOSITORY}", output="again") == 0
    assert outputs("again") == outputs()


def test_sets_of_one_repository_share_its_files(serve, monkeypatch):
    path = "data/Alpaca-7B/train.jsonl"
    record = {"prompt": "P", "response_0": "a", "response_1": "b"}
    record |= {"better_response_id": 0, "safer_response_id": 1}
    hub = serve({("PKU-Alignment/PKU-SafeRLHF", path): (json.dumps(record) + "\n").encode()})
    for name in ("pku-safer", "pku-better"):
        values = {"revision": None, "train": (File(path),), "test": ()}
        monkeypatch.setitem(SETS, name, replace(SETS[name], **values))
        monkeypatch.setattr("minimore.data.public.parts.TEST_SHARE", 0)
        assert get(name=name) == 0
    assert len(hub.fetched()) == 1
    pairs = {name: lines_of(f"out/{name}.train.jsonl") for name in ("pku-safer", "pku-better")}
    assert pairs["pku-safer"] == [{"prompt": "P", "chosen": "b", "rejected": "a"}]
    assert pairs["pku-better"] == [{"prompt": "P", "chosen": "a", "rejected": "b"}]


# ---- interruptions -------------------------------------------------------------------------------


def test_a_connection_that_is_cut_is_made_again_where_it_ended(serve):
    hub = serve()
    hub.cut = [100, 50]
    assert get() == 0
    assert hub.fetched()[:3] == [
        ("test.jsonl.gz", None),
        ("test.jsonl.gz", "bytes=100-"),
        ("test.jsonl.gz", "bytes=150-"),
    ]
    lay_out("here")
    assert get("--from", "here", output="again") == 0
    without_commit = {k: v for k, v in outputs("again").items() if k.endswith("jsonl")}
    assert without_commit.items() <= outputs().items()


def test_a_hub_that_knows_no_ranges_sends_all_again(serve):
    hub = serve(ranges=False)
    hub.cut = [100]
    assert get() == 0
    assert Path(f"out/downloads/{REPOSITORY}/{TEST}").read_bytes() == FILES[REPOSITORY, TEST]


def test_a_download_that_breaks_off_for_good_goes_on_with_the_next_command(serve, capsys):
    hub = serve()
    hub.cut = [100] + [0] * 20
    line = refused(capsys)
    assert "broke off after 100 bytes" in line and "give the same command again" in line
    assert outputs() == {}
    hub.cut, hub.requests = [], []
    assert get() == 0
    assert hub.fetched()[0] == ("test.jsonl.gz", "bytes=100-")


@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_ended(serve):
    """SIGKILL in the middle of a file: nothing looks finished, and the next command goes on."""
    hub = serve()
    arguments = ["data", "get", NAME, "--output", "out", "--accept-change"]
    process = []
    test = FILES[REPOSITORY, TEST]

    def kill():
        """Once some of the file is on the disk."""
        while not any(path.stat().st_size for path in Path("out").rglob("*.incomplete")):
            time.sleep(0.01)
        os.kill(process[0].pid, signal.SIGKILL)

    hub.cut, hub.at_cut = [len(test) // 2], kill
    commit = SETS[NAME].revision
    code = (
        "import huggingface_hub.constants as constants; constants.DOWNLOAD_CHUNK_SIZE = 10;"
        "import sys; from dataclasses import replace;"
        "from minimore.data.public.sources import SETS;"
        f"SETS[{NAME!r}] = replace(SETS[{NAME!r}], revision={commit!r});"
        "from minimore.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    environment["PYTHONPATH"] = str(ROOT)
    process.append(subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment))
    assert process[0].wait(120) == -signal.SIGKILL
    assert outputs() == {}
    directory = Path(f"out/downloads/{REPOSITORY}/harmless-base")
    assert [path.suffix for path in directory.iterdir()] == [".incomplete"]
    hub.requests = []
    assert get() == 0
    name, start = hub.fetched()[0]
    assert name == "test.jsonl.gz" and start.startswith("bytes=")
    assert (directory / "test.jsonl.gz").read_bytes() == test


class Died(BaseException):
    """Stands for a kill: nothing behind it is done."""


STEPS = ("fetch", "sha256_of", "put_in_place", "to_disk", "write_checked_json")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_after", slow_but([False], [False, True]))
def test_a_kill_at_any_step_leaves_nothing_that_looks_finished(serve, monkeypatch, step, is_after):
    """And the same command gives the bytes of a command that was not killed."""
    serve()
    assert get(output="whole") == 0
    original = getattr(get_module, step)

    def die(*arguments):
        if is_after:
            original(*arguments)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(get_module, step, die)
        patch.setattr(get_module, "unfinished_removed", lambda *_: nullcontext())
        with pytest.raises(Died):
            get()
    whole = outputs("whole")
    for name, content in outputs().items():
        assert name.endswith(".partial") or content == whole[name]
    assert is_after and step == "write_checked_json" or not Path("out/hh-harmless.json").exists()
    assert get() == 0
    assert outputs() == whole


def test_a_kill_between_the_two_names(serve, monkeypatch):
    serve()
    assert get(output="whole") == 0
    replaced, original = [], Path.replace

    def die_at_second(self, target):
        if str(target).endswith(".jsonl"):
            replaced.append(target)
            if len(replaced) == 2:
                raise Died
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_at_second)
        with pytest.raises(Died):
            get()
    files = [name for name in outputs() if not name.endswith(".crc32")]
    assert files == ["hh-harmless.test.jsonl"]
    assert get() == 0 and outputs() == outputs("whole")


# ---- the hub does not deliver --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, ["status 401", "no token is sent", "hf download Anthropic/hh-rlhf", "--from PATH"]),
        (403, ["status 403", "accept its terms"]),
        (404, ["status 404", "no such file or revision", "--from PATH"]),
        (500, ["status 500", "in trouble", "again later"]),
    ],
)
def test_a_hub_that_refuses(serve, capsys, status, says):
    serve(status=status)
    line = refused(capsys)
    assert all(words in line for words in says) and outputs() == {}


def test_no_network(serve, capsys):
    hub = serve()
    hub.stop()
    line = refused(capsys)
    assert "cannot be reached" in line and "--from PATH" in line
    hub.thread.join()
    hub.stop = lambda: None


def test_a_server_that_is_no_hub(serve, capsys):
    serve(commit="", etag=lambda content: "")
    assert "expected a hub, so check HF_ENDPOINT" in refused(capsys)


@pytest.mark.parametrize("etag", [sha256(b"another"), git_name(b"another")])
def test_a_damaged_file_is_removed(serve, capsys, monkeypatch, etag):
    monkeypatch.setitem(SETS, NAME, known(train=(File(TRAIN),), test=(File(TEST),)))
    serve(etag=lambda content: etag)
    assert "what came is not what the hub says" in refused(capsys)
    assert not list(Path("out").rglob("*.gz*"))


@pytest.mark.parametrize("large", [False, True])
def test_the_users_token_goes_nowhere(serve, monkeypatch, tmp_path, large):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    Path(tmp_path / "token").write_text("hf_very_secret")
    hub = serve(large=large)
    assert get() == 0
    assert len(hub.requests) >= 4
    for _, path, headers in hub.requests:
        assert "authorization" not in headers and "secret" not in json.dumps([path, headers])


# ---- a set that changed --------------------------------------------------------------------------


def test_a_changed_file_is_refused_before_it_is_fetched(serve, capsys):
    hub = serve(FILES | {(REPOSITORY, TEST): hh(range(300, 341))}, large=True, etag=sha256)
    line = refused(capsys)
    assert f"{TEST} has " in line and f"expected {sha256(FILES[REPOSITORY, TEST])}" in line
    assert "--accept-change" in line and hub.fetched() == [] and outputs() == {}
    assert get("--accept-change") == 0
    changes = read_checked_json("out/hh-harmless.json")["changes"]
    assert len(changes) == 3 and "has 41 records, expected 40" in changes[-1]


def test_another_number_of_records_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(SETS, NAME, known(train_records=301))
    lay_out("here")
    line = refused(capsys, "--from", "here")
    assert f"{TRAIN} has 300 records, expected 301" in line and outputs() == {}


def test_many_changes_are_told_by_the_first_three(capsys, monkeypatch):
    files = tuple(File(f"harmless-base/{i}.jsonl", size=1) for i in range(9))
    monkeypatch.setitem(SETS, NAME, known(train=files, test=(), train_records=None))
    lay_out("here", {("", file.path): b"{}\n" for file in files})
    line = refused(capsys, "--from", "here")
    assert line.count("has 3 bytes, expected 1") == 3 and "; and 6 more; give --accept" in line


def test_other_columns_are_refused(capsys, monkeypatch):
    records = gzip.compress(b'{"winner": "a", "loser": "b"}\n', mtime=0)
    monkeypatch.setitem(SETS, NAME, known(train=(File(TRAIN),), train_records=None))
    lay_out("here", FILES | {(REPOSITORY, TRAIN): records})
    line = refused(capsys, "--from", "here")
    assert "expected the keys chosen, rejected; found keys: winner, loser" in line
    assert outputs() == {}


def test_a_set_without_a_commit_keeps_the_one_it_met_first(serve, capsys, monkeypatch):
    monkeypatch.setitem(SETS, NAME, known(revision=None, branch="refs/convert/parquet"))
    hub = serve()
    assert get() == 0
    assert "/resolve/refs%2Fconvert%2Fparquet/" in hub.requests[0][1] or (
        "/resolve/refs/convert/parquet/" in hub.requests[0][1]
    )
    assert f"/resolve/{COMMIT}/" in hub.requests[1][1]  # the second file, of the same commit
    assert read_checked_json("out/hh-harmless.json")["commit"] == COMMIT
    for path in (*Path("out").glob("*.jsonl"), Path("out/downloads")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    hub.commit = "d1" * 20
    line = refused(capsys)
    assert f"delivers commit {'d1' * 20}; expected {COMMIT}" in line


def test_files_that_are_not_those_of_the_manifest_are_refused(capsys, monkeypatch):
    unknown = known(train=(File(TRAIN),), test=(File(TEST),), train_records=None)
    monkeypatch.setitem(SETS, NAME, unknown)
    lay_out("here")
    assert get("--from", "here") == 0
    Path("out/hh-harmless.train.jsonl").unlink()
    lay_out("here", {(REPOSITORY, TRAIN): hh(range(200))})
    line = refused(capsys, "--from", "here")
    assert f"{TRAIN} has SHA-256 {sha256(hh(range(200)))}, and the manifest says" in line


# ---- what is there already -----------------------------------------------------------------------


def test_other_options_in_the_same_directory_are_refused(capsys):
    lay_out("here")
    assert get("--from", "here") == 0
    before = outputs()
    line = refused(capsys, "--from", "here", "--pairs", 5, "--seed", 1)
    assert "written with pairs None, not 5; seed 0, not 1" in line and outputs() == before


def test_a_file_that_was_changed_or_is_somebody_elses_is_refused(capsys):
    lay_out("here")
    Path("out").mkdir()
    Path("out/hh-harmless.test.jsonl").write_text("mine\n")
    assert "is not what this command writes" in refused(capsys, "--from", "here")
    assert outputs() == {"hh-harmless.test.jsonl": b"mine\n"}
    Path("out/hh-harmless.test.jsonl").unlink()
    assert get("--from", "here") == 0
    with open("out/hh-harmless.test.jsonl", "a") as file:
        file.write("{}\n")
    assert "is not as it was written" in refused(capsys, "--from", "here")


def test_the_training_part_is_refused_before_the_test_part_was_read_to_its_end():
    lay_out("here")
    inputs = [input_of(file, Path("here") / file.path) for file in known().files]
    conversion = Conversion(known(), inputs)
    test = conversion.test()
    next(test)
    with pytest.raises(RuntimeError, match="read all of test"):
        next(conversion.train())
    assert len(list(test)) == 39 and len(list(conversion.train())) == 300


def test_a_hint_leads_on(capsys, monkeypatch):
    """--test-only is named only where it would help: where the test files are there."""
    assert "--from nowhere: no such directory" in refused(capsys, "--from", "nowhere")
    lay_out("here")
    (Path("here") / TEST).unlink()
    for more in ((), ("--test-only",)):
        line = refused(capsys, "--from", "here", *more)
        assert f"has no {TEST}" in line and "or --test-only" not in line
    without_test = known(test=(), train=(*known().train, File("absent.jsonl.gz")))
    monkeypatch.setitem(SETS, NAME, without_test)
    line = refused(capsys, "--from", "here")
    assert "has no absent.jsonl.gz" in line and "or --test-only" not in line


def test_the_sets_are_listed_whatever_else_is_missing(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "get", "--list"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and "licence" in header
    assert [line.split()[0] for line in lines] == list(SETS)
    (harmless,) = (line for line in lines if line.startswith(NAME))
    size = sum(len(content) for content in FILES.values())
    assert harmless.split()[1:] == ["300", "+", "40", f"{size:,}", REPOSITORY, "MIT"]


def test_a_size_that_is_known_in_part_is_said_so(capsys):
    lay_out("here")
    files = known()
    assert description("x", files).count(" bytes\n") == 1
    some = replace(files, train=(files.train[0]._replace(size=None),))
    size = len(FILES[REPOSITORY, TEST])
    assert f"{size:,} bytes in 1 of 2 files; of the others it is" in description("x", some)


def test_missing_files_are_named(capsys):
    lay_out("here")
    (Path("here") / TRAIN).unlink()
    line = refused(capsys, "--from", "here")
    assert f"has no {TRAIN}" in line and "--test-only" in line
    assert get("--from", "here", "--test-only") == 0
    test_file = "hh-harmless.test.jsonl"
    assert set(outputs()) == {"hh-harmless.json", test_file, f"{test_file}.crc32"}
    assert "give --test-pairs" in refused(capsys, "--pairs", 3, "--test-only", output="other")
    assert "expected one of hh-helpful, hh-harmless" in refused(capsys, name="hh")


# ---- prompts -------------------------------------------------------------------------------------


def test_training_pairs_of_test_prompts_are_left_out_and_counted(capsys, monkeypatch):
    """The test set wins; neither case nor white space makes a prompt another."""
    monkeypatch.setitem(SETS, NAME, known(train=(File(TRAIN),), train_records=None))
    train = gzip.decompress(hh(range(100)) + hh(range(310, 315)))
    train += gzip.decompress(hh([320], "?\n ")).replace(b"question", b"QUESTION")
    lay_out("here", FILES | {(REPOSITORY, TRAIN): gzip.compress(train, mtime=0)})
    assert get("--from", "here") == 0
    assert "left out: 6 training pairs whose prompt is a test prompt" in capsys.readouterr().out
    kept = lines_of("out/hh-harmless.train.jsonl")
    assert len(kept) == 100 and len(lines_of("out/hh-harmless.test.jsonl")) == 40
    left_out = read_checked_json("out/hh-harmless.json")["left_out"]
    assert left_out == {"training pairs whose prompt is a test prompt": 6}


@pytest.mark.slow
def test_a_set_without_a_split_is_split_by_opening(monkeypatch):
    """About one opening in twenty, with every later turn of its dialogue."""
    first = [{s: dialogue(i, s) for s in ("chosen", "rejected")} for i in range(900)]
    later = [{s: r["chosen"] + dialogue(0, s) for s in ("chosen", "rejected")} for r in first[::3]]
    lines = "".join(json.dumps(record) + "\n" for record in first + later).encode()
    whole = known(train=(File(TRAIN),), test=(), train_records=1200, test_records=None)
    monkeypatch.setitem(SETS, NAME, whole)
    lay_out("here", {(REPOSITORY, TRAIN): gzip.compress(lines, mtime=0)})
    assert get("--from", "here") == 0
    sides = [lines_of(f"out/hh-harmless.{part}.jsonl") for part in ("test", "train")]
    openings = [{up_to_first_reply(record["prompt"]) for record in side} for side in sides]
    assert len(sides[0]) + len(sides[1]) == 1200 and not openings[0] & openings[1]
    assert 25 < len(openings[0]) < 65  # 45 expected, standard deviation 7
    assert any("the chosen answer" in record["prompt"] for record in sides[0])
    assert get("--from", "here", "--seed", 7, output="again") == 0  # the seed is of samples alone
    assert outputs("again")["hh-harmless.test.jsonl"] == outputs()["hh-harmless.test.jsonl"]


def test_openings():
    text = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why?\n\nAssistant:"
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why?"},
    ]
    assert up_to_first_reply(text) == "\n\nHuman: hi"
    assert up_to_first_reply(messages) == up_to_first_reply(messages[:1]) == "user: hi"
    assert up_to_first_reply("a post") == "a post"
    assert key_of("A\n b ") == key_of("a B") != key_of("a c")
    assert is_test({"prompt": messages}) == is_test({"prompt": messages[:1]})


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 20, 43, 44, 100, 131])
def test_copies_of_pairs(count):
    """Exact count; copies differ by at most one; of the last round whole prompts, but for one."""
    keys = [bytes([prompt]) for prompt in range(12) for _ in range(1 + prompt % 6)]
    keys = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    copies = copies_of_pairs(keys, count, np.random.default_rng(3))
    rounds = count // len(keys)
    assert copies.sum() == count and set(copies - rounds) <= {0, 1}
    size, taken = Counter(keys), Counter()
    for key, times in zip(keys, copies - rounds):
        taken[key] += times
    assert sum(0 < taken[key] < size[key] for key in size) <= 1
    assert list(copies) == list(copies_of_pairs(keys, count, np.random.default_rng(3)))


def test_no_pair_is_favoured():
    """Each is taken about as often, whether its prompt has one pair or six."""
    keys = [bytes([prompt]) for prompt in range(60) for _ in range(1 + prompt % 6)]
    draws = [copies_of_pairs(keys, 70, np.random.default_rng(seed)) for seed in range(2000)]
    assert abs(np.mean(draws, 0) - 70 / len(keys)).max() < 0.06  # standard deviation .01


def test_samples_of_both_parts(capsys):
    lay_out("here")
    assert get("--from", "here", "--pairs", 700, "--test-pairs", 10, "--seed", 3) == 0
    assert get("--from", "here", "--pairs", 700, "--seed", 4, output="other") == 0
    assert get("--from", "here", "--pairs", 50, output="few") == 0
    train = Counter(record["prompt"] for record in lines_of("out/hh-harmless.train.jsonl"))
    assert sum(train.values()) == 700 and set(train.values()) == {2, 3} and len(train) == 300
    other = Counter(record["prompt"] for record in lines_of("other/hh-harmless.train.jsonl"))
    assert other != train and len(lines_of("few/hh-harmless.train.jsonl")) == 50
    test = [record["prompt"] for record in lines_of("out/hh-harmless.test.jsonl")]
    assert len(set(test)) == 10
    assert "there are 40 test pairs" in refused(
        capsys, "--from", "here", "--test-pairs", 41, output="many"
    )


def test_a_sample_of_scored_responses_holds_single_pairs(monkeypatch):
    lines = (json.dumps(ROWS["prism"][0].record) + "\n") * 3
    lay_out("here", {("", "conversations.jsonl"): lines.encode()})
    monkeypatch.setattr("minimore.data.public.parts.TEST_SHARE", 0)
    more = ("--from", "here", "--accept-change")
    assert get(*more, name="prism") == 0 and get(*more, "--pairs", 7, name="prism", output="s") == 0
    whole, sample = lines_of("out/prism.train.jsonl"), lines_of("s/prism.train.jsonl")
    assert len(whole) == 6 and "scores" in whole[0]
    assert len(sample) == 7 and all("scores" not in record for record in sample)
    pairs = {(r["chosen"], r["rejected"]) for r in sample}
    assert pairs <= {("It is 4.", "It is 5."), ("It is 4.", "6"), ("So.", "No.")}


# ---- the table -----------------------------------------------------------------------------------


def oasst():
    message = {"lang": "en", "deleted": False, "rank": None, "parent_id": None}
    rows = [message | {"message_id": "r", "text": "hi", "role": "prompter"}]
    for id, rank, lang in (("a", 1, "en"), ("b", 0, "en"), ("c", 2, "de")):
        reply = {"message_id": id, "parent_id": "r", "text": id, "role": "assistant"}
        rows.append(message | reply | {"rank": rank, "lang": lang})
    return rows


PAIR = {"prompt": "P", "response_0": "x", "response_1": "y"}
PAIR |= {"better_response_id": 0, "safer_response_id": 1}
RATINGS = {
    aspect: {"Rating": "3"}
    for aspect in ("instruction_following", "honesty", "truthfulness", "helpfulness")
}
POST = {"subreddit": "s", "title": "t", "post": "p"}
# What a file of every set holds, and the pairs, label ties and first record that come of it.
EXAMPLES = {
    "hh-helpful": ([{s: dialogue(1, s) for s in ("chosen", "rejected")}], 1, 0, None),
    "hh-harmless": ([{s: dialogue(1, s) for s in ("chosen", "rejected")}], 1, 0, None),
    "oasst1": (oasst(), 1, 0, {"chosen": "b", "rejected": "a"}),
    "webgpt": (
        [
            {"question": {"full_text": "Q"}, "answer_0": "x", "answer_1": "y"}
            | {"score_0": first, "score_1": -first}
            for first in (-0.5, 0.0)
        ],
        1,
        1,
        None,
    ),
    "summarize": (
        [
            {"info": POST, "summaries": [{"text": "x"}, {"text": "y"}], "choice": choice}
            for choice in (0, 1)
        ],
        2,
        0,
        {"chosen": "x", "rejected": "y"},
    ),
    "pku-safer": ([PAIR], 1, 0, {"chosen": "y", "rejected": "x"}),
    "pku-better": ([PAIR], 1, 0, {"chosen": "x", "rejected": "y"}),
    "multipref": ([ROWS["multipref"][0].record], 1, 0, {"votes": [2.5, 1.5]}),
    "helpsteer3": (
        [
            {
                "context": [{"role": "user", "content": "P"}],
                "response1": "x",
                "response2": "y",
                "overall_preference": preference,
                "individual_preference": [{"score": 2}, {"score": 1}, {"score": -1}],
            }
            for preference in (1, 0)
        ],
        1,
        1,
        {"chosen": "y", "rejected": "x", "votes": [2.0, 1.0]},
    ),
    "prism": ([ROWS["prism"][0].record], 3, 1, {"annotator": "u1", "scores": [90, 5, 5]}),
    "shp": (
        [{"history": "P", "human_ref_A": "x", "human_ref_B": "y", "labels": 0}],
        1,
        0,
        {"chosen": "y", "rejected": "x"},
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "P",
                "completions": [
                    {"response": r, "fine-grained_score": s, "annotations": RATINGS}
                    for r, s in (("x", 2.0), ("y", 4.5), ("z", 2.0))
                ],
            }
        ],
        2,
        1,
        {"responses": ["x", "y", "z"], "scores": [2.0, 4.5, 2.0]},
    ),
}


@pytest.fixture
def parquet_of_json(monkeypatch):
    """Stands in for pyarrow: its files are JSON lines."""

    class ParquetFile:
        def __init__(self, path):
            self.rows = lines_of(path)

        def iter_batches(self, batch_size):
            yield types.SimpleNamespace(to_pylist=lambda: self.rows)

    module = types.ModuleType("pyarrow")
    module.parquet = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", module)


@pytest.mark.parametrize("name", SETS)
def test_every_set_becomes_pairs(name, monkeypatch, parquet_of_json):
    """Its records as they are documented, in files that lie as in its repository."""
    records, pairs, ties, first = EXAMPLES[name]
    monkeypatch.setattr("minimore.data.public.parts.TEST_SHARE", 0)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for file in SETS[name].files:
        content = lines.replace('"P"', f'"{file.path}"').encode()  # prompts that no other has
        content = gzip.compress(content, mtime=0) if file.path.endswith(".gz") else content
        lay_out("here", {("", file.path): content})
    assert get("--from", "here", "--accept-change", name=name) == 0
    manifest = read_checked_json(f"out/{name}.json")
    part = "test" if SETS[name].test else "train"
    values = manifest["outputs"][part]
    files = len(getattr(SETS[name], part))
    assert (values["pairs"], values["ties"]) == (files * pairs, files * ties)
    if first is not None:
        assert first.items() <= lines_of(f"out/{name}.{part}.jsonl")[0].items()


def test_the_table_says_what_it_must(monkeypatch):
    monkeypatch.undo()
    for name, public_set in SETS.items():
        assert public_set.shape in BY_NAME, name
        assert public_set.revision is None or len(public_set.revision) == 40
        paths = [file.path for file in public_set.files]
        assert len(set(paths)) == len(paths) and public_set.about and public_set.licence
        for file in public_set.files:
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert len(SETS) == 12 and [name for name in SETS if SETS[name].paper] == [*SETS][:5]


def test_the_page_lists_every_set_with_licence_and_sizes(monkeypatch):
    monkeypatch.undo()
    page = (ROOT / "minimore" / "data" / "public" / "README.md").read_text("utf-8")
    page = page.partition("## Public sets by name")[2]
    for name, public_set in SETS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        assert public_set.repository in row or name == "pku-better"
        assert public_set.licence[:8] in row
        numbers = (public_set.train_records, public_set.test_records, *(public_set.paper or ()))
        assert all(f"{number:,}" in row for number in numbers if number is not None)
    unpinned = [name for name in SETS if SETS[name].revision is None]
    assert unpinned == ["webgpt", "summarize"] and "Ten sets have a commit" in page


def test_parquet_without_pyarrow_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    lay_out("here", {("", SETS["webgpt"].train[0].path): b"PAR1"})
    assert "pip install pyarrow" in refused(capsys, "--from", "here", name="webgpt")


TURNS = ROWS["prism"][0].record["conversation_history"]
BROKEN = {
    "multipref": [
        ("normal_worker_annotations", "Tie", "expected a list"),
        ("normal_worker_annotations", ["Tie"], "expected an object"),
        ("normal_worker_annotations", [{"pref": "Tie"}], '"overall_pref" is missing'),
        ("expert_worker_annotations", [{"overall_pref": "C"}], "expected one of A-is-clearly"),
        ("completion_a", None, "expected a string"),
        ("text", 7, "expected a string"),
    ],
    "prism": [
        ("conversation_history", "hi", "expected a list"),
        ("conversation_history", ["hi"], "expected an object"),
        ("conversation_history", [{"turn": 0}], '"role" is missing'),
        ("conversation_history", TURNS[1:4], "holds 0 questions"),
        ("conversation_history", [TURNS[0]] * 2, "holds 2 questions"),
        ("conversation_history", [TURNS[0] | {"turn": []}, {}], '"turn" is missing'),
        ("user_id", None, "expected a string"),
    ],
}


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [(name, *case) for name, cases in BROKEN.items() for case in cases],
)
def test_a_malformed_record_is_refused_by_its_line(name, key, value, says):
    records, *_ = EXAMPLES[name]
    with pytest.raises(InputError, match=re.escape(says)) as error:
        items_of(BY_NAME[name], records[0] | {key: value}, "file:7")
    assert str(error.value).startswith("file:7: ")


def test_what_nobody_labelled_is_left_out():
    """MultiPref without a vote; PRISM without a score, and behind a turn without a choice."""
    record = EXAMPLES["multipref"][0][0] | {"normal_worker_annotations": None}
    record |= {"expert_worker_annotations": [{"overall_pref": None}]}
    assert items_of(BY_NAME["multipref"], record, "w") == [LeftOut("no label")]
    turns = [dict(turn, if_chosen=False) for turn in TURNS]
    turns[1]["score"] = None
    items = items_of(BY_NAME["prism"], {"conversation_history": turns, "user_id": "u"}, "w")
    assert items[0] == LeftOut("no score", 2) and items[1]["responses"] == ["It is 5.", "6"]
    assert items[2:] == [LeftOut("behind a turn without a chosen reply", 1)]


# ---- the real files ------------------------------------------------------------------------------


def pairs_of_shared(source):
    records = []
    for part in ("train", "test"):
        with gzip.open(
            DATA / "pairs" / f"{source}.{part}.jsonl.gz", "rt", encoding="utf-8"
        ) as file:
            records += map(json.loads, file)
    return Counter((r["prompt"], r["chosen"], r["rejected"]) for r in records)


@real
def test_the_official_harmless_test_file(monkeypatch):
    """2,312 records, as we know them to the byte: 2,308 pairs, and 4 with a blank response."""
    monkeypatch.undo()
    assert get("--from", DATA / "native/hh-rlhf", "--test-only") == 0
    manifest = read_checked_json("out/hh-harmless.json")
    assert manifest["changes"] == [] and manifest["inputs"][TEST]["records"] == 2312
    assert manifest["outputs"]["test"]["pairs"] == 2308 and manifest["left_out"]["blank"] == 4
    records = lines_of("out/hh-harmless.test.jsonl")
    pairs = Counter((r["prompt"], r["chosen"], r["rejected"]) for r in records)
    assert pairs == pairs_of_shared("hh_harmless")


@pytest.mark.slow
@real
def test_oasst_english_validation(tmp_path):
    """1,025 pairs, in two parts that share no opening."""
    path = SETS["oasst1"].train[0].path
    shutil.copy(DATA / "native/oasst1/messages.jsonl.gz", tmp_path / path)
    assert get("--from", tmp_path, "--accept-change", name="oasst1") == 0
    manifest = read_checked_json("out/oasst1.json")
    assert sum(part["pairs"] for part in manifest["outputs"].values()) == 1025
    records = [lines_of(f"out/oasst1.{part}.jsonl") for part in ("train", "test")]
    openings = [{up_to_first_reply(record["prompt"]) for record in part} for part in records]
    assert openings[1] and not openings[0] & openings[1]
    pairs = Counter((r["prompt"], r["chosen"], r["rejected"]) for part in records for r in part)
    assert pairs == pairs_of_shared("oasst1")
