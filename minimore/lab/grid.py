"""A grid of runs: which cells an experiment has, and running one. Finished cells are skipped, so a grid survives kills.

On the built-in ladder (small models in the synthetic world) or on real checkpoints and files. Every cell is an ordinary run directory; its
margins on every test pair are kept, and all tables are made of these.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..data.pairs import load_source
from ..data.records import read_records, record_pairs
from ..data.world import World, small_gpt_neox
from ..files import write_json
from ..model.checkpoint import Checkpoint, random_checkpoint
from ..model.recompute import RECOMPUTE
from ..model.tensors import write_tensors
from ..options import InputError, option, parse_sources, require_tests
from ..report import source_margins
from ..reward import ModelOptions, check_length, device_of, open_reward_model
from ..train import TrainOptions, check_options, train

# What may set uniform and MORE apart in the world. In `sizes` small sources are resampled to as many pairs as the largest, up to 33 times each, for every
# scheme, as the paper resamples its own.
REGIMES = {
    "mild": {},
    "conflict": dict(conflict=0.6),
    "revealed": dict(conflict=0.6, reveal=True),
    "noise": dict(decisiveness=(5.0, 4.0, 2.0, 0.7, 0.2)),
    "sizes": dict(train_pairs=(1.0, 0.3, 0.1, 0.03, 0.03)),
    "ties": dict(ties=0.3),
    "reversed": dict(reversed="eve"),
}
SCHEMES = {  # name: TrainOptions that make it; "raw" is not trained, "single" is one run a source
    "raw": {},
    "single": {},
    "multitask": dict(method="proportional", sampling="proportional"),
    "uniform": dict(method="uniform"),
    "more": dict(method="more"),
    "more per group": dict(method="more", lambda_scope="group"),
    "group dro": dict(method="group_dro"),
    "smoothing": dict(method="uniform", label_smoothing=0.1),
}
AUTHORS = dict(
    lambda_scope="group", gradient_average=0.99
)  # what --protocol authors changes in MORE
PROTOCOLS = {
    "authors": "weights per group of one pair a source, gradient average .99, every test pair used, no temperature; not kept: their tokenizer ids, fp16 autocast, clipping, the first 40,000",
    "clean": "weights per step; a quarter of the test prompts is held out to fit temperatures, the rest is the test",
}
HELD_OUT = 4  # of so many test prompts, one fits temperatures


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """What `reproduce` takes. Without --model it runs on the ladder in the world; with it, on real checkpoints and --source files."""

    experiment: str = option(
        value="EXPERIMENT",
        choices=("table2", "regimes", "sources", "scaling", "drift"),
        positional=True,
        help="table2: schemes by size; regimes: where weights matter; sources: K = 2 to 5 (Fig. 6); scaling: sizes and amounts of data; drift: what rewards consist of",
    )
    output: str = option(value="DIR", help="directory of the grid; the same command continues it")
    model: tuple[str, ...] = option(
        (), repeat=True, value="DIR|HUB", help="real checkpoint, once per size"
    )
    source: tuple[str, ...] = option(
        (),
        repeat=True,
        value="NAME=TRAIN,TEST",
        help="real data, once per source, with a test file",
    )
    scheme: tuple[str, ...] = option(
        (),
        repeat=True,
        choices=tuple(SCHEMES),
        help="once per scheme (default: raw, single, multitask, uniform, more)",
    )
    protocol: str = option(
        "clean", choices=tuple(PROTOCOLS), help="which of the authors' choices are kept; printed"
    )
    seeds: int = option(3, help="runs of every cell; in the world a seed is also another world")
    width: tuple[int, ...] = option(
        (), repeat=True, help="ladder: once per width of the model (default: 16, 32 and 64)"
    )
    pairs: int | None = option(
        None, help="training pairs of each source an epoch (default: 6400 in the world, 40000 else)"
    )
    test_pairs: int = option(1200, help="world: test pairs of each annotator")
    regime: str = option(
        "conflict",
        choices=tuple(REGIMES),
        help="world: which one table2, sources, scaling and drift use",
    )
    learning_rate: float | None = option(
        None, help="peak learning rate (default: 3e-3 on the ladder, else the paper's 1e-6)"
    )
    batch_size: int | None = option(None, help="pairs a step (default: 16 x sources)")
    max_length: int = option(512, help="tokens a text")
    micro_tokens: int = option(8192, help="unique tokens computed at a time")
    recompute: str = option("none", choices=RECOMPUTE, help="what is made again in backward")
    memory: str | None = option(
        None, value="24GB", help="what a training may take of the device's memory: see train"
    )
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    quick: bool = option(
        False, help="a cut of the ladder that takes a minute: one width, a tenth of the pairs"
    )
    dry_run: bool = option(False, help="print the cells and the hours, and stop")


@dataclass(frozen=True)
class Cell:
    """One training and its test margins. at: its place in the grid, and what tables are sorted by."""

    at: dict  # size, scheme, seed, and regime, K or pairs
    model: Path | str
    sources: dict[str, tuple[str, str]]  # trained on
    tests: dict[str, str]  # margins of these
    options: dict = field(default_factory=dict)  # of TrainOptions
    world: World | None = None
    watched: bool = False  # decompose the margins while training

    @property
    def name(self) -> str:
        return "-".join(quote(str(v), safe=" ").replace(" ", "_") for v in self.at.values())


# ---- planning --------------------------------------------------------------------------------------------------------------


def plan(o: ReproduceOptions) -> list[Cell]:
    """The cells of an experiment, in the order in which they are run: one seed after the other."""
    schemes, widths = o.scheme or ("raw", "single", "multitask", "uniform", "more"), sizes_of(o)
    grids = {
        "table2": lambda: [dict(size=w, scheme=s) for w, s in product(widths, schemes)],
        "regimes": lambda: [
            dict(regime=r, size=widths[min(1, len(widths) - 1)], scheme=s)
            for r, s in product(REGIMES, o.scheme or ("multitask", "uniform", "more", "group dro"))
        ],
        "sources": lambda: [
            dict(K=k, size=w, scheme=s)
            for k, w, s in product(
                range(2, min(5, len(o.source) or 5) + 1),
                widths[-1:],
                o.scheme or ("uniform", "more"),
            )
        ],
        "scaling": lambda: [
            dict(regime=r, pairs=int(_pairs(o) * share), size=w, scheme=s)
            for r, share, w, s in product(
                ("files",) if o.model else ("conflict", "revealed"),
                (1 / 8, 1 / 2, 1),
                widths,
                o.scheme or ("single", "uniform"),
            )
        ],
        "drift": lambda: [
            dict(size=w, scheme=s)
            for w, s in product(widths[-1:], o.scheme or ("uniform", "more", "group dro"))
        ],
    }
    return [
        cell
        for seed in range(o.seeds)
        for at in grids[o.experiment]()
        for cell in _cells(o, at | dict(seed=seed))
    ]


def sizes_of(o: ReproduceOptions) -> tuple:
    """The sizes of an experiment: checkpoints, or widths of the ladder."""
    return o.model or o.width or ((16,) if o.quick else (16, 32, 64))


def _pairs(o):
    return o.pairs if o.pairs is not None else 40_000 if o.model else 640 if o.quick else 6400


def _cells(o, at):
    """The runs behind one place of the grid: one, or one a source for "single"."""
    pairs, world = at.get("pairs", _pairs(o)), None
    if o.model:
        model, files = (
            at["size"],
            {name: (a, b) for name, (a, b) in parse_sources(o.source).items()},
        )
    else:
        fields = REGIMES[at.get("regime", o.regime)]
        shares = fields.get("train_pairs", (1.0,))
        world = World(
            **fields
            | dict(
                train_pairs=tuple(max(2, int(s * pairs)) for s in shares),
                test_pairs=o.test_pairs,
                seed=at["seed"],
            )
        )
        home = Path(o.output) / "worlds" / f"{at.get('regime', o.regime)}-{pairs}-{at['seed']}"
        model, files = (
            home / f"width-{at['size']}",
            {name: tuple(map(str, ab)) for name, ab in world.paths(home).items()},
        )
    names = list(files)[: at.get("K")]
    tests = {name: files[name][1] for name in names}
    batch = 16 * len(names) if o.batch_size is None else o.batch_size
    common = dict(
        learning_rate=o.learning_rate if o.learning_rate is not None else 1e-6 if o.model else 3e-3,
        max_length=o.max_length,
        seed=at["seed"],
        micro_tokens=o.micro_tokens,
        recompute=o.recompute if o.memory is None or o.recompute != "none" else None,
        memory=o.memory,
        device=o.device,
        pairs_per_source=pairs,
        log_steps=100,
        save_steps=500,
    )
    if at["scheme"] == "single":
        own = (
            max(1, batch // len(names)) if o.experiment == "scaling" else batch
        )  # as many steps as shared models, or a K-th of them
        return [
            Cell(
                at | dict(scheme=f"single {name}"),
                model,
                {name: files[name]},
                tests,
                common | dict(method="uniform", batch_size=own),
                world,
            )
            for name in names
        ]
    if at["scheme"] == "raw":
        return [Cell(at, model, {}, tests, common | dict(batch_size=batch), world)]
    changes = SCHEMES[at["scheme"]] | (
        AUTHORS if o.protocol == "authors" and at["scheme"] == "more" else {}
    )
    return [
        Cell(
            at,
            model,
            {name: files[name] for name in names},
            tests,
            common | dict(batch_size=batch) | changes,
            world,
            o.experiment == "drift",
        )
    ]


def prepare(cell: Cell):
    """Write the cell's world and its model, once; what a kill left half-made is made again."""
    if cell.world is None:
        return
    model, home = Path(cell.model), Path(cell.model).parent
    if not home.exists():
        shutil.rmtree(home.with_suffix(".partial"), ignore_errors=True)
        cell.world.write(home.with_suffix(".partial"))
        home.with_suffix(".partial").rename(home)
    if not model.exists():
        shutil.rmtree(model.with_suffix(".partial"), ignore_errors=True)
        random_checkpoint(
            model.with_suffix(".partial"),
            small_gpt_neox(int(model.name.split("-")[1])),
            home / "tokenizer.json",
            cell.world.seed,
        )
        model.with_suffix(".partial").rename(model)


