"""Which cells an experiment has. A cell is one training, or a model that is not trained at all.

A grid runs on the built-in ladder (small models in the synthetic world), or on real checkpoints and
files. Every cell is an ordinary run directory; `cells.py` runs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..data.world import World
from ..model.checkpoint import Checkpoint
from ..model.recompute import RECOMPUTE
from ..options import Range, check_ranges, option, parse_sources, require, require_tests
from ..reward import check_length, device_of
from ..reward_training import TrainOptions
from ..train import check_options
from .policies import FULL, QUICK, Design
from .recipes import CHOOSER, LEARNERS, RECIPES, table_1_recipes

# What may set uniform and MORE apart in the world: fields of World. In `sizes`, train_pairs are
# shares of --pairs. Small sources are resampled to as many pairs as the largest, up to 33 times
# each, for every scheme, as the paper resamples its own.
REGIMES: dict[str, dict[str, Any]] = {
    "mild": {},
    "conflict": {"conflict": 0.6},
    "revealed": {"conflict": 0.6, "reveal": True},
    "noise": {"decisiveness": (5.0, 4.0, 2.0, 0.7, 0.2)},
    "sizes": {"train_pairs": (1.0, 0.3, 0.1, 0.03, 0.03)},
    "ties": {"ties": 0.3},
    "reversed": {"reversed": "eve"},
}

# The TrainOptions that make a scheme. "raw" is not trained, "single" is one run a source.
SCHEMES: dict[str, dict[str, Any]] = {
    "raw": {},
    "single": {},
    "multitask": {"method": "proportional", "sampling": "proportional"},
    "uniform": {"method": "uniform"},
    "more": {"method": "more"},
    "more unscaled": {"method": "more", "normalize": "none"},
    "more per group": {"method": "more", "lambda_scope": "group"},
    "group dro": {"method": "group_dro"},
    "smoothing": {"method": "uniform", "label_smoothing": 0.1},
}
OTHER_SEED = 1000  # so many seeds apart are two models of one world
AUTHORS = {"lambda_scope": "group", "gradient_average": 0.99}  # --protocol authors: MORE's options

# Experiments in which policies are judged; in most, reward models choose what they learn from.
POLICY_EXPERIMENTS = ("figure7", "table1", "policies")
TWO_ANNOTATORS = ("ana", "ben")  # of table1

# Where they differ from those of the paper's grids: training pairs of a source, and seeds.
DEFAULT_PAIRS = {
    **{"figure7": 1600, "table1": 1600, "policies": 800},
    **{"methods": 800, "agreement": 3200, "curves": 3200},
}
DEFAULT_SEEDS = {
    **{"figure7": 5, "table1": 5, "policies": 5},
    **{"methods": 20, "agreement": 5, "curves": 20},
}
REGIMES_OF_TWO = ("mild", "conflict", "revealed", "ties")

PROTOCOLS = {
    "authors": "weights per group of one pair a source, gradient average .99, every test pair used,"
    " no temperature; not kept: their tokenizer ids, fp16 autocast, clipping, the first 40,000",
    "clean": "weights per step; a quarter of the test prompts is held out to fit temperatures, the"
    " rest is the test",
}


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """What `reproduce` takes.

    Without --model it runs on the ladder in the world; with it, on real checkpoints and --source
    files.
    """

    experiment: str = option(
        value="EXPERIMENT",
        choices=(
            *("table2", "regimes", "sources", "scaling", "drift", "figure7", "table1"),
            *("methods", "policies", "agreement", "curves"),
        ),
        positional=True,
        help="table2: schemes by size; regimes: where weights matter; sources: K = 2 to 5 (Fig. 6);"
        " scaling: sizes and amounts of data; drift: what rewards consist of; figure7: whether a"
        " lower ECE makes a better policy; table1: MultiTask against MORE, two sources; methods:"
        " how neighbouring work answers, on counts of the world's words; policies: with a reward"
        " model, or by dpo, mrpo, bapo, spo without; agreement: whether agreement among samples is"
        " a calibrated confidence; curves: which pairs teach how much",
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
    seeds: int | None = option(
        None,
        within=Range(least=1, most=1000),
        help="runs of every cell; in the world a seed is also another world (default: 3, of"
        " figure7, table1, policies and agreement 5, of methods and curves 20)",
    )
    first_seed: int = option(
        0,
        within=Range(least=0, most=OTHER_SEED - 1),
        help="seeds are numbered from here, so that a finished experiment can be asked again in"
        " other worlds",
    )
    width: tuple[int, ...] = option(
        (), repeat=True, help="ladder: once per width of the model (default: 16, 32 and 64)"
    )
    pairs: int | None = option(
        None,
        within=Range(least=1, most=10**7),
        help="training pairs of each source an epoch (default: 6400 in the world, of agreement"
        " and curves 3200, of figure7 and table1 1600, of methods and policies 800, 40000 else)",
    )
    test_pairs: int | None = option(
        None,
        within=Range(least=1, most=10**6),
        help="world: test pairs of each annotator (default: 1200, of figure7, table1 and policies"
        " 800, of agreement 400)",
    )
    regime: str = option(
        "conflict",
        choices=tuple(REGIMES),
        help="world: which one table2, sources, scaling, drift and policies use",
    )
    learning_rate: float | None = option(
        None, help="peak learning rate (default: 3e-3 on the ladder, else the paper's 1e-6)"
    )
    batch_size: int | None = option(None, help="pairs a step (default: 16 x sources)")
    max_length: int = option(512, help="tokens a text")
    micro_tokens: int = option(
        8192, within=Range(least=1, most=10**9), help="unique tokens computed at a time"
    )
    recompute: str = option("none", choices=RECOMPUTE, help="what is made again in backward")
    memory: str | None = option(
        None, value="24GB", help="what a training may take of the device's memory: see train"
    )
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    quick: bool = option(
        False, help="a cut of the ladder that takes a minute: one width, a tenth of the pairs"
    )
    allow_overlap: bool = option(
        False, help="training and test files are meant to share prompts: do not warn of it"
    )
    dry_run: bool = option(False, help="print the cells and the hours, and stop")

    def sizes(self) -> tuple[Any, ...]:
        """The sizes of models: checkpoints, or widths of the ladder."""
        if self.model:
            return self.model
        return self.width or ((16,) if self.quick else (16, 32, 64))

    def training_pairs(self) -> int:
        """Training pairs of each source an epoch."""
        if self.pairs is not None:
            return self.pairs
        if self.model:
            return 40_000
        pairs = DEFAULT_PAIRS.get(self.experiment, 6400)
        return pairs // 10 if self.quick else pairs

    def test_pair_count(self) -> int:
        """World: test pairs of each annotator."""
        if self.test_pairs is not None:
            return self.test_pairs
        if self.has_policies():
            return 120 if self.quick else 800
        if self.experiment == "agreement":
            return 40 if self.quick else 400
        return 1200

    def seed_count(self) -> int:
        """Runs of every cell."""
        if self.seeds is not None:
            return self.seeds
        if self.quick:
            return 3
        return DEFAULT_SEEDS.get(self.experiment, 3)

    def seed_range(self) -> range:
        """The seeds of every cell."""
        return range(self.first_seed, self.first_seed + self.seed_count())

    def says_how_cells_train(self) -> bool:
        """Whether an option is set that only an experiment made of cells looks at."""
        is_free = self.learning_rate is None and self.batch_size is None
        return not is_free or bool(self.scheme) or bool(self.width)

    def has_policies(self) -> bool:
        """Whether policies are judged in it."""
        return self.experiment in POLICY_EXPERIMENTS


Place = dict[str, Any]  # size, scheme and seed, and regime, K or pairs where an experiment has them
Files = dict[str, tuple[str, str]]  # name of a source -> its training and its test file


class Home(NamedTuple):
    """A world, and the directory in which it is written."""

    directory: Path
    world: World

    def files(self) -> Files:
        """The training and the test file of every annotator."""
        paths = self.world.paths(self.directory)
        return {name: (str(train), str(test)) for name, (train, test) in paths.items()}


@dataclass(frozen=True)
class Cell:
    """One training and its test margins.

    at: its place in the grid, by which tables are sorted. sources: what it is trained on; nothing
    for a raw model. tests: the test files whose margins are stored. options: of TrainOptions.
    world: where model and files come from, if they are not real. is_watched: take the margins apart
    while training. testbed: where the model chooses for a policy, if it does; design: how much that
    policy writes. learner: of recipes.LEARNERS, if it is a policy that is asked for.
    """

    at: Place
    model: Path | str
    sources: Files
    tests: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    world: World | None = None
    is_watched: bool = False
    testbed: Home | None = None
    design: Design = FULL
    learner: str | None = None

    @property
    def name(self) -> str:
        """Its place as the name of a file; a path in it is written with _ for /."""
        values = [str(value).strip("/").replace("/", "_") for value in self.at.values()]
        return "-".join(quote(value, safe=" ").replace(" ", "_") for value in values)


# ---- the places of an experiment -----------------------------------------------------------------


def cells_of(options: ReproduceOptions) -> list[Cell]:
    """The cells of an experiment, in the order in which they are run: one seed after the other."""
    places = PLACES[options.experiment](options)
    return [
        cell
        for seed in options.seed_range()
        for place in places
        for cell in cells_at(options, place | {"seed": seed})
    ]


def table2_places(options: ReproduceOptions) -> list[Place]:
    """Every scheme at every size."""
    schemes = options.scheme or ("raw", "single", "multitask", "uniform", "more")
    return _combinations(size=options.sizes(), scheme=schemes)


def regimes_places(options: ReproduceOptions) -> list[Place]:
    """Schemes of shared models in every regime, at the second size if there is one."""
    schemes = options.scheme or ("multitask", "uniform", "more", "group dro")
    return _combinations(regime=tuple(REGIMES), size=options.sizes()[:2][-1:], scheme=schemes)


def sources_places(options: ReproduceOptions) -> list[Place]:
    """Two to five sources, at the largest size."""
    most = min(5, len(options.source) or 5)
    schemes = options.scheme or ("uniform", "more")
    return _combinations(K=range(2, most + 1), size=options.sizes()[-1:], scheme=schemes)


def scaling_places(options: ReproduceOptions) -> list[Place]:
    """An eighth, half and all of the pairs at every size, the source hidden or revealed."""
    return _combinations(
        regime=("files",) if options.model else ("conflict", "revealed"),
        pairs=[int(options.training_pairs() * share) for share in (1 / 8, 1 / 2, 1)],
        size=options.sizes(),
        scheme=options.scheme or ("single", "uniform"),
    )


def drift_places(options: ReproduceOptions) -> list[Place]:
    """Schemes of shared models at the largest size."""
    schemes = options.scheme or ("uniform", "more", "group dro")
    return _combinations(size=options.sizes()[-1:], scheme=schemes)


def figure7_places(options: ReproduceOptions) -> list[Place]:
    """Every recipe of a reward model."""
    recipes = [recipe for recipe in RECIPES if recipe.quick or not options.quick]
    return [recipe.place(options.regime) for recipe in recipes]


def table1_places(options: ReproduceOptions) -> list[Place]:
    """MultiTask and MORE at every size."""
    return [recipe.place(options.regime) for recipe in table_1_recipes(options.sizes())]


def policies_places(options: ReproduceOptions) -> list[Place]:
    """Every way in which a policy learns."""
    return _combinations(learner=LEARNERS)


def _combinations(**values: Sequence[Any]) -> list[Place]:
    """All combinations of values, the last key changing first."""
    return [dict(zip(values, combination)) for combination in product(*values.values())]


PLACES: dict[str, Callable[[ReproduceOptions], list[Place]]] = {
    "table2": table2_places,
    "regimes": regimes_places,
    "sources": sources_places,
    "scaling": scaling_places,
    "drift": drift_places,
    "figure7": figure7_places,
    "table1": table1_places,
    "policies": policies_places,
}


# ---- the cells of a place ------------------------------------------------------------------------


def cells_at(options: ReproduceOptions, place: Place) -> list[Cell]:
    """The cells at one place of the grid: one, or for the scheme "single" one a source."""
    if "recipe" in place:
        return [choosing_cell(options, place)]
    if "learner" in place:
        return [learning_cell(options, place)]
    pairs = place.get("pairs", options.training_pairs())
    model, files, world = _materials(options, place, pairs)
    files = dict(list(files.items())[: place.get("K")])
    tests = {name: test for name, (_, test) in files.items()}
    common = _common_options(options, place, pairs)
    batch_size = 16 * len(files) if options.batch_size is None else options.batch_size
    scheme = place["scheme"]
    if scheme == "single":
        # A single model takes as many steps as a shared one in scaling, else a K-th of them.
        if options.experiment == "scaling":
            batch_size = max(1, batch_size // len(files))
        changes = {"method": "uniform", "batch_size": batch_size}
        return [
            Cell(
                at=place | {"scheme": f"single {name}"},
                model=model,
                sources={name: files[name]},
                tests=tests,
                options=common | changes,
                world=world,
            )
            for name in files
        ]
    changes = {"batch_size": batch_size} | scheme_options(options, scheme)
    cell = Cell(
        at=place,
        model=model,
        sources={} if scheme == "raw" else files,
        tests=tests,
        options=common | changes,
        world=world,
        is_watched=options.experiment == "drift",
    )
    return [cell]


def _materials(
    options: ReproduceOptions, place: Place, pairs: int
) -> tuple[Path | str, Files, World | None]:
    """The model and the files of a place, and the world that they come from, if any."""
    if options.model:
        return place["size"], parse_sources(options.source), None
    regime = place.get("regime", options.regime)
    home = home_of(options, regime, pairs, options.test_pair_count(), place["seed"])
    return home.directory / f"width-{place['size']}", home.files(), home.world


def home_of(options: ReproduceOptions, regime: str, pairs: int, test_pairs: int, seed: int) -> Home:
    """A world of this regime; pairs: training pairs of the largest source."""
    fields = REGIMES[regime]
    if options.experiment == "table1":
        fields = fields | {"annotators": TWO_ANNOTATORS}
    train_pairs = [max(2, int(share * pairs)) for share in fields.get("train_pairs", (1.0,))]
    changes = {"train_pairs": tuple(train_pairs), "test_pairs": test_pairs, "seed": seed}
    directory = Path(options.output) / "worlds" / f"{regime}-{pairs}-{seed}"
    return Home(directory, World(**(fields | changes)))


def scheme_options(options: ReproduceOptions, scheme: str) -> dict[str, Any]:
    """The TrainOptions that make a scheme under the protocol."""
    is_authors = options.protocol == "authors" and scheme == "more"
    return SCHEMES[scheme] | (AUTHORS if is_authors else {})


def choosing_cell(options: ReproduceOptions, place: Place) -> Cell:
    """A reward model of a recipe (recipes.py), which is tested in the world of the policies."""
    pairs, seed = options.training_pairs(), place["seed"]
    testbed = home_of(options, options.regime, pairs, options.test_pair_count(), seed)
    own_pairs = max(2, int(place["pairs"] * pairs))
    is_there = (place["regime"], own_pairs) == (options.regime, pairs)
    home = testbed if is_there else home_of(options, place["regime"], own_pairs, 1, seed)
    sources = dict(list(home.files().items())[: place["K"]])
    changes = {
        "batch_size": 16 * len(sources) if options.batch_size is None else options.batch_size,
        "pairs_per_source": max(2, int(place["seen"] * pairs)),
        "label_smoothing": place["smoothing"],
        "seed": seed + OTHER_SEED * place["again"],
    }
    return Cell(
        at=place,
        model=home.directory / f"width-{place['size']}",
        sources=sources,
        tests={name: test for name, (_, test) in testbed.files().items()},
        options=_common_options(options, place, pairs)
        | scheme_options(options, place["scheme"])
        | changes,
        world=home.world,
        testbed=testbed,
        design=QUICK if options.quick else FULL,
    )


def learning_cell(options: ReproduceOptions, place: Place) -> Cell:
    """A policy, and the plain reward model if that chooses what it learns from."""
    recipe = RECIPES[0].place(options.regime)
    cell = choosing_cell(options, recipe | {"seed": place["seed"]})
    has_model = place["learner"] == CHOOSER
    return replace(
        cell,
        at=place | {"size": recipe["size"]},
        sources=cell.sources if has_model else {},
        tests=cell.tests if has_model else {},
        learner=place["learner"],
    )


def _common_options(options: ReproduceOptions, place: Place, pairs: int) -> dict[str, Any]:
    """The TrainOptions that all schemes of a place share."""
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 1e-6 if options.model else 3e-3
    is_chosen_by_memory = options.memory is not None and options.recompute == "none"
    return {
        "learning_rate": learning_rate,
        "max_length": options.max_length,
        "seed": place["seed"],
        "micro_tokens": options.micro_tokens,
        "recompute": None if is_chosen_by_memory else options.recompute,
        "memory": options.memory,
        "device": options.device,
        "pairs_per_source": pairs,
        "log_steps": 100,
        "save_steps": 500,
    }


def train_options(output: Path, cell: Cell) -> TrainOptions:
    """The `train` command of a cell."""
    return TrainOptions(
        model=str(cell.model),
        output=str(output / "runs" / cell.name),
        resume=True,
        source=tuple(f"{name}={train}" for name, (train, _) in cell.sources.items()),
        **cell.options,
    )


# ---- checks --------------------------------------------------------------------------------------


def checked_cells(options: ReproduceOptions) -> list[Cell]:
    """The cells. Raises InputError for what cannot be run, before anything is written."""
    check_ranges(options)
    _check_widths(options)
    _check_experiment(options)
    _check_real_data(options)
    device_of(options)
    cells = cells_of(options)
    require(cells, f"{options.experiment}: takes at least two sources")
    for cell in cells:
        check_options(train_options(Path(options.output), cell), [*cell.sources] or ["all"])
    require(
        len({cell.name for cell in cells}) == len(cells),
        "two places of this grid have the same name; is a --model, --width or --scheme given"
        " twice?",
    )
    return cells


def _check_widths(options: ReproduceOptions) -> None:
    for width in options.width:
        require(16 <= width <= 4096, f"--width {width}: expected 16 to 4096")
        require(
            width % 8 == 0,
            f"--width {width}: expected a multiple of 8 (four heads, which rotate by pairs)",
        )


def _check_experiment(options: ReproduceOptions) -> None:
    """Refuse what an experiment cannot do."""
    pairs = options.training_pairs()
    require(
        options.experiment != "scaling" or pairs >= 8,
        f"--pairs {pairs}: scaling takes an eighth of them; expected at least 8",
    )
    is_one_world = options.regime != "reversed" and not {"raw", "single"} & set(options.scheme)
    require(
        options.experiment != "drift" or is_one_world,
        "drift: is followed while one model learns from all sources, in a world without a reversed"
        " one; expected other schemes and regimes",
    )

    if options.has_policies():
        _check_policies(options)


def _check_policies(options: ReproduceOptions) -> None:
    """Refuse options that an experiment with policies sets itself."""
    name = options.experiment
    require(not options.scheme, f"{name}: has schemes of its own; expected no --scheme")
    if name in ("figure7", "policies"):
        require(not options.width, f"{name}: has widths of its own; expected no --width")
        regimes = tuple(regime for regime in REGIMES if "reversed" not in REGIMES[regime])
    else:
        regimes = REGIMES_OF_TWO
    require(
        options.regime in regimes,
        f"{name}: policies live in a world of regime {', '.join(regimes)}; got --regime"
        f" {options.regime}",
    )


def _check_real_data(options: ReproduceOptions) -> None:
    """Refuse --model without --source, with options of the ladder, or with files not there."""
    require(
        bool(options.model) == bool(options.source),
        "--model and --source go together: real checkpoints with real data, or neither for the"
        " ladder in the world",
    )
    if not options.model:
        return
    require(
        options.experiment not in ("regimes", "drift", *POLICY_EXPERIMENTS),
        f"{options.experiment}: exists in the world only",
    )
    require(
        not options.width and not options.quick,
        "--width and --quick are of the ladder, not of --model",
    )
    require_tests(parse_sources(options.source))
    for model in options.model:
        checkpoint = Checkpoint(model)
        check_length(checkpoint.config, options.max_length, checkpoint.directory, beyond=None)
