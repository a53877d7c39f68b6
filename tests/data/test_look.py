"""`data look`: each planted fault is found, and nothing else; clean data show none.

The clean data are a made-up file, and the five sources of the paper's kind where they are at hand
(MINIMORE_DATA). There, no share may be above half of the one that makes a finding.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS, ROOT
from runs import slow_but

from minimore.cli import main
from minimore.data.forms import Pair
from minimore.data.inspection import look as look_module
from minimore.data.inspection.between import all_between
from minimore.data.inspection.findings import FAULTS, findings_of, rules_of
from minimore.data.inspection.signs import is_cut_off, is_refusal, marks_in, signs_of
from minimore.data.inspection.survey import SAMPLE, EvenSample, survey_of
from minimore.data.records import read_records
from minimore.data.world import WORDS
from minimore.figures import plots
from minimore.model.tokenizer import Tokenizer

DATA = Path(os.environ.get("MINIMORE_DATA", ROOT.parent / "shared" / "data"))
SOURCES = ("hh_helpful", "hh_harmless", "oasst1", "webgpt", "summeval")
needs_data = pytest.mark.skipif(
    not (DATA / "pairs").is_dir(), reason=f"no preference data in {DATA}; set MINIMORE_DATA"
)
SEVEN = (  # of the faults, planted in real data, too
    *("blank", "no prompt", "cut off", "template marks"),
    *("duplicates", "contradictions", "length rule"),
)
OF_TOKENS = ("template marks", "special tokens", "equal when cut", "prompt cut away")
QUICK = ("blank", "further turns", "contradictions", "label ties")  # of the faults
LINES = 400  # of a source's training file, at most, that are looked at
SHORT = 256  # tokens, for the faults of truncation


def sentence(rng, least, most):
    return " " + " ".join(rng.choices(WORDS, k=rng.randint(least, most))).capitalize() + "."


def made_up(seed, pairs=300):
    """A clean file: no two prompts alike, and lengths that say nothing."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"\n\nHuman:{sentence(rng, 40, 60)}\n\nAssistant:",
            "chosen": sentence(rng, 15, 30),
            "rejected": sentence(rng, 15, 30),
        }
        for _ in range(pairs)
    ]


def some_of(records, share, rng):
    """So many of the records, each to be changed in place."""
    return rng.sample(records, max(3, round(share * len(records))))


# ---- what is planted -----------------------------------------------------------------------------


def blank(records, rng):
    for record in some_of(records, 0.03, rng):
        record[rng.choice(("chosen", "rejected"))] = " \n"


def identical(records, rng):
    for record in some_of(records, 0.03, rng):
        record["rejected"] = record["chosen"].upper()


def no_prompt(records, rng):
    for record in some_of(records, 0.03, rng):
        record["prompt"] = ""


def prompt_repeated(records, rng):
    for record in some_of(records, 0.02, rng):
        for side in ("chosen", "rejected"):
            record[side] = record["prompt"] + record[side]


def refusals(records, rng):
    for record in some_of(records, 0.8, rng):
        side = rng.choice(("chosen", "rejected"))
        record[side] = " I'm sorry, but I can't." + record[side]