def check_plan(o: ReproduceOptions) -> list[Cell]:
    """The cells, or an InputError for what cannot be run, before anything is written."""
    for name, value, most in (
        ("seeds", o.seeds, 1000),
        ("pairs", _pairs(o), 10**7),
        ("test-pairs", o.test_pairs, 10**6),
        ("micro-tokens", o.micro_tokens, 10**9),
        *(("width", w, 4096) for w in o.width),
    ):
        if not 1 <= value <= most:
            raise InputError(f"--{name} {value}: expected 1 to {most}")
    if o.experiment == "scaling" and _pairs(o) < 8:
        raise InputError(
            f"--pairs {_pairs(o)}: scaling takes an eighth of them; expected at least 8"
        )
    if any(w % 8 for w in o.width):
        raise InputError(
            f"--width {next(w for w in o.width if w % 8)}: expected a multiple of 8 (four heads, which rotate by pairs)"
        )
    if o.experiment == "drift" and (o.regime == "reversed" or {"raw", "single"} & set(o.scheme)):
        raise InputError(
            "drift: is followed while one model learns from all sources, in a world without a reversed one; expected other schemes and regimes"
        )
    if bool(o.model) != bool(o.source):
        raise InputError(
            "--model and --source go together: real checkpoints with real data, or neither for the ladder in the world"
        )
    if o.model and o.experiment in ("regimes", "drift"):
        raise InputError(f"{o.experiment}: exists in the world only")
    if o.model and (o.width or o.quick):
        raise InputError("--width and --quick are of the ladder, not of --model")
    if o.model:
        require_tests(parse_sources(o.source))
        for model in o.model:
            check_length(
                (checkpoint := Checkpoint(model)).config, o.max_length, checkpoint.directory
            )
    device_of(o)
    cells = plan(o)
    if not cells:
        raise InputError(f"{o.experiment}: takes at least two sources")
    for cell in cells:
        check_options(train_options(Path(o.output), cell), max(1, len(cell.sources)))
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError(
            "two places of this grid have the same name; is a --model, --width or --scheme given twice?"
        )
    return cells


