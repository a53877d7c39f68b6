"""Public sets of preferences: where each lies, what is known of it, and what its records become.

A set is a few lines of description. What could not be checked when it was written is left out: a
set without a revision is taken as it is first met, and the commit it had stands in its manifest;
a file without a checksum is checked against the hub's own.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

CONVERTED = "refs/convert/parquet"  # where the hub keeps its own parquet copy of a dataset


class File(NamedTuple):
    """A file of a repository. size: bytes. None is what is not known."""

    path: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """One dataset of the hub as pairs.

    revision: the commit that is taken; None if none is known. branch: what is asked for then.
    train, test: its files. Without test files the set has no split of its own, and a share of its
    openings becomes the test set. train_records, test_records: how many records these files hold.
    shape: the shape of its records, of shapes.py; taste: which of the labels that they have.
    languages: of messages that are used; all, if there are none.
    paper: training and test pairs in the paper (arXiv 2312.07401, Table 3).
    """

    about: str
    repository: str
    licence: str
    revision: str | None = None
    branch: str = "main"
    train: tuple[File, ...]
    test: tuple[File, ...] = ()
    train_records: int | None = None
    test_records: int | None = None
    shape: str
    taste: str | None = None
    languages: tuple[str, ...] = ()
    paper: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[File, ...]:
        """All its files, those of the test set first."""
        return self.test + self.train


# ---- the paper's five ----------------------------------------------------------------------------

HH = "Anthropic/hh-rlhf"
HH_REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
CLEANED = (
    "the paper trains on files that others cleaned (github.com/Linear95/DSP, data/*.json), which"
    " `minimore data convert` reads; here are all official records"
)

HH_HELPFUL = PublicSet(
    about="which reply to a request is more helpful (helpful-base of Anthropic's HH)",
    repository=HH,
    revision=HH_REVISION,
    licence="MIT",
    train=(
        File(
            "helpful-base/train.jsonl.gz",
            "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
        ),
    ),
    test=(
        File(
            "helpful-base/test.jsonl.gz",
            "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
        ),
    ),
    train_records=43_835,
    test_records=2_354,
    shape="pairs",
    paper=(43_774, 2_352),
    notes=(CLEANED,),
)

HH_HARMLESS = PublicSet(
    about="which reply to a provoking request does less harm (harmless-base; offensive texts)",
    repository=HH,
    revision=HH_REVISION,
    licence="MIT",
    train=(
        File(
            "harmless-base/train.jsonl.gz",
            "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
        ),
    ),
    test=(
        File(
            "harmless-base/test.jsonl.gz",
            "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
            742_801,
        ),
    ),
    train_records=42_537,
    test_records=2_312,
    shape="pairs",
    paper=(42_537, 2_312),
)

OASST1 = PublicSet(
    about="volunteers' rankings of replies within a dialogue (OpenAssistant, English)",
    repository="OpenAssistant/oasst1",
    revision="fdf72ae0827c1cda404aff25b6603abec9e3399b",
    licence="Apache-2.0",
    train=(
        File(
            "2023-04-12_oasst_ready.messages.jsonl.gz",
            "286a6e9a5a413b3272ae9c0b5a20d327983dea1c24342ae28cb244a6da65185c",
            34_196_309,
        ),
    ),
    train_records=88_838,
    shape="oasst-messages",
    languages=("en",),
    paper=(18_165, 957),
    notes=(
        "the paper does not say how it made pairs of OASST1, so its sizes cannot be had",
        "the official split is in Parquet files alone, so the split is ours",
    ),
)

WEBGPT = PublicSet(
    about="graded comparisons of long answers with references (WebGPT)",
    repository="openai/webgpt_comparisons",
    branch=CONVERTED,
    licence="none stated",
    train=(File("default/train/0000.parquet"),),
    train_records=19_578,
    shape="webgpt",
    paper=(17_106, 901),
    notes=(CLEANED, "it has no split of its own, so the split is ours"),
)

SUMMARIZE = PublicSet(
    about="which summary of a Reddit post, or of a news article, is better",
    repository="openai/summarize_from_feedback",
    branch=CONVERTED,
    licence="none stated",
    train=(File("comparisons/train/0000.parquet"),),
    test=(File("comparisons/validation/0000.parquet"),),
    train_records=92_858,
    test_records=86_086,
    shape="summarize",
    paper=(92_858, 2_000),
    notes=("the paper takes 2,000 of the test pairs: --test-pairs 2000",),
)

# ---- where people disagree -----------------------------------------------------------------------

PKU = "PKU-Alignment/PKU-SafeRLHF"
PKU_REVISION = "9421ffafec3fa40a1f1a7d567b4d525079477ecb"
PKU_TRAIN = (
    File("data/Alpaca-7B/train.jsonl"),
    File("data/Alpaca2-7B/train.jsonl"),
    File(
        "data/Alpaca3-8B/train.jsonl",
        "21c3b4f2572444e42d161f09166471d14208c9e153fcc0ec900ae05013e47d4c",
    ),
)
PKU_TEST = tuple(File(f"data/{model}/test.jsonl") for model in ("Alpaca-7B", "Alpaca2-7B"))
PKU_TEST += (File("data/Alpaca3-8B/test.jsonl"),)

PKU_SAFER = PublicSet(
    about="which of two replies is safer (offensive texts); pku-better labels the same pairs",
    repository=PKU,
    revision=PKU_REVISION,
    licence="CC BY-NC 4.0",
    train=PKU_TRAIN,
    test=PKU_TEST,
    shape="pku-saferlhf",
    taste="safer",
)

PKU_BETTER = replace(
    PKU_SAFER,
    about="which of two replies is more helpful (offensive texts); pku-safer labels the same pairs",
    taste="better",
)

MULTIPREF = PublicSet(
    about="four annotators a pair, two of them experts: their votes",
    repository="allenai/multipref",
    revision="12910233a0238a997ebe425656e9dfed7b0ff031",
    licence="ODC-BY",
    train=(
        File(
            "MultiPref-Train.jsonl",
            "027072c52e39300c55ebc34265dda5ef2cfb1682edbc22b1a7d978c94776aaca",
            64_787_194,
        ),
    ),
    shape="multipref",
    notes=("it has no split of its own, so the split is ours",),
)

HELPSTEER3 = PublicSet(
    about="up to three annotators a pair of replies to a dialogue, in many languages: their votes",
    repository="nvidia/HelpSteer3",
    revision="f6d145777bcbde96137596340fab89793acd1031",
    licence="CC BY 4.0",
    train=(
        File(
            "preference/train.jsonl.gz",
            "32b52e1d378f8dab1e4c9ae549da49a5d6fc0875aeafe3f9139e6053beb906bb",
            106_484_475,
        ),
    ),
    test=(
        File(
            "preference/validation.jsonl.gz",
            "cd0d8b6efd7869a44c1b5ff91701232062555829b3c838abfd770d7dab6c7861",
            5_487_516,
        ),
    ),
    train_records=38_459,
    test_records=2_017,
    shape="helpsteer3",
)

PRISM = PublicSet(
    about="people of many countries, each rating several models' replies to their own dialogue",
    repository="HannahRoseKirk/prism-alignment",
    revision="18ab5cfb37456f4ec8cbc00212ce54cf7b1239f6",
    licence="CC BY 4.0 for what people wrote, CC BY-NC 4.0 for what models wrote",
    train=(
        File(
            "conversations.jsonl",
            "55ec67a194ca59d567b57acaeab813cb30abe801e73f9e495597a77ab674d638",
            60_331_783,
        ),
    ),
    train_records=8_011,
    shape="prism",
    notes=("it has no split of its own, so the split is ours; a person may be on both sides",),
)

SUBREDDITS = (
    "askacademia",
    "askanthropology",
    "askbaking",
    "askcarguys",
    "askculinary",
    "askdocs",
    "askengineers",
    "askhistorians",
    "askhr",
    "askphilosophy",
    "askphysics",
    "askscience",
    "asksciencefiction",
    "asksocialscience",
    "askvet",
    "changemyview",
    "explainlikeimfive",
    "legaladvice",
)

SHP = PublicSet(
    about="which of two replies to a Reddit post got more votes",
    repository="stanfordnlp/SHP",
    revision="e94b5f32602712d78ed494fe79105b1959396686",
    licence="none stated; scraped under the Reddit API's terms, and for helpfulness only",
    train=tuple(File(f"{subreddit}/train.json") for subreddit in SUBREDDITS),
    test=tuple(File(f"{subreddit}/test.json") for subreddit in SUBREDDITS),
    train_records=348_718,
    test_records=18_409,
    shape="shp",
    notes=("the validation files (18,436 records) are not used",),
)

ULTRAFEEDBACK = PublicSet(
    about="four models' replies to an instruction, scored by GPT-4",
    repository="openbmb/UltraFeedback",
    revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e",
    licence="MIT",
    train=tuple(
        File(f"{origin}.jsonl")
        for origin in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat")
    ),
    train_records=63_967,
    shape="ultrafeedback",
    taste="overall",
    notes=(
        "it has no split of its own, so the split is ours",
        "the score of a reply is the mean of its four ratings",
        "it holds the questions of TruthfulQA and FalseQA: no benchmark for what trains on it",
    ),
)

SETS = {
    "hh-helpful": HH_HELPFUL,
    "hh-harmless": HH_HARMLESS,
    "oasst1": OASST1,
    "webgpt": WEBGPT,
    "summarize": SUMMARIZE,
    "pku-safer": PKU_SAFER,
    "pku-better": PKU_BETTER,
    "multipref": MULTIPREF,
    "helpsteer3": HELPSTEER3,
    "prism": PRISM,
    "shp": SHP,
    "ultrafeedback": ULTRAFEEDBACK,
}
