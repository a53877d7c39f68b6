"""The end of a training: the model is written and evaluated, and a card says what it is."""

from typing import Any

from .best import write_best, write_which
from .data.validation import held_out_line
from .engine.distributed import is_first
from .files import write_json, write_text
from .metrics import final_accuracy
from .options import parse_sources, training_files
from .report import is_at_chance, table
from .reward_training import RewardTraining
from .run import BEST
from .tables import number
from .training import hold_as_stored, table_of_options, write_finished, write_weights


def finish(training: RewardTraining) -> None:
    """Write the finished model, and evaluate it on the test sources."""
    write_weights(training)
    hold_as_stored(training)
    report = training.report_on(training.test_sources) if training.test_sources else None
    validation = None
    if training.validation_sources:
        validation = training.report_on(training.validation_sources)
    if is_first():
        write_reports(training, report, validation)


def write_reports(
    training: RewardTraining, report: dict[str, Any] | None, validation: dict[str, Any] | None
) -> None:
    """Write the reports on the test sources and on what was held out; the run is finished."""
    run, options = training.run, training.options
    if report:
        print(table(report))
        held_out_groups = [name for name in report["sources"] if name not in training.names]
        if held_out_groups:
            print(f"never trained on: {', '.join(held_out_groups)}")
        write_json(run / "evaluation.json", report)
    if validation:
        print(f"held out for validation:\n{table(validation)}")
        write_json(run / "validation.json", validation)
    print_if_at_chance(training, report or validation)
    results = [section("Results on the test files", report, "No test file was given.")]
    if validation:
        results.append(section("Results on the prompts held out for validation", validation))
    write_text(run / "README.md", model_card(training, "\n\n".join(results)))
    if options.keep_best and validation:
        finish_best(training, validation)
    write_finished(training)


def print_if_at_chance(training: RewardTraining, report: dict[str, Any] | None) -> None:
    """Say that a run has ended at chance, and what to look at.

    report: on the TEST files or, without them, on what was held out. If there is none, the training
    pairs of the last steps show it: in a first epoch no step has learned them before.
    """
    final = final_accuracy(training.run / "metrics.jsonl")
    steps_are_at_chance = final is not None and abs(final.deviation) < 2
    if not (is_at_chance(report) if report else steps_are_at_chance):
        return
    accuracies = [f"{number(report['mean']['accuracy'])} on new pairs"] if report else []
    if final:
        accuracies.append(
            f"{number(final.accuracy)} on the {final.pairs} training pairs of the last"
            f" {final.steps} steps"
        )
    print(f"at chance: the accuracy is {' and '.join(accuracies)}; a coin has .500")
    print(f"  {remedy_of_chance(training, has_learned=bool(final and final.deviation > 3))}")
    paths = parse_sources(training.options.source, held_out_groups=True)
    files = " ".join(training_files(paths).values())
    print(f"  what the pairs are like: minimore data look {files}")


def remedy_of_chance(training: RewardTraining, has_learned: bool) -> str:
    """What to try; has_learned: whether the training pairs are far from chance."""
    if has_learned:
        return (
            "it learned its training pairs and nothing about new ones: try fewer --epochs, a"
            " smaller --learning-rate or more pairs, and look whether the test asks the same"
        )
    return (
        f"--learning-rate is {training.options.learning_rate:g}: try 10 times more if the loss has"
        " hardly moved, and 10 times less if it has jumped;"
        f" {training.schedule.steps} steps may be too few (--epochs)"
    )


def finish_best(training: RewardTraining, validation: dict[str, Any]) -> None:
    """Write the model of the best step, and say which it is; validation: that of the last one."""
    run, best = training.run, training.best
    if best is None:  # its checkpoint was removed after the last step
        print(f"{run}: has no best step, since its checkpoint is gone; it has no {BEST}/")
        return
    which = f"## Which step\n\nStep {best.step} of {training.schedule.steps}, by {best}."
    card = model_card(training, which)
    write_best(run, best, training.model.kind, training.options.save_dtype, card)
    write_which(run, best, training.schedule.steps, validation["mean"][best.by])


def section(title: str, report: dict[str, Any] | None, missing: str = "") -> str:
    """A report as a part of a model card."""
    return f"## {title}\n\n" + (f"```\n{table(report)}\n```" if report else missing)


def model_card(training: RewardTraining, results: str) -> str:
    """README.md of a finished model: what it is, on which data, with which options, how good.

    results: the sections that say how good.
    """
    options = training.options
    options_table = table_of_options(options, ("source", "output", "resume", "model"))
    lines = [f"- {source.line()}" for source in training.sources]
    for source, held_out in zip(training.sources, training.validation_sources):
        lines.append(f"- {source.name}: {held_out_line(source, held_out)}")
    lines += [
        f"- {source.name}: {len(source.pairs)} pairs, tested and never trained on"
        for source in training.test_sources
        if source.name not in training.names
    ]
    counts = "\n".join(lines)
    ends_with_eos = options.append_eos == "yes"
    eos_in_words = ", an EOS token behind the text" if ends_with_eos else ""
    eos_in_code = " + tokenizer.eos_token" if ends_with_eos else ""
    return f"""---
tags: [reward-model, minimore]
pipeline_tag: text-classification
---

# Reward model trained with minimore

Made from `{options.model}`. \
The reward is the one logit of `AutoModelForSequenceClassification`, read at the last token\
{eos_in_words}; \
sigmoid(difference of two rewards) is the probability that people prefer the first.

## Use

RUN is this directory.

```python
import minimore

model = minimore.load(RUN)
reward = model.score(prompt, response)
```

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(RUN)
model = AutoModelForSequenceClassification.from_pretrained(RUN)
inputs = tokenizer(prompt + response{eos_in_code}, return_tensors="pt")
reward = model(**inputs).logits[0, 0].item()
```

## Data

{counts}

{results}

## Options

{options_table}
"""