def cut_off(records, rng):
    for record in records:
        for side in ("chosen", "rejected"):
            words = record[side].split()
            record[side] = (
                " " + " ".join(words[: 1 + 3 * len(words) // 4]).rstrip(".,;:!?)\"'") + " a"
            )


def further_turns(records, rng):
    for record in some_of(records, 0.1, rng):
        record[rng.choice(("chosen", "rejected"))] += "\n\nHuman: And then?"


def template_marks(records, rng):
    for record in some_of(records, 0.03, rng):
        record["prompt"] = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n"


def special_tokens(records, rng):
    for record in some_of(records, 0.05, rng):
        for side in ("chosen", "rejected"):
            record[side] += "</s>"


def duplicates(records, rng):
    records += [dict(record) for record in some_of(records, 0.25, rng)]


def contradictions(records, rng):
    for record in some_of(records, 0.05, rng):
        records.append(record | {"chosen": record["rejected"], "rejected": record["chosen"]})


def near_duplicates(records, rng):
    longest = sorted(records, key=lambda record: -len(record["prompt"]))
    for record, other in zip(longest[: len(records) // 5], records[::-1]):
        prompt = record["prompt"].replace("Human: ", "Human: Well, ")
        records.append(other | {"prompt": prompt, "chosen": other["chosen"] + " So."})


def equal_when_cut(records, rng):
    for record in some_of(records, 0.03, rng):
        tail = "".join(sentence(rng, 20, 20) for _ in range(15))
        for side in ("chosen", "rejected"):
            record[side] += tail


def prompt_cut_away(records, rng):
    for record in some_of(records, 0.6, rng):
        for side in ("chosen", "rejected"):
            record[side] = "".join(sentence(rng, 20, 20) for _ in range(15))


def length_rule(records, rng):
    for record in records:
        record["chosen"], record["rejected"] = sorted(
            (record["chosen"], record["rejected"]), key=len, reverse=True
        )


def word_rule(records, rng):
    for record in records:
        record["chosen"] += " Indeed."
        record["rejected"] += " Perhaps."


def stock_response(records, rng):
    for record in some_of(records, 0.15, rng):
        record["rejected"] = " That depends."


def unreadable_votes(records, rng):
    bad = ([-1, 3], [float("inf"), 1], [3], [2, 1, 1], [0, 0], ["3", "1"], [1e308, 1e308])
    for record, votes in zip(records, bad):
        record["votes"] = votes


def as_scored(record, scores):
    texts = [record["chosen"], record["rejected"]]
    return {"prompt": record["prompt"], "responses": texts, "scores": scores}


def one_way_round(records, rng):
    records[:] = [as_scored(record, [2, 1]) for record in records]


def label_ties(records, rng):
    records[:] = [
        as_scored(record, [1, 1] if rng.random() < 0.7 else rng.choice(([2, 1], [1, 2])))
        for record in records
    ]


PLANTED = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        *(blank, identical, no_prompt, prompt_repeated, refusals, cut_off, further_turns),
        *(template_marks, special_tokens, duplicates, contradictions, near_duplicates),
        *(equal_when_cut, prompt_cut_away, length_rule, word_rule, stock_response),
        *(one_way_round, label_ties, unreadable_votes),
    )
}


# ---- helpers -------------------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def names_found(path, tokenizer=None, max_length=SHORT):
    survey = survey_of(str(path), tokenizer, max_length, chat=False)
    return {finding.name for finding in findings_of(survey, rules_of(survey))}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDENS / "llama")


@pytest.fixture
def halved(monkeypatch):
    """Findings from half the usual shares on."""
    for name, fault in FAULTS.items():
        monkeypatch.setitem(FAULTS, name, fault._replace(share=fault.share / 2))


# ---- the faults ----------------------------------------------------------------------------------


def test_every_fault_of_the_table_is_planted():
    assert set(FAULTS) <= set(PLANTED)


@pytest.mark.parametrize("name", slow_but(QUICK, PLANTED))
def test_a_planted_fault_is_found_and_no_other(name, tokenizer, tmp_path):
    records = made_up(7)
    PLANTED[name](records, random.Random(1))
    path = write(tmp_path / "a.jsonl", records)
    if name not in OF_TOKENS:
        tokenizer = None  # a tokenizer of so few tokens takes long
    assert names_found(path, tokenizer, 600 if "cut" not in name else SHORT) == {name}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SEVEN)
def test_a_fault_planted_in_real_data_is_found_and_no_other(name, tmp_path):
    records = [
        {key: record[key] for key in ("prompt", "chosen", "rejected")}
        for _, record in read_records(str(DATA / "pairs" / "hh_helpful.test.jsonl.gz"))
    ]
    PLANTED[name](records, random.Random(2))
    assert names_found(write(tmp_path / "a.jsonl", records)) == {name}