# ---- running ---------------------------------------------------------------------------------------------------------------


def fingerprint(cell: Cell) -> str:
    """What the margins of a cell depend on: options, and for real data the content of files and the identity of the model."""
    content = (
        []
        if cell.world
        else [
            Checkpoint(str(cell.model)).identity(),
            *(_digest(p) for p in (*cell.tests.values(), *(a for a, _ in cell.sources.values()))),
        ]
    )
    return json.dumps(
        [
            cell.options | dict(device="", micro_tokens=0, recompute="", memory=""),
            list(cell.sources),
            list(cell.tests),
            str(cell.world),
            content,
        ]
    )


@cache
def _digest(path):
    files = (
        sorted(p for p in Path(path).rglob("*") if p.is_file())
        if Path(path).is_dir()
        else [Path(path)]
    )
    return hashlib.sha256(
        b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)
    ).hexdigest()


def is_finished(out: Path, cell: Cell) -> bool:
    """Whether the margins of exactly this cell are there, and its drift if it is followed."""
    try:
        with safe_open(out / "margins" / f"{cell.name}.safetensors", framework="np") as file:
            return (file.metadata() or {}).get("of") == fingerprint(cell) and (
                not cell.watched or _drift_file(out, cell).is_file()
            )
    except (SafetensorError, OSError):
        return False


def _drift_file(out, cell):
    return out / "margins" / f"{cell.name}.drift.json"


def train_options(out: Path, cell: Cell) -> TrainOptions:
    """The `train` command of a cell."""
    return TrainOptions(
        model=str(cell.model),
        output=str(out / "runs" / cell.name),
        resume=True,
        source=tuple(f"{n}={a}" for n, (a, _) in cell.sources.items()),
        **cell.options,
    )


