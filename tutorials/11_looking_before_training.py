"""Tutorial 11: looking at preference data before training on it.

Question      The training went well, and the accuracy is .5. Or it is .86 on the test file, and .58
              in use. What could one have seen in the data beforehand?
You will see  five faults, planted into good data one at a time; what the library finds of each; and
              what deals with it. Tutorial 12 tells what such faults cost.
Takes         about 4 seconds on a laptop CPU. Nothing is downloaded.
"""

import contextlib
import io
import json
import tempfile
import textwrap
from itertools import combinations
from pathlib import Path

import numpy as np

from minimore import load_source
from minimore.data.inspection.between import all_between
from minimore.data.inspection.findings import findings_of, rules_of
from minimore.data.inspection.survey import survey_of
from minimore.data.split import SplitOptions, split
from minimore.data.world import WORDS, World, train_tokenizer
from minimore.figures.sketch import show_curves
from minimore.model.tokenizer import Tokenizer

folder = tempfile.TemporaryDirectory()
home = Path(folder.name)
random = np.random.default_rng(0)

# %% Good data
# A response is 8 to 20 words, and its worth is the sum of their values. Whoever compares two
# responses has an impression of each: its worth, plus a mood. The better impression wins. Five
# responses to one prompt make ten comparisons.

values = 1.4 * World(annotators=("ana",), conflict=0.0).values()[0] / np.sqrt(14)


def text_of(words):
    return " " + " ".join(WORDS[i] for i in words) + "."


def compare(prompts, people=1, love_of_length=0.0):
    """Ten comparisons for each of so many prompts, by every person: (prompt, chosen, rejected)."""
    by_person = [[] for _ in range(people)]
    for _ in range(prompts):
        prompt = f"\n\nHuman:{text_of(random.integers(len(WORDS), size=4))}\n\nAssistant:"
        lengths = random.integers(8, 21, size=5)
        responses = [random.integers(len(WORDS), size=length) for length in lengths]
        worth = np.array([values[words].sum() for words in responses])
        impression = worth + love_of_length * lengths + random.gumbel(size=(people, 5))
        for seen, comparisons in zip(impression, by_person):
            for a, b in combinations(range(5), 2):
                best, worst = (a, b) if seen[a] > seen[b] else (b, a)
                comparisons.append((prompt, text_of(responses[best]), text_of(responses[worst])))
    return by_person


def write(name, records):
    path = home / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def records_of(comparisons, ending=""):
    return [
        {"prompt": prompt, "chosen": chosen + ending, "rejected": rejected + ending}
        for prompt, chosen, rejected in comparisons
    ]


(comparisons,) = compare(100)
good_file = write("good.jsonl", records_of(comparisons))

# %% A look
# This is `minimore data look good.jsonl` by its parts: a survey counts, rules ask what the labels
# follow, and what is too frequent is a finding.


def look(*paths, tokenizer=None, max_length=96):
    """Print the findings of some files, and between them; returns them by name."""
    surveys = [survey_of(path, tokenizer, max_length, chat=False) for path in paths]
    findings = [finding for survey in surveys for finding in findings_of(survey, rules_of(survey))]
    findings += [finding for between in all_between(surveys) for finding in between.findings]
    print("\n" + ", ".join(survey.name for survey in surveys))
    for line in map(str, findings or ["no findings"]):
        print(textwrap.fill(line, width=96, initial_indent="  ", subsequent_indent="      "))
    return {finding.name: finding for finding in findings}


findings_of_good = look(good_file)

# %% Fault 1: the labels are all one way round
# The table has a column that says who won, and the script that exported it did not read it: the
# first response always gets the score 1. A file that was sorted by score looks like this, too, and
# nothing is wrong with it. So the finding is a question, and whoever wrote the file has the answer.

scored = []
for prompt, first, second in comparisons:
    scored.append({"prompt": prompt, "responses": [first, second], "scores": [1, 0]})
findings_of_one_way = look(write("one_way.jsonl", scored))