@pytest.mark.slow
def test_a_clean_file_shows_nothing_even_at_half_the_shares(halved, tokenizer, tmp_path):
    for seed in range(2):
        assert not names_found(write(tmp_path / "a.jsonl", made_up(seed)), tokenizer, 600)


@needs_data
@pytest.mark.parametrize("name", slow_but(["webgpt"], SOURCES))
def test_clean_test_files_show_nothing_even_at_half_the_shares(halved, name):
    assert not names_found(DATA / "pairs" / f"{name}.test.jsonl.gz")


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SOURCES)
def test_clean_sources_show_nothing_in_tokens_and_between_their_files(halved, tmp_path, name):
    """Lines from the whole length of the training file, and the test file."""
    tokenizer = Tokenizer(DATA / "tokenizers" / "pythia")
    records = [r for _, r in read_records(str(DATA / "pairs" / f"{name}.train.jsonl.gz"))]
    part = write(tmp_path / f"{name}.train.jsonl", records[:: -(-len(records) // LINES)])
    surveys = []
    for path in (part, str(DATA / "pairs" / f"{name}.test.jsonl.gz")):
        surveys.append(survey_of(path, tokenizer, 512, chat=False))
        assert not findings_of(surveys[-1], rules_of(surveys[-1]))
    (between,) = all_between(surveys)
    assert not between.findings and not between.shared


@pytest.mark.slow
@needs_data
def test_counts_of_real_data_are_those_that_are_known():
    """From the page of the data: native HH has blank responses, oasst1 has two contradictions."""
    harmless = survey_of(
        str(DATA / "native" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"), None, 512, False
    )
    assert harmless.pairs == 2312
    assert harmless.counts["blank"].total == 4
    assert harmless.counts["blank"].lines == [87, 517, 926, 1104]
    summaries = survey_of(str(DATA / "pairs" / "summeval.test.jsonl.gz"), None, 512, False)
    assert summaries.counts["duplicates"].total == 15
    assert len(set(summaries.prompts)) == 20
    webgpt = survey_of(
        str(DATA / "native" / "text-score" / "webgpt.test.json.gz"), None, 512, False
    )
    assert (webgpt.pairs, webgpt.label_ties) == (656, 245)
    assert (webgpt.records_of_two, webgpt.first_preferred) == (656, 348)
    oasst = survey_of(str(DATA / "pairs" / "oasst1.train.jsonl.gz"), None, 512, False)
    assert oasst.counts["contradictions"].total == 2


# ---- between files -------------------------------------------------------------------------------


def between(tmp_path, first, second, names=("a.train.jsonl", "a.test.jsonl")):
    paths = [write(tmp_path / name, records) for name, records in zip(names, (first, second))]
    (found,) = all_between([survey_of(path, None, 512, False) for path in paths])
    return found


def test_shared_prompts_and_near_duplicates_between_files(tmp_path):
    one, other = made_up(1), made_up(2)
    assert not between(tmp_path, one, other).findings
    leak = other + [record | {"prompt": one[3]["prompt"].upper()} for record in other[:2]]
    (finding,) = between(tmp_path, one, leak).findings
    assert (
        finding.name == "shared prompts" and finding.cases == 1 and "2 of its pairs" in str(finding)
    )
    alike = between(tmp_path, one, leak, ("a.train.jsonl", "b.train.jsonl"))
    assert len(alike.shared) == 1 and not alike.findings  # two sources
    near = [
        record | {"prompt": record["prompt"].replace("Human: ", "Human: Well, ")} for record in one
    ]
    (finding,) = between(tmp_path, one, other + near[:30]).findings
    assert finding.name == "near duplicates between files" and finding.cases >= 25
    assert finding.lines[0] > len(other)


def mostly_longer(seed, share=0.8, pairs=300):
    """A clean file in which the longer response wins in this share of the pairs."""
    records, rng = made_up(seed, pairs), random.Random(seed)
    for record in records:
        texts = sorted((record["chosen"], record["rejected"]), key=len)
        record["rejected"], record["chosen"] = texts if rng.random() < share else texts[::-1]
    return records


def swapped(records):
    return [
        record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in records
    ]


TURNED = "labels turned round?"


def test_labels_that_are_turned_round_in_one_part_of_a_source_are_found(tmp_path):
    one, other = mostly_longer(1), mostly_longer(2)
    assert not between(tmp_path, one, other).findings
    (finding,) = between(tmp_path, one, swapped(other)).findings
    assert finding.name == TURNED and 200 < finding.cases < 280 and finding.total == 300
    assert "of a.test.jsonl are ranked against their labels" in str(finding)
    for names in (
        ("a.train.jsonl", "b.test.jsonl"),  # other sources may differ in taste
        ("oasst1.train.jsonl", "oasst2.test.jsonl"),
        ("a.train.jsonl", "b.train.jsonl"),
        ("a.jsonl", "b.jsonl"),
    ):
        assert not between(tmp_path, one, swapped(other), names).findings, names
    (finding,) = between(tmp_path, one, swapped(other), ("train.jsonl", "test.jsonl")).findings
    assert finding.name == TURNED
    assert not between(tmp_path, made_up(1), swapped(made_up(2))).findings  # nothing to go by


def test_parts_of_one_source_lie_in_one_directory_if_they_have_no_other_name(tmp_path):
    surveys = []
    for directory, records in (("a", mostly_longer(1)), ("b", swapped(mostly_longer(2)))):
        (tmp_path / directory).mkdir()
        name = "train.jsonl" if directory == "a" else "test.jsonl"
        path = write(tmp_path / directory / name, records)
        surveys.append(survey_of(path, None, 512, False))
    (two,) = all_between(surveys)
    assert not two.findings


@needs_data
@pytest.mark.parametrize("name", slow_but(("webgpt",), SOURCES))
def test_swapped_labels_of_real_data_are_found(name, tmp_path):
    paths = [DATA / "pairs" / f"{name}.{part}.jsonl.gz" for part in ("train", "test")]
    records = [record for _, record in read_records(str(paths[1]))]
    path = write(tmp_path / f"{name}.test.jsonl", swapped(records))
    surveys = [survey_of(str(path), None, 512, False) for path in (paths[0], path)]
    (two,) = all_between(surveys)
    assert [finding.name for finding in two.findings] == [TURNED]


# ---- signs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (" I'm sorry, I can't help with that.", True),
        (" I\u2019m unable to say.", True),
        ("As an AI language model, I have no body.", True),
        (" Sure! I can help.", False),
        (" She was sorry that she could not come.", False),
        ("A long answer. " * 20 + "I cannot say more.", False),
    ],
)
def test_refusals(text, expected):
    assert is_refusal(text) is expected


def test_cut_off_texts():
    long = "word " * 30
    assert is_cut_off(long) and is_cut_off(long + "and,") and is_cut_off(long + "7\n")
    assert (
        not is_cut_off(long + "end.") and not is_cut_off(long + "end?)") and not is_cut_off("Yes")
    )


def test_marks_of_the_models_own_template_are_its_special_tokens(tokenizer):
    assert list(marks_in(["[INST] hi [/INST]"], None)) == ["template marks"]
    assert not list(marks_in(["a < b [1] # title"], tokenizer))
    own = tokenizer.markers[0]
    assert list(marks_in([f"hi {own}"], tokenizer)) == ["special tokens"]
    # What a template wrote is no fault; what people wrote in a message is.
    rendered = Pair(f"{own}hi", f" yes{own}", f" no{own}", rendered=True, said=(" yes", " no"))
    assert not list(signs_of(rendered, tokenizer))


def test_messages_are_read_without_a_model(tmp_path):
    records = made_up(3, 60)
    for record in records:
        record["prompt"] = [{"role": "user", "content": record["prompt"]}]
        record["chosen"] = [{"role": "assistant", "content": record["chosen"]}]
    survey = survey_of(write(tmp_path / "a.jsonl", records), None, 512, False)
    assert survey.pairs == 60 and survey.unit == "characters"


def test_an_even_sample_is_even_and_bounded():
    sample = EvenSample(10)
    for i in range(1000):
        sample.add(Pair(str(i), "", ""))
    places = [place for place, _ in sample.items]
    assert len(places) <= 10 and len(set(np.diff(places))) == 1 and places[-1] > 800
    assert all(pair.prompt == str(place) for place, pair in sample.items)
    assert SAMPLE >= 1000


# ---- the verb ------------------------------------------------------------------------------------


def test_the_page_says_what_was_found_with_lines(tmp_path, capsys):
    records = made_up(4)
    records[10]["chosen"] = records[20]["chosen"] = records[30]["chosen"] = ""
    records[0]["votes"], records[1]["votes"] = [3, 1], [2, 0]
    path = write(tmp_path / "a.jsonl", records)
    assert main(["data", "look", path, "--output", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert "blank: 3 of 300 pairs have a blank response" in said and "(lines 11, 21, 31)" in said
    page = (tmp_path / "x" / "page.md").read_text("utf-8")
    assert "- **blank**: 3 of 300" in page and "2 records have votes: on average .875" in page
    assert (
        "can hardly rank more than .875 right" in page and f"{path}: 300 pairs, 1 finding\n" in said
    )
    assert "Length and a few words alone reach" in page and "Pair 300:" in page
    numbers = json.loads((tmp_path / "x" / "look.json").read_text("utf-8"))
    (file,) = numbers["files"].values()
    assert file["counts"]["blank"] == {"count": 3, "lines": [11, 21, 31]}
    assert file["findings"][0]["name"] == "blank" and file["agreement"] == 0.875
    has_figure = (tmp_path / "x" / "look.png").is_file()
    assert has_figure == plots.available()
    assert main(["data", "look", path]) == 0  # the same page on the screen, behind the summary
    summary = said[: said.index("written to")]
    assert capsys.readouterr().out == f"{summary}\n{page}"


def test_what_is_found_between_files_comes_before_the_pairs(tmp_path, capsys):
    paths = [write(tmp_path / name, made_up(i, 30)) for i, name in enumerate(("a", "b"))]
    assert main(["data", "look", *paths]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{paths[0]}: 30 pairs, 0 findings\n{paths[1]}: 30 pairs, 0 findings\n")
    places = [page.index(f"# {heading}") for heading in (
        paths[0], paths[1], "Between the files", f"Some pairs of {paths[0]}",
        f"Some pairs of {paths[1]}",
    )]  # fmt: skip
    assert places == sorted(places) and page.count("None.") == 2  # once a file
    assert "# Between the files\n\nNo two files share a prompt." in page


def test_without_matplotlib_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(look_module.plots, "available", lambda: False)
    paths = [
        write(tmp_path / name, made_up(i, 30)) for i, name in enumerate(("a.jsonl", "b.jsonl"))
    ]
    options = ("--model", str(GOLDENS / "llama"), "--output", str(tmp_path / "out"))
    assert main(["data", "look", *paths, *options]) == 0
    assert "no figure, since matplotlib is not installed" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["look.json", "page.md"]
    assert "No two files share a prompt." in (tmp_path / "out" / "page.md").read_text("utf-8")


def test_what_cannot_be_looked_at_is_one_line(tmp_path, capsys):
    path, empty = write(tmp_path / "a.jsonl", made_up(1, 5)), write(tmp_path / "e.jsonl", [])
    ties = write(tmp_path / "t.jsonl", [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}])
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a"}\n')
    for arguments, expected in (
        ([], "FILE is missing"),
        ([empty], "has no pair: 0 records"),
        ([ties], "has no pair: 1 records, 1 label ties"),
        ([path, path], "is given twice"),
        ([str(tmp_path / "bad.jsonl")], 'bad.jsonl:1: "rejected" is missing'),
        ([path, "--model", "nowhere"], "not a directory"),
        ([path, "--output", str(tmp_path)], "exists already"),
    ):
        assert main(["data", "look", *arguments]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1
    assert main(["data", "look", path]) == 0  # five pairs are enough for a page
