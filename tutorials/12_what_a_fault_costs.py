"""Tutorial 12: looking at preference data before training on it.

Question      The training went well, and the accuracy is .5. Or it is .86 on the test file, and .58
              in use. What could one have seen in the data beforehand?
You will see  five faults, planted into good data one at a time: what the library finds of each,
              what each costs, and how much of it a remedy gives back. Then four votes a pair in
              the place of one label: why a model that learns from majorities is too sure of itself,
              and which part of an error is the people's, and which the model's.
Takes         about 10 seconds on a laptop CPU. Nothing is downloaded.
"""

import contextlib
import io
import json
import tempfile
import textwrap
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minimore import accuracy, load_source, pair_ece, pair_losses
from minimore.calibration import fit_temperature, negative_log_likelihood, probability
from minimore.data.inspection.between import all_between
from minimore.data.inspection.findings import findings_of, rules_of
from minimore.data.inspection.survey import survey_of
from minimore.data.labels import AS_WRITTEN, LabelRules
from minimore.data.split import SplitOptions, split
from minimore.data.world import WORDS, World, train_tokenizer
from minimore.disagreement import disagreement
from minimore.lab.probe import ProbeOptions, train_head
from minimore.model.tokenizer import Tokenizer
from minimore.tables import Table, number, with_interval
from minimore.uncertainty import intervals
from minimore.votes import Labels

folder = tempfile.TemporaryDirectory()
home = Path(folder.name)
random = np.random.default_rng(0)
W = len(WORDS)  # 40
LONG = 96  # tokens: no text here is longer

# %% Good data, of which the truth is known
# A response is 8 to 20 words. Each word has a value, and the worth of a response is their sum.
# Whoever reads a response has an impression of it: its worth, plus a mood. The response with the
# better impression wins. If moods have Gumbel's distribution, then
#
#     P(first wins) = σ(worth of the first - worth of the second)
#
# which is the model of Bradley and Terry. Five responses to one prompt make ten comparisons. A
# response meets the same mood in all of its comparisons. Remember this for fault 4. The factor 1.4
# sets worth against moods: with it, two people agree on about .69 of the pairs.

values = 1.4 * World(annotators=("ana",), conflict=0.0).values()[0] / np.sqrt(14)  # (W,)


class Comparison(NamedTuple):
    """Two responses. margin: worth of the first minus that of the second; first_wins: (people,)."""

    prompt: str
    first: str
    second: str
    margin: float
    first_wins: np.ndarray


def text_of(words):
    return " " + " ".join(WORDS[i] for i in words) + "."


def compare(prompts, people=1, love_of_length=0.0):
    """Ten comparisons for each of so many prompts."""
    comparisons = []
    for _ in range(prompts):
        prompt = f"\n\nHuman:{text_of(random.integers(W, size=4))}\n\nAssistant:"
        lengths = random.integers(8, 21, size=5)
        responses = [random.integers(W, size=length) for length in lengths]
        worth = np.array([values[words].sum() for words in responses])  # (5,)
        mood = random.gumbel(size=(people, 5))
        impression = worth + love_of_length * lengths + mood
        for a, b in combinations(range(5), 2):
            texts = text_of(responses[a]), text_of(responses[b])
            first_wins = impression[:, a] > impression[:, b]
            comparisons.append(Comparison(prompt, *texts, worth[a] - worth[b], first_wins))
    return comparisons


def record_of(comparison, person=0, ending=""):
    """A line of a file, as one person sees it."""
    prompt, first, second, _, first_wins = comparison
    chosen, rejected = (first, second) if first_wins[person] else (second, first)
    return {"prompt": prompt, "chosen": chosen + ending, "rejected": rejected + ending}


def write(name, records):
    path = home / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


comparisons, new_comparisons = compare(100), compare(150)
good_file = write("good.jsonl", map(record_of, comparisons))
new_file = write("new.jsonl", map(record_of, new_comparisons))  # what the model is for