# %% Fault 2: the responses are equal when cut
# Half of the answers end with the same notice of 35 tokens. A reward is read at the end of a text,
# so long texts are cut on the left. At --max-length 32 nothing is left of either answer but the
# notice. The look must know the tokenizer to see that. It says besides that the prompts are gone.
# minimore counts such pairs and leaves them out; the remedy is a larger --max-length, or to take
# the notice off.

NOTICE = (
    " This is only general advice. Please ask someone who knows you well before you act on it. We"
    " cannot say what is right for you, since we do not know you."
)
noticed = records_of(comparisons[:500], ending=NOTICE) + records_of(comparisons[500:])
notices_file = write("notices.jsonl", noticed)
train_tokenizer([*sum(comparisons, ()), *[NOTICE] * 20], home / "tokenizer.json")
tokenizer = Tokenizer(home)
findings_of_cut = look(notices_file, tokenizer=tokenizer, max_length=32)
cut = load_source("cut", notices_file, tokenizer, max_length=32)
print(cut.line())

# %% Fault 3: the labels follow a length rule
# The people who labelled were in haste, and liked what was long. The look asks how often the longer
# response wins. Of good data the picture is flat.

(hasty,) = compare(100, love_of_length=1.0)
findings_of_hasty = look(write("hasty.jsonl", records_of(hasty)))
curves = {}
for name, some in {"good": comparisons, "hasty": hasty}.items():
    more = np.array([len(chosen.split()) - len(rejected.split()) for _, chosen, rejected in some])
    of_size = [np.mean(more[abs(more) == size] > 0) for size in range(1, 10)]
    curves[name] = (range(1, 10), of_size)
show_curves("11_length", "How often the longer one wins", "words more", "share", curves)

# %% Fault 4: training and test share their prompts
# Somebody shuffled the pairs and cut off a third for the test. But ten pairs have the same five
# responses, so the test asks about responses that were trained on. `minimore data split` lets no
# prompt cross.

shuffled = [records_of(comparisons)[i] for i in random.permutation(len(comparisons))]
by_pair = write("by_pair.train.jsonl", shuffled[300:]), write("by_pair.test.jsonl", shuffled[:300])
findings_of_leak = look(*by_pair)
with contextlib.redirect_stdout(io.StringIO()):  # it prints how many lines each part has
    split(SplitOptions(file=good_file, output=str(home / "parts"), test=0.3))
findings_of_parts = look(str(home / "parts" / "train.jsonl"), str(home / "parts" / "test.jsonl"))

# %% Fault 5: every pair stands there in both orders, and what looks like it
# The file joins two exports of one table, and in one of them the columns are exchanged. Whatever a
# model says of a pair is right in one order, and wrong in the other. No computation finds out which
# export is right. A person does, who reads three pairs.

exchanged = [(prompt, rejected, chosen) for prompt, chosen, rejected in comparisons]
findings_of_both_orders = look(write("both_orders.jsonl", records_of(comparisons + exchanged)))

# Not every contradiction is a mistake. Now two people label the same pairs, and their files are
# joined. The look finds contradictions again, in about a third of the pairs, and duplicates
# besides: every pair stands there twice, and where the two disagree nobody was wrong. Such pairs
# belong in one record with "votes" (tutorial 13).

findings_of_two = look(write("two_people.jsonl", records_of(sum(compare(100, people=2), []))))
folder.cleanup()

# %% What was claimed
assert not findings_of_good and not findings_of_parts
assert findings_of_one_way["one way round"].cases == 1000
assert len(tokenizer.file.encode(NOTICE).ids) == 35
assert set(findings_of_cut) == {"equal when cut", "prompt cut away"}
assert findings_of_cut["equal when cut"].cases == cut.identical == 500
assert set(findings_of_hasty) == {"length rule"} and set(findings_of_leak) == {"shared prompts"}
assert findings_of_both_orders["contradictions"].cases == 2000
assert set(findings_of_two) == {"contradictions", "duplicates"}
assert 0.28 < findings_of_two["contradictions"].cases / 2000 < 0.38

# %% Two exercises
# Exercise 1. Turn a fifth of the labels of good.jsonl round, at random. Which finding shows it? And
#             which could, if every pair had been labelled by two people?
# Exercise 2. Let the test file have prompts of the training file, with other responses. What does
#             the look say, and is it a fault?
