"""Numbers that the paper prints (arXiv 2312.07401v5), to stand beside ours.

They are the authors' and were not reproduced here.
"""

from ..tables import Table

SOURCES = ("Helpful", "Harmless", "Oasst1", "Webgpt", "Summ.")

# Table 2: accuracy in percent on each source, the average as printed, ECE.
TABLE_2 = {
    "Pythia-1.4B": {
        "Raw": (52.38, 50.69, 51.25, 48.47, 51.06, 50.77, 0.1281),
        "Top": (67.81, 69.07, 62.43, 65.70, 62.56, 65.51, 0.0362),
        "Averaging": (55.73, 51.81, 57.68, 53.60, 55.50, 54.86, 0.0543),
        "MultiTask": (65.00, 64.57, 60.13, 66.00, 57.49, 62.38, 0.0541),
        "MORE": (64.07, 64.57, 62.43, 63.41, 62.22, 63.34, 0.0364),
    },
    "Pythia-2.8B": {
        "Raw": (54.59, 46.84, 52.92, 48.93, 51.36, 50.92, 0.1184),
        "Top": (68.06, 70.84, 60.86, 64.93, 62.33, 66.13, 0.0342),
        "Averaging": (58.80, 52.55, 59.03, 51.83, 51.70, 54.78, 0.0685),
        "MultiTask": (66.49, 66.73, 63.37, 64.48, 58.95, 64.00, 0.0456),
        "MORE": (65.39, 66.34, 63.58, 65.39, 59.39, 64.01, 0.0366),
    },
    "LLaMa2-7B": {
        "Raw": (49.78, 47.18, 51.15, 49.84, 49.88, 49.56, 0.1503),
        "Top": (73.08, 74.84, 63.58, 67.07, 68.65, 69.27, 0.0334),
        "Averaging": (61.90, 54.15, 56.21, 55.16, 63.60, 58.20, 0.0391),
        "MultiTask": (72.10, 72.70, 64.62, 71.95, 69.30, 70.13, 0.0570),
        "MORE": (71.93, 72.70, 65.88, 70.27, 70.85, 70.32, 0.0458),
    },
    "LLaMa2-13B": {
        "Raw": (50.71, 48.47, 50.35, 49.87, 49.18, 49.71, 0.1478),
        "Top": (75.29, 74.82, 65.98, 67.07, 71.18, 71.46, 0.0275),
        "Averaging": (56.04, 49.38, 56.41, 59.32, 45.96, 53.42, 0.0471),
        "MultiTask": (73.85, 73.91, 65.36, 71.98, 69.59, 70.90, 0.0561),
        "MORE": (73.80, 73.22, 64.95, 69.51, 70.14, 70.32, 0.0502),
    },
}


# Table 1: reward models of Helpful and Harmless: accuracy in percent, ECE; policies that were tuned
# on the best of 4: perplexity of preferred Helpful and Harmless responses; and in percent how often
# that of MORE wins, ties and loses against that of MultiTask by GPT-4. That the three are MORE's
# against MultiTask's is understood from the text. Alpaca itself has 15.48 and 12.71.
TABLE_1 = {
    "Pythia-1.4B": {
        "MultiTask": (64.79, 0.0177, 15.30, 8.22, None),
        "MORE": (64.32, 0.0109, 12.68, 8.42, (44, 22, 34)),
    },
    "Pythia-2.8B": {
        "MultiTask": (66.61, 0.0145, 16.76, 8.42, None),
        "MORE": (65.87, 0.0078, 13.14, 10.29, (45, 21, 34)),
    },
    "LLaMa2-7B": {
        "MultiTask": (72.40, 0.0284, 16.93, 8.69, None),
        "MORE": (72.32, 0.0143, 11.97, 9.96, (45, 23, 32)),
    },
}


def recomputed_average(row: tuple) -> float:
    """The mean of the five accuracies of a row of Table 2, in percent, two decimals."""
    return round(sum(row[:5]) / 5 + 1e-9, 2)


def table_2() -> str:
    """Table 2 as text; a * marks an average that is not the mean of its row, with that mean."""
    table = Table("", *SOURCES, "average", "ECE")
    for base, schemes in TABLE_2.items():
        for scheme, row in schemes.items():
            *accuracies, average, ece = row
            mean, cell = recomputed_average(row), f"{average:.2f}"
            if abs(mean - average) > 0.011:
                cell += f"* {mean:.2f}"
            cells = [f"{accuracy:.2f}" for accuracy in accuracies]
            table.add(f"{base} {scheme}", *cells, cell, f"{ece:.4f}")
    return (
        "the paper's Table 2, accuracy in percent;"
        f" * the printed average is not the mean of its row, which follows\n{table}"
    )


def table_1() -> str:
    """Table 1 as text."""
    columns = ("ppl Helpful", "ppl Harmless", "win/tie/lose against MultiTask")
    table = Table("", "accuracy", "ECE", *columns)
    for base, schemes in TABLE_1.items():
        for scheme, (accuracy, ece, helpful, harmless, verdicts) in schemes.items():
            shown = "/".join(map(str, verdicts)) if verdicts else None
            cells = [f"{value:.2f}" for value in (helpful, harmless)]
            table.add(f"{base} {scheme}", f"{accuracy:.2f}", f"{ece:.4f}", *cells, shown)
    return (
        "the paper's Table 1, accuracy and verdicts of GPT-4 in percent; MORE's perplexity is lower"
        f" on Helpful and higher on Harmless in all three\n{table}"
    )