# %% A look
# This is `minimore data look good.jsonl` by its parts. A survey counts; rules ask what the labels
# follow; and what is too frequent is a finding. Good data have none.


def look(*paths, tokenizer=None, max_length=LONG):
    """Print the findings of some files, and between them; returns them by name."""
    surveys = [survey_of(path, tokenizer, max_length, chat=False) for path in paths]
    findings = [finding for survey in surveys for finding in findings_of(survey, rules_of(survey))]
    findings += [finding for between in all_between(surveys) for finding in between.findings]
    print("\n" + ", ".join(survey.name for survey in surveys))
    for line in map(str, findings or ["no findings"]):
        print(textwrap.fill(line, width=96, initial_indent="  ", subsequent_indent="      "))
    return {finding.name: finding for finding in findings}


findings_of_good = look(good_file)

# %% A small training
# A head reads how often each word occurs in a text, and each word behind each other word: 40 +
# 1,600 columns. It can hold the true taste exactly. It also has more columns than there are pairs,
# so it has room to learn pairs by heart, as large models have. Of a text it sees what a model sees:
# its tokens, and not more of them than --max-length.
#
# On new pairs it is right in about .68. Moods cannot be known, so no model is right in more than
# about .77.

NOTICE = (  # for fault 2
    " This is only general advice. Please ask someone who knows you well before you act on it. We"
    " cannot say what is right for you, since we do not know you."
)
texts = [text for c in comparisons for text in (c.prompt, c.first, c.second)]
train_tokenizer([*texts, *[NOTICE] * 20], home / "tokenizer.json")
tokenizer = Tokenizer(home)
tokens_of_words = tokenizer.encode([f" {word}" for word in WORDS])  # one token each
word_of_token = np.full(tokenizer.size, -1)
word_of_token[np.concatenate(tokens_of_words)] = np.arange(W)


def counts(ids):
    """Counts of the words, and of the neighbours, in the tokens of a text: (1640,)."""
    words = word_of_token[ids]
    words = words[words >= 0]
    neighbours = W * words[:-1] + words[1:]
    return np.concatenate([np.bincount(words, minlength=W), np.bincount(neighbours, None, W * W)])


def read(path, max_length=LONG, labels=AS_WRITTEN):
    return load_source("pairs", path, tokenizer, max_length, labels=labels)


def differences(source):
    """Chosen minus rejected, for every pair of a source: (N, 1640). Prompts cancel."""
    rows = [counts(pair.chosen) - counts(pair.rejected) for pair in source.pairs]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def train(rows, epochs=2, batch_size=20):
    """A head, trained on differences."""
    options = ProbeOptions(features="", epochs=epochs, batch_size=batch_size, learning_rate=0.03)
    return train_head([rows], "uniform", options, seed=0)[0]


def margins_of(rows, head):
    return (rows @ head).double().numpy()


class Lesson(NamedTuple):
    """What a head has learned from a file: its accuracy on these pairs, and on new ones."""

    head: torch.Tensor
    on_own: float
    on_new: float


def learn(path):
    rows = differences(read(path))
    head = train(rows)
    return Lesson(head, accuracy(margins_of(rows, head)), accuracy(margins_of(new, head)))


new = differences(read(new_file))
good = learn(good_file)
ceiling = probability(np.abs([c.margin for c in new_comparisons])).mean()
print(f"accuracy on new pairs {good.on_new:.3f}, at most {ceiling:.3f}; on own {good.on_own:.3f}")

# %% Fault 1: the labels are all one way round
# The accuracy is .5. The table has a column that says who won, and the script that exported it did
# not read it: the first response always gets the score 1. The training looks splendid all the same.
# A model can learn by heart what means nothing: it is right on about .95 of its own pairs.
#
# A file that was sorted by score looks like this, too, and nothing is wrong with it. So the finding
# is a question, and whoever wrote the file has the answer. With the column read, all is well.