def run_cell(out: Path, cell: Cell) -> int:
    """Train a cell, unless it is finished, and store its margins; its log goes beside its run directory. Returns train's exit code."""
    if is_finished(out, cell):
        return 0
    prepare(cell)
    options = train_options(out, cell)
    run, log = (
        Path(options.output if cell.sources else cell.model),
        out / "runs" / f"{cell.name}.log",
    )
    log.parent.mkdir(exist_ok=True)
    (out / "margins").mkdir(exist_ok=True)
    if cell.watched and run.exists():  # a run that is continued has forgotten what it was before
        shutil.rmtree(run)
    drift = []
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file):
        code = train(options, _watch(cell, drift) if cell.watched else None) if cell.sources else 0
        if code:
            return code
        model, checkpoint = open_reward_model(
            ModelOptions(model=str(run), device=options.device, seed=options.seed)
        )
        tensors = {}
        for k, (name, path) in enumerate(cell.tests.items()):
            source = load_source(name, path, checkpoint.tokenizer, options.max_length)
            tensors |= {
                f"margins.{k}": torch.from_numpy(
                    source_margins(model, source, options.micro_tokens)
                ),
                f"prompt.{k}": torch.tensor([p.prompt for p in source.pairs]),
                f"index.{k}": torch.tensor([p.index for p in source.pairs]),
            }
    if drift:
        write_json(_drift_file(out, cell), drift)
    write_tensors(out / "margins" / f"{cell.name}.safetensors", tensors, {"of": fingerprint(cell)})
    return 0


def _watch(cell: Cell, found: list) -> Callable:
    """Decompose the model's margins at eighths of a run, on the first 300 test pairs of every annotator."""
    texts = {
        name: [
            pair for where, record in read_records(path) for pair in record_pairs(record, where)[0]
        ][:300]
        for name, path in cell.tests.items()
    }
    loaded = {}

    def watch(step, steps, model):
        if step % max(1, steps // 8):
            return
        if not loaded:
            tokenizer = Checkpoint(str(cell.model)).tokenizer
            loaded.update(
                {name: load_source(name, path, tokenizer, 512) for name, path in cell.tests.items()}
            )
        parts = []
        for k, (name, pairs) in enumerate(texts.items()):
            source = replace(loaded[name], pairs=loaded[name].pairs[: len(pairs)])
            d = cell.world.decompose(
                source_margins(model, source, 8192), pairs[: len(source.pairs)]
            )
            parts.append(
                [d.shared, float(d.drift[k]), d.shared_share, d.drift_share, d.other_share]
            )
        found.append(
            {
                "step": step,
                "of": steps,
                "mean": [None if math.isnan(x) else x for x in np.mean(parts, 0)],
            }
        )

    return watch


def margins_of(out, cell, o) -> dict:
    """{source: (margins, whether each is a test pair, its prompt)}, (N,) each; those that are none fit temperatures."""
    found = {}
    with safe_open(out / "margins" / f"{cell.name}.safetensors", framework="np") as file:
        for k, name in enumerate(cell.tests):
            m, prompt = file.get_tensor(f"margins.{k}"), file.get_tensor(f"prompt.{k}")
            test = (
                prompt % HELD_OUT != 0
                if o.protocol == "clean" and len(np.unique(prompt)) >= HELD_OUT
                else np.ones(len(m), bool)
            )
            found[name] = m, test, prompt
    return found


def hours(o, cells) -> float:
    """A rough estimate: 6 flops a parameter and token for training, 2 for scoring, at the measured speed of a matrix product."""
    on_gpu = device_of(o) == "cuda"
    n, flops = (4096 if on_gpu else 512), 0
    a = torch.randn(n, n).to("cuda", torch.bfloat16) if on_gpu else torch.randn(n, n)
    a @ a
    began = time.monotonic()
    while time.monotonic() - began < 0.1:
        float((a @ a)[0, 0])  # waits for a GPU, too
        flops += 2 * n**3
    speed, seconds, sizes = 0.5 * flops / (time.monotonic() - began), 0.0, {}
    for cell in cells:
        if str(cell.model) not in sizes:
            c = Checkpoint(str(cell.model)).config if cell.world is None else None
            sizes[str(cell.model)] = (
                24 * cell.at["size"] ** 2
                if c is None
                else c.blocks
                * (
                    2 * c.width * c.head_width * (c.heads + c.kv_heads)
                    + (3 if c.gated else 2) * c.width * c.mlp_width
                )
            )
        pairs, tokens = (
            cell.options["pairs_per_source"] * len(cell.sources),
            60 if cell.world else min(o.max_length, 400),
        )
        seconds += (
            pairs / cell.options["batch_size"] * 0.02
            + pairs * tokens * 6 * sizes[str(cell.model)] / speed
        )
        seconds += (
            sum(o.test_pairs for _ in cell.tests) * tokens * 2 * sizes[str(cell.model)] / speed + 1
        )
    return seconds / 3600
