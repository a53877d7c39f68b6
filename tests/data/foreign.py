"""Rows in the shapes of public preference sets, with made-up texts, and what they hold.

Each has the number of comparisons of two responses that a row makes, before any is left out.
"""

from typing import NamedTuple

Q, A, B = "What is 2+2?", "It is 4.", "It is 5."
USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", Q), ("assistant", A), ("assistant", B))
)


class Row(NamedTuple):
    """record: of the shape. house: what comes of it. comparisons: how many it makes."""

    record: dict
    house: list
    comparisons: int = 1


def pair(prompt, chosen, rejected, **others):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def scored(prompt, responses, scores, **others):
    return {"prompt": prompt, "responses": responses, "scores": scores, **others}


def rated(response, rating, score):
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    aspects = {name: {"Rating": rating, "Rationale": "so"} for name in names}
    return {"response": response, "annotations": aspects, "fine-grained_score": score}


def message(id, parent, text, role, rank=None, **others):
    return {
        "message_id": id, "parent_id": parent, "text": text, "role": role, "lang": "en",
        "rank": rank, "deleted": False, **others,
    }  # fmt: skip


TREE = message("p", None, Q, "prompter") | {
    "replies": [
        message("a", "p", A, "assistant", 0, replies=[]),
        message("b", "p", B, "assistant", 1, replies=[]),
        message("c", "p", "Dunno.", "assistant", replies=[]),
    ]
}
THREAD = f"\n\nHuman: {Q}\n\nAssistant:"
OASST = pair(THREAD, A, B, margin=1)
ASPECTS = ("overall", "instruction_following", "honesty", "truthfulness", "helpfulness")