def scored(comparison, scores):
    """A line of a file with a score for each response."""
    responses = [comparison.first, comparison.second]
    return {"prompt": comparison.prompt, "responses": responses, "scores": scores}


one_way_file = write("one_way.jsonl", [scored(c, [1, 0]) for c in comparisons])
winners = [[1, 0] if c.first_wins[0] else [0, 1] for c in comparisons]
winners_file = write("winners.jsonl", map(scored, comparisons, winners))
findings_of_one_way = look(one_way_file)
one_way, winners_read = learn(one_way_file), learn(winners_file)
print(f"accuracy on new pairs {one_way.on_new:.3f}, on its own pairs {one_way.on_own:.3f}")
print(f"with the column read: {winners_read.on_new:.3f} on new pairs")

# %% Fault 2: the responses are equal when cut
# The accuracy does not rise above .6. Half of the prompts ask for advice, and every answer to them
# ends with the same notice of 35 tokens. A reward is read at the end of a text, so long texts are
# cut on the left. At --max-length 32 nothing is left of either answer but the notice. The look must
# know the tokenizer to see that. It says besides that the prompts are gone.
#
# minimore counts such pairs and leaves them out. Where they stay in, they are half right for ever.
# The remedy is a larger --max-length, or to take the notice off.


def with_notices(some_comparisons):
    """Records in which the responses to every second prompt end with the notice."""
    endings = [NOTICE if i // 10 % 2 else "" for i in range(len(some_comparisons))]
    return [record_of(c, ending=ending) for c, ending in zip(some_comparisons, endings)]


notices_file = write("notices.jsonl", with_notices(comparisons))
new_notices_file = write("new_notices.jsonl", with_notices(new_comparisons[:1000]))
findings_of_cut = look(notices_file, tokenizer=tokenizer, max_length=32)
cut, new_cut = read(notices_file, max_length=32), read(new_notices_file, max_length=32)
print(cut.line())
cut_margins = margins_of(differences(new_cut), train(differences(cut)))
on_cut = accuracy([*cut_margins, *[0.0] * new_cut.identical])
whole = learn(notices_file)
print(f"accuracy on new pairs {on_cut:.3f}, with whole texts {whole.on_new:.3f}")

# %% Fault 3: the labels follow a length rule
# The accuracy is .86 on the test file, and .58 in use. The people who labelled were in haste, and
# liked what was long. The same people made the test file, which praises a model for the same haste.
# The look asks how often the longer response wins, before any model is there to be praised.
#
# One remedy: keep as many pairs in which the longer one wins as in which the shorter one does.
# Length then says nothing any more. The 230 pairs that are left teach more than the thousand did:
# about .64. It is not .68: they are few, and what nobody was asked, no computation brings back.


def words_more(record):
    """How many words the chosen response has more than the rejected one."""
    return len(record["chosen"].split()) - len(record["rejected"].split())


hasty_records = [record_of(c) for c in compare(100, love_of_length=1.0)]
hasty_file = write("hasty.jsonl", hasty_records)
hasty_test_file = write("hasty_test.jsonl", map(record_of, compare(100, love_of_length=1.0)))
findings_of_hasty = look(hasty_file)
shorter_wins = [record for record in hasty_records if words_more(record) < 0]
longer_wins = [record for record in hasty_records if words_more(record) > 0]
as_many = random.choice(len(longer_wins), size=len(shorter_wins), replace=False)
balanced_records = shorter_wins + [longer_wins[i] for i in as_many]
hasty, balanced = learn(hasty_file), learn(write("balanced.jsonl", balanced_records))
in_haste = accuracy(margins_of(differences(read(hasty_test_file)), hasty.head))
print(f"accuracy on the hasty test {in_haste:.3f}, on new pairs {hasty.on_new:.3f}")
print(f"with {len(balanced_records)} balanced pairs: {balanced.on_new:.3f} on new pairs")

# %% Fault 4: training and test share their prompts
# The accuracy is .82, and in use it is .70. Somebody shuffled 1,500 pairs and cut off 450 for the
# test. But ten pairs have the same five responses, and a response met the same mood in all of them.
# A model that has learned by heart which of the five were lucky knows the other answers.
#
# `minimore data split all.jsonl --output parts --test 0.3` lets no prompt cross. On new pairs the
# model does what it did before. Only the figure on its test has become true. Its interval is wider,
# because the pairs of a prompt share their responses: they are fewer than they look.

records = [record_of(c) for c in compare(150)]
shuffled = [records[i] for i in random.permutation(len(records))]
by_pair = write("by_pair.train.jsonl", shuffled[450:]), write("by_pair.test.jsonl", shuffled[:450])
all_file, parts = write("all.jsonl", records), home / "parts"
with contextlib.redirect_stdout(io.StringIO()):  # it prints how many lines each part has
    split(SplitOptions(file=all_file, output=str(parts), test=0.3))
by_prompt = str(parts / "train.jsonl"), str(parts / "test.jsonl")
findings_of_leak, findings_of_parts = look(*by_pair), look(*by_prompt)

table = Table("split", "accuracy on its test [95%]", "on new pairs")
on_test, new_after = {}, {}
for name, (train_path, test_path) in {"by pair": by_pair, "by prompt": by_prompt}.items():
    lesson, test = learn(train_path), read(test_path)
    prompts = [pair.prompt for pair in test.pairs]
    on_test[name], _ = intervals(margins_of(differences(test), lesson.head), prompts)
    new_after[name] = lesson.on_new
    table.add(name, with_interval(on_test[name].value, on_test[name][1:]), number(lesson.on_new))
print(table)

# %% Fault 5: every pair stands there in both orders
# The accuracy on the training pairs is .5, to the last digit. The file joins two exports of one
# table, and in one of them the columns are exchanged. Whatever a model says of a pair is right in
# one order, and wrong in the other. No computation finds out which export is right. A person does,
# who reads three pairs.


def exchanged(record):
    return record | {"chosen": record["rejected"], "rejected": record["chosen"]}


records = [record_of(c) for c in comparisons[:250]]
both_orders_file = write("both_orders.jsonl", records + [exchanged(record) for record in records])
findings_of_both_orders = look(both_orders_file)
both_orders = learn(both_orders_file)
print(f"accuracy on its own pairs {both_orders.on_own}")

# %% Not every contradiction is a mistake
# Now two people label the same pairs, each in moods of their own, and their files are joined. The
# look finds contradictions again, fewer than before, and duplicates besides. Together they say what
# happened: every pair stands there twice, and in about a third of them the two people disagree.
# Nobody was wrong. Such pairs belong in one record with "votes", in which the look finds no fault.

seen_by_four = compare(100, people=4)
by_two = [record_of(c, person) for person in (0, 1) for c in seen_by_four[:500]]
findings_of_two = look(write("two_people.jsonl", by_two))


def voted(comparison):
    """A line of a file with the votes of all people."""
    for_first = int(comparison.first_wins.sum())
    votes = [for_first, len(comparison.first_wins) - for_first]
    texts = {"chosen": comparison.first, "rejected": comparison.second}
    return {"prompt": comparison.prompt, **texts, "votes": votes}


votes_file = write("votes.jsonl", map(voted, seen_by_four))
findings_of_votes = look(votes_file)

# %% What votes are in the loss
# Let four people vote. If three of them prefer the chosen response, its share is t = 3/4. The loss
# is that of a soft target,
#
#     L = -t log σ(m) - (1 - t) log σ(-m)
#
# and this is the mean loss of the four votes, each a pair of its own: three one way round, one the
# other. It is least where σ(m) = 3/4. A majority makes of the same votes a pair with t = 1.

one = torch.ones(1)
soft_loss = pair_losses(0.8 * one, labels=Labels(share=0.75 * one, margin=0 * one, weight=one))
loss_of_votes = pair_losses(torch.tensor([0.8, 0.8, 0.8, -0.8])).mean()
print(f"\nloss of a soft target {soft_loss.item():.6f}, mean of four votes {loss_of_votes:.6f}")

# %% The label, the majority, the votes
# Three heads learn from the same pairs: from what the first person said; from the majority, which
# leaves out what is split two to two; and from all votes. They read words alone, so that nothing is
# learned by heart, and what differs comes from the labels. Four people judge them on new pairs.
#
# "as the truth" is the share of pairs that a head ranks as their true worth does: several opinions
# are better than one. T is the temperature that would mend a head; above 1, the head is too sure of
# itself. To the head of the majority three to one is as clear as four to none, so its margins are
# almost twice as large as they should be. The head of single labels has learned some chance as if
# it were taste. The head of the votes is right.


def majority_is_first(seen):
    """Whether most votes are for the first response, or half of them: (N,)."""
    return np.array([c.first_wins.sum() >= 2 for c in seen])


def first_person_agrees(seen):
    """Whether the first person prefers what the majority does: (N,)."""
    return np.array([c.first_wins[0] for c in seen]) == majority_is_first(seen)


soft_source = read(votes_file, labels=LabelRules(votes="soft"))
soft, soft_shares = differences(soft_source)[:, :W], torch.tensor(soft_source.shares)
for_chosen = (4 * soft_shares).round().long()  # (N,)
each_vote = [soft.repeat_interleave(for_chosen, 0), -soft.repeat_interleave(4 - for_chosen, 0)]
side = 2 * torch.tensor(first_person_agrees(seen_by_four)).float() - 1  # (N,) 1 or -1
lessons = {
    "one label": (side[:, None] * soft, 20),
    "majority": (soft[soft_shares > 0.5], 20),
    "four votes": (torch.cat(each_vote), 80),  # four rows a pair, so four times as many in a step
}

judges = compare(150, people=4)
judged_source = read(write("judged.jsonl", map(voted, judges)), labels=LabelRules(votes="soft"))
judged, shares = differences(judged_source)[:, :W], judged_source.shares
true_margin = np.array([c.margin for c in judges])
chosen_is_better = majority_is_first(judges) == (true_margin > 0)  # (N,)

table = Table("learned from", "as the truth", "NLL", "ECE", "T")
margins, as_truth, nll, ece, temperature = {}, {}, {}, {}, {}
for name, (rows, batch_size) in lessons.items():
    margins[name] = margins_of(judged, train(rows, epochs=8, batch_size=batch_size))
    as_truth[name] = accuracy(margins[name], chosen_is_better)
    nll[name] = negative_log_likelihood(margins[name], shares)
    ece[name] = pair_ece(margins[name], outcomes=shares)
    temperature[name] = fit_temperature(margins[name], shares)
    figures = (as_truth[name], nll[name], ece[name])
    table.add(name, *map(number, figures), number(temperature[name], 2))
print(f"\n{table}")

# %% What one label cannot say
# The head that learned from votes agrees with a person in about .77 of the pairs. Is that much? Two
# people agree in .69, and no rule could agree with more than .81 of these votes.
#
# Its Brier score is about .158. Let π be the probability that a person prefers the chosen response.
# Then the mean of π (1 - π) is the part of the score that no model can go below. Votes are enough
# to estimate it: about .157. In this world π is known, and that is also the true value. What is
# left for the model is about .001. It is wrong about nearly every fourth vote, and has next to
# nothing left to learn.
#
# One label a pair gives no such estimate: people who disagree and a model that errs look the same.

verdict = disagreement(margins["four votes"], shares, judged_source.votes)
pi = probability(true_margin)
true_floor = np.mean(pi * (1 - pi))
of_single_labels = disagreement(margins["four votes"], np.ones_like(shares), np.ones_like(shares))
print(f"\ntwo people agree in {verdict.annotators_agree:.3f} of the pairs,", end=" ")
print(f"model and person in {verdict.model_agrees:.3f}, at most {verdict.ceiling:.3f}")
print(f"Brier score {verdict.brier:.3f}: people's part {verdict.brier_floor:.3f}", end=" ")
print(f"(in truth {true_floor:.3f}), the model's {verdict.brier - verdict.brier_floor:.3f}")
print(f"the same from single labels: {of_single_labels}")

# %% How sure one is
# Judge the head of the majority twice on the same pairs: by the first person, and by all four. The
# second interval of its calibration error is about half as wide. Four times as many pairs with one
# label each would do that, too, but they would not say what the last cell said.

prompts = [pair.prompt for pair in judged_source.pairs]
_, by_one = intervals(margins["majority"], prompts, outcomes=first_person_agrees(judges))
_, by_four = intervals(margins["majority"], prompts, outcomes=shares)
print(f"\nECE less noise, by one label  {with_interval(by_one.value, by_one[1:])}")
print(f"               by four votes  {with_interval(by_four.value, by_four[1:])}")
folder.cleanup()

# %% What was claimed
assert not findings_of_good and not findings_of_parts and not findings_of_votes
assert 0.66 < good.on_new < 0.71 and 0.75 < ceiling < 0.79 and good.on_own > 0.9
assert findings_of_one_way["one way round"].cases == 1000
assert 0.45 < one_way.on_new < 0.55 and one_way.on_own > 0.9
assert winners_read.on_new == whole.on_new == good.on_new
assert len(tokenizer.file.encode(NOTICE).ids) == 35
assert set(findings_of_cut) == {"equal when cut", "prompt cut away"}
assert findings_of_cut["equal when cut"].cases == cut.identical == 500 and on_cut < 0.6
assert set(findings_of_hasty) == {"length rule"} and in_haste > 0.8
assert hasty.on_new + 0.03 < balanced.on_new < good.on_new
assert set(findings_of_leak) == {"shared prompts"}
flattered, honest = on_test["by pair"], on_test["by prompt"]
assert flattered.low > new_after["by pair"] + 0.04 and flattered.value > honest.value + 0.06
assert honest.low < new_after["by prompt"] < honest.high
assert abs(new_after["by pair"] - new_after["by prompt"]) < 0.03
assert honest.high - honest.low > flattered.high - flattered.low
assert findings_of_both_orders["contradictions"].cases == 500 and both_orders.on_own == 0.5
assert set(findings_of_two) == {"contradictions", "duplicates"}
assert 0.28 < findings_of_two["contradictions"].cases / 1000 < 0.38
assert torch.isclose(soft_loss, loss_of_votes)
assert as_truth["one label"] + 0.01 < min(as_truth["majority"], as_truth["four votes"])
assert nll["four votes"] == min(nll.values()) and ece["majority"] > 3 * ece["four votes"]
assert temperature["majority"] > 1.6 and abs(temperature["four votes"] - 1) < 0.15
assert temperature["one label"] > 1.15
assert verdict.annotators_agree + 0.04 < verdict.model_agrees < verdict.ceiling < 0.84
assert abs(verdict.brier_floor - true_floor) < 0.006 and of_single_labels is None
assert abs(verdict.brier - verdict.brier_floor) < 0.01
assert 0.4 < (by_four.high - by_four.low) / (by_one.high - by_one.low) < 0.65

# %% Two exercises
# Exercise 1. Turn a fifth of the labels of good.jsonl round, at random. What does it cost, and
#             which finding shows it? Then turn a fifth of all single votes round before they are
#             counted. What shows it now, and could it not have been the people?
# Exercise 2. Four votes on 1,000 pairs cost as much as one label on 4,000. Which of the two teaches
#             a head more? By which of them would you rather be judged?
