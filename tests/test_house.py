"""The house: every file has its place in one order, and imports only files before it."""

import ast
import doctest
import importlib

import pytest
from conftest import ROOT

PAGE = """
options files checksums tables units votes more calibration
uncertainty disagreement figures.plots figures.sketch figures.history figures.curves figures.plot
model.attention model.fused model.recompute model.model_config model.rotation model.trunk
model.config_json model.family_configs model.families model.bounds model.sandbox model.template
model.tokenizer model.tensors model.checkpoint
data.values data.dialogues data.messages data.records data.columns data.labels data.prompt_keys
data.forms
data.foreign.comparisons data.foreign.trees data.foreign.rows data.foreign.house
data.foreign.readers data.foreign.annotators data.foreign.fields data.foreign.proposal
data.foreign.shapes data.foreign.sift data.foreign.convert
data.texts data.pairs data.prompts data.overlap data.split data.sampling data.validation data.world
data.inspection.near_duplicates data.inspection.signs data.inspection.word_rule
data.inspection.survey data.inspection.findings data.inspection.between data.inspection.look
data.public.sources data.public.download data.public.changes data.public.manifest data.public.parts
data.public.get
reward temperature score opened report comparison evaluate
engine.trained engine.recipe engine.objective engine.storage engine.optim engine.plain
engine.distributed engine.host engine.streamed engine.workload engine.sizes engine.activations
engine.memory engine.flops engine.choose engine.plan engine.whole
metrics resume run best schedule training reward_training finish train
alignment.preference_losses
alignment.portions alignment.policy alignment.generate alignment.sample alignment.selection
alignment.language alignment.responses alignment.preference alignment.references
alignment.tuning alignment.comparisons alignment.preference_training alignment.finetune
alignment.perplexity
alignment.judges alignment.answers alignment.endpoint alignment.questions alignment.compare
lab.methods.states lab.methods.solve lab.methods.heads lab.methods.maxmin lab.methods.mean_variance
lab.methods.prototypes lab.methods.gated lab.methods.ensemble lab.methods.shrinkage
lab.methods.by_name
lab.features lab.solved lab.saved_head lab.probe lab.word_counts
lab.published lab.policies lab.best_of lab.association lab.scale_matters
lab.recipes lab.grid lab.drift lab.testbed lab.learners lab.cells lab.estimate lab.statistics
lab.scheme_tables
lab.stored lab.consistency lab.judge lab.agreement lab.learning_curves
lab.neighbours lab.finished lab.alignment_figures lab.figure7 lab.table1 lab.learned
lab.experiments lab.reproduce lab.verdict lab.trial lab.demo
lab.choosing.points lab.choosing.taste lab.choosing.asking lab.choosing.choose
exercises.expect exercises.learning_checks exercises.calibration_checks exercises.engine_checks
exercises.model_checks
exercises.catalogue exercises.blank exercises.judge exercises.exercise
check cli
"""  # one order; a line may be a wing, or a part of one
ORDER = PAGE.split()


def path_of(module):
    return (ROOT / "minimore").joinpath(*module.split(".")).with_suffix(".py")


def imports(module):
    """The modules of ours that a module imports, and the imports of ours inside its functions."""
    tree = ast.parse(path_of(module).read_text("utf-8"))
    package = module.split(".")[:-1]
    at_top = {node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    inside = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and node not in at_top
    ]
    found = set()
    for node in at_top:
        base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
        base = ".".join(part for part in base if part)
        if base in ORDER:
            found.add(base)
        else:  # `from . import plots`
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return found - {"__version__"}, inside


def test_every_file_has_its_place():
    files = (ROOT / "minimore").rglob("*.py")
    modules = {
        ".".join(file.relative_to(ROOT / "minimore").with_suffix("").parts)
        for file in files
        if not file.name.startswith("__")
    }
    assert modules == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_point_up_the_page(module):
    found, inside = imports(module)
    assert found <= set(ORDER[: ORDER.index(module)]), module
    assert not inside, "an import of ours inside a function"


@pytest.mark.parametrize("module", ORDER)
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"minimore.{module}")).failed == 0


def test_no_line_is_wider_than_a_hundred_characters():
    for folder in ("minimore", "tests", "tutorials"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
                assert len(line) <= 100, f"{file.relative_to(ROOT)}:{number}"