# By shape; a shape may have several.
ROWS = {
    "pairs": [
        Row(pair(Q, A, B, subset="math"), [pair(Q, A, B, subset="math")]),
        Row({"chosen": THREAD + A, "rejected": THREAD + B}, [pair(THREAD, A, B)]),
        Row(pair(Q, [USER, GOOD], [USER, BAD]), [pair(Q, [USER, GOOD], [USER, BAD])]),
        Row(
            {"conversations": [{"from": "human", "value": Q}], "chosen": GOOD, "rejected": BAD},
            [pair([{"from": "human", "value": Q}], GOOD, BAD)],
        ),
        Row(  # RewardBench 2
            pair(Q, [A], [B, "6", "7"], num_correct=1, subset="Math"),
            [pair(Q, A, other, num_correct=1, subset="Math") for other in (B, "6", "7")],
            3,
        ),
        Row(pair(Q, A, B, votes=[3, 1]), [pair(Q, A, B, votes=[3, 1])]),
    ],
    "scored": [Row(scored(Q, [A, B, "6"], [2, 1, 1]), [scored(Q, [A, B, "6"], [2, 1, 1])], 3)],
    "text-score": [
        Row(
            {"text": [THREAD + A, THREAD + B], "score": [1, 0.5]},
            [scored(THREAD, [A, B], [1, 0.5])],
        )
    ],
    "oasst-tree": [Row({"message_tree_id": "p", "tree_state": "x", "prompt": TREE}, [OASST], 3)],
    "webgpt": [
        Row(
            {
                "question": {"dataset": "eli5", "full_text": Q, "id": "1"},
                "answer_0": A,
                "answer_1": B,
                "score_0": -0.5,
                "score_1": 0.5,
                "quotes_0": {},
                "tokens_0": {},
            },
            [scored(Q, [A, B], [-0.5, 0.5])],
        )
    ],
    "summarize": [
        Row(
            {
                "info": {"post": "Long.", "title": "T", "subreddit": "s", "article": None},
                "summaries": [{"text": " x", "policy": "p"}, {"text": " y", "policy": "p"}],
                "choice": 1,
                "worker": "w",
                "split": "valid1",
                "extra": {"confidence": None},
            },
            [
                pair(
                    "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:",
                    " y",
                    " x",
                    annotator="w",
                    split="valid1",
                )
            ],
        ),
        Row(
            {
                "info": {"article": "News."},
                "summaries": [{"text": "x"}, {"text": "y"}],
                "choice": 0,
            },
            [pair("News.\n\nTL;DR:", "x", "y")],
        ),
    ],
    "domains": [
        Row(
            {"query": Q, "responses": {"academy": A, "business": B, "normal": "6"}},
            [
                pair(Q, A, B, taste="academy"),
                pair(Q, A, "6", taste="academy"),
                pair(Q, B, A, taste="business"),
                pair(Q, B, "6", taste="business"),
            ],
            4,
        )
    ],
    "shp": [
        Row(
            {
                "history": Q,
                "human_ref_A": A,
                "human_ref_B": B,
                "labels": label,
                "domain": "askmath",
                "score_A": 5,
                "score_B": 3,
            },
            [pair(Q, *((A, B) if label else (B, A)), domain="askmath")],
        )
        for label in (1, 0)
    ],
    "pku-saferlhf": [
        Row(
            {
                "prompt": Q,
                "response_0": A,
                "response_1": B,
                "is_response_0_safe": True,
                "better_response_id": 1,
                "safer_response_id": 0,
            },
            [pair(Q, B, A, taste="better"), pair(Q, A, B, taste="safer")],
            2,
        )
    ],
    "ultrafeedback": [
        Row(
            {"instruction": Q, "completions": [rated(A, "5", 4.5), rated(B, "2", 2.0)]},
            [scored(Q, [A, B], [4.5, 2.0], taste="overall")]
            + [scored(Q, [A, B], [5, 2], taste=name) for name in ASPECTS[1:]],
            5,
        )
    ],
    "helpsteer2-preference": [
        Row(
            {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": strength},
            house,
        )
        for strength, house in (
            (-2, [pair(Q, A, B, margin=2)]),
            (1, [pair(Q, B, A, margin=1)]),
            (0, [scored(Q, [A, B], [0, 0])]),
        )
    ],
    "helpsteer3": [
        Row(
            {
                "domain": "general",
                "language": "english",
                "context": [USER],
                "response1": A,
                "response2": B,
                "overall_preference": 1,
                "individual_preference": [{"score": 2}, {"score": 1}, {"score": -1}, {"score": 0}],
            },
            [pair([USER], B, A, margin=1, votes=[2.5, 1.5], domain="general", language="english")],
        )
    ],
    "multipref": [
        Row(
            {
                "text": Q,
                "completion_a": A,
                "completion_b": B,
                "normal_worker_annotations": [
                    {"overall_pref": "B-is-clearly-better"},
                    {"overall_pref": "Tie"},
                ],
                "expert_worker_annotations": [
                    {"overall_pref": "B-is-slightly-better"},
                    {"overall_pref": "A-is-slightly-better"},
                ],
            },
            [pair(Q, B, A, votes=[2.5, 1.5])],
        )
    ],
    "prism": [
        Row(
            {
                "user_id": "u1",
                "conversation_history": [
                    {"turn": 0, "role": "user", "content": Q},
                    {"turn": 0, "role": "model", "content": A, "score": 90, "if_chosen": True},
                    {"turn": 0, "role": "model", "content": B, "score": 5, "if_chosen": False},
                    {"turn": 0, "role": "model", "content": "6", "score": 5, "if_chosen": False},
                    {"turn": 1, "role": "user", "content": "Why?"},
                    {"turn": 1, "role": "model", "content": "No.", "score": 4, "if_chosen": False},
                    {"turn": 1, "role": "model", "content": "So.", "score": 9, "if_chosen": True},
                ],
            },
            [
                scored([USER], [A, B, "6"], [90, 5, 5], annotator="u1"),
                scored(
                    [USER, GOOD, {"role": "user", "content": "Why?"}],
                    ["No.", "So."],
                    [4, 9],
                    annotator="u1",
                ),
            ],
            4,
        )
    ],
    "pandalm": [
        Row(
            {
                "instruction": "Add.",
                "input": "2+2",
                "response1": A,
                "response2": B,
                "annotator1": one,
                "annotator2": two,
                "annotator3": three,
            },
            house,
        )
        for one, two, three, house in (
            (1, 1, 2, [pair("Add.\n2+2", A, B, votes=[2, 1])]),
            (2, 0, 2, [pair("Add.\n2+2", B, A, votes=[2.5, 0.5])]),
            (1, 0, 2, [scored("Add.\n2+2", [A, B], [1.5, 1.5])]),
        )
    ],
    "two-outputs": [
        Row({"instruction": Q, "output_1": A, "output_2": B, "preference": preference}, house)
        for preference, house in (
            (1, [pair(Q, A, B)]),
            (2.0, [pair(Q, B, A)]),
            (1.75, [pair(Q, B, A, votes=[0.75, 0.25])]),
            (1.5, [scored(Q, [A, B], [0, 0])]),
            (0, [scored(Q, [A, B], [0, 0])]),
        )
    ],
    "arena": [
        Row(
            {
                "conversation_a": [USER, GOOD, USER, BAD],
                "conversation_b": [USER, BAD, USER, GOOD],
                "winner": winner,
                "judge": "j",
                "turn": 1,
                "language": "English",
            },
            house,
        )
        for winner, house in (
            ("model_b", [pair([USER], [BAD], [GOOD], annotator="j", language="English")]),
            (
                "tie (bothbad)",
                [scored([USER], [[GOOD], [BAD]], [0, 0], annotator="j", language="English")],
            ),
        )
    ],
    "openai": [
        Row(
            {
                "input": {"messages": [USER], "tools": []},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            },
            [pair([USER], [GOOD], [BAD])],
        )
    ],
    "alpaca": [
        Row(
            {"instruction": "Add.", "input": "2+2", "chosen": A, "rejected": B},
            [pair("Add.\n2+2", A, B)],
        ),
        Row({"instruction": "Add.", "input": "", "chosen": A, "rejected": B}, [pair("Add.", A, B)]),
    ],
    "orca": [
        Row(
            {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B},
            [pair([{"role": "system", "content": "Be brief."}, USER], A, B)],
        ),
        Row({"system": "", "question": Q, "chosen": A, "rejected": B}, [pair([USER], A, B)]),
    ],
    "rm-bench": [
        Row(
            pair(Q, ["a", "b", "c"], ["d", "e", "f"], domain="math", id=1),
            [
                pair(Q, chosen, rejected, domain="math", subset=level)
                for chosen, rejected, level in (
                    ("a", "d", "normal"),
                    ("a", "e", "hard"),
                    ("a", "f", "hard"),
                    ("b", "d", "easy"),
                    ("b", "e", "normal"),
                    ("b", "f", "hard"),
                    ("c", "d", "easy"),
                    ("c", "e", "easy"),
                    ("c", "f", "normal"),
                )
            ],
            9,
        )
    ],
}

MESSAGES = [
    message("p", None, Q, "prompter"),
    message("a", "p", A, "assistant", 0),
    message("b", "p", B, "assistant", 1),
    message("c", "p", "Dunno.", "assistant"),
    message("d", "a", "And 3+3?", "prompter"),
    message("e", "d", "6", "assistant", 1),
    message("f", "d", "Six.", "assistant", 0, deleted=True),
]
UNPAIRED = [  # as TRL's trainers of unpaired preferences read them
    {"prompt": Q, "completion": text, "label": label}
    for text, label in ((A, True), (B, False), ("Four.", True))
]
HELPSTEER = [
    {
        "prompt": Q, "response": response, "helpfulness": helpfulness, "correctness": 2,
        "coherence": 3, "complexity": 1, "verbosity": verbosity,
    }
    for response, helpfulness, verbosity in ((A, 4, 1), (B, 0, 1))
]  # fmt: skip
UKP = '#id\tlabel\ta1\ta2\narg1_arg2\ta2\t"No" <br/> it is.\tYes &amp; no.\n'
