"""The pages are true: commands parse, tables name what exists, code runs, printed pages are so."""

import importlib
import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT

from minimore.cli import VERBS, build_parser, main
from minimore.data.world import World

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "minimore").rglob("README.md"))]
}


def commands():
    """Every line of the shell blocks of all pages, backslash continuations joined."""
    for page in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", page, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line


def test_commands_parse():
    verbs = set()
    for command in commands():
        for part in command.split("&&"):
            words = shlex.split(part, comments=True)
            if words[0] == "torchrun":
                words = words[words.index("-m") + 1 :]
            if words[0] == "minimore":
                verbs.add(build_parser().parse_args(words[1:]).verb)
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), command
            else:
                known = words[0] in ("pip", "pytest") or words[:3] == ["python", "-m", "pytest"]
                assert known or "=" in words[0], command
    assert verbs == set(VERBS)


def test_the_two_set_up_commands_are_marked():
    for name in ("demo", "test"):
        pattern = rf"<!-- command: {name} -->\n```bash\n(.*?)```"
        block = re.search(pattern, README, re.S).group(1)
        assert block.count("\n") == 1 and block.startswith("pip install ")
    assert "command: test" in (ROOT / ".ci" / "run").read_text()


def test_the_first_page_is_short_and_no_page_is_wide():
    assert len(README.splitlines()) <= 200
    for name, page in PAGES.items():
        for number, line in enumerate(page.splitlines(), 1):
            assert len(line) <= 100, f"{name}:{number}"


def test_every_wing_has_a_page_that_names_its_files():
    folders = [path.parent for path in (ROOT / "minimore").rglob("__init__.py")]
    for folder in folders:
        page = (folder / "README.md").read_text("utf-8")
        for file in folder.glob("*.py"):
            assert file.name.startswith("__") or file.name in page, file


def test_the_map_names_every_room_of_the_top_level():
    drawn = re.search(r"## The map\n\n```\n(.*?)```", README, re.S).group(1)
    rooms = {path.stem for path in (ROOT / "minimore").glob("*.py")} - {"__init__", "__main__"}
    wings = {path.parent.name + "/" for path in (ROOT / "minimore").glob("*/__init__.py")}
    assert rooms | wings <= set(drawn.split())


def test_the_table_of_equations_names_what_exists():
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    rows = re.findall(r"^\|[^|]+\| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 15
    for name, test in rows:
        thing = importlib.import_module("minimore")
        for part in name.split("."):
            try:
                thing = importlib.import_module(f"{thing.__name__}.{part}")
            except (ImportError, AttributeError):
                thing = getattr(thing, part)
        assert callable(thing), name
        assert f"def {test}(" in tests, test


def test_files_that_the_pages_name_exist():
    for name, page in PAGES.items():
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (folder / target).exists(), (name, target)
        for file in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
            places = (ROOT, ROOT / "minimore", folder)
            assert any((place / file).is_file() for place in places), (name, file)


def parsers(parser=None, group=""):
    """The parser of every command, by its name; a command of a group has two words."""
    parser = parser or build_parser()
    found = {}
    for name, command in parser._subparsers._group_actions[0].choices.items():
        if command._subparsers is None:
            found[f"{group}{name}"] = command
        else:
            found |= parsers(command, f"{name} ")
    return found


def test_options_named_in_the_text_exist():
    known = {flag for parser in parsers().values() for flag in parser._option_string_actions}
    known |= {"--version", "--nproc-per-node"}  # the second is one of torchrun
    bench = "".join(p.read_text("utf-8") for p in (ROOT / "tests" / "bench").glob("*.py"))
    for name, page in PAGES.items():
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)):
            assert flag in known or f'"{flag}"' in bench, (name, flag)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A directory with what the pages say `minimore demo` leaves behind, but smaller."""
    home = tmp_path_factory.mktemp("home")
    world = World(train_pairs=(100,), test_pairs=40, ties=0.05)
    world.write(home / "demo" / "world")
    shutil.copytree(home / "demo" / "world" / "model", home / "demo" / "more")
    return home


@pytest.mark.filterwarnings("ignore:.*untrained head")  # of the stand-in for demo/more
@pytest.mark.parametrize("page", ["README.md", "minimore/README.md"])
def test_code_on_the_pages_runs_as_it_stands(page, demo, monkeypatch):
    monkeypatch.chdir(demo)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.S)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        if "weights" in names:
            assert names["weights"].sum() == pytest.approx(1) and names["loss"].ndim == 0


PYTHIA_6_9B = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
}


def test_the_page_of_plan_is_what_plan_prints(capsys, tmp_path):
    page = PAGES["minimore/engine/README.md"]
    shown = re.search(r"```\n(model   gpt_neox.*?)```", page, re.S).group(1)
    (tmp_path / "config.json").write_text(json.dumps(PYTHIA_6_9B))
    assert main(["plan", str(tmp_path), "--memory", "24GB", "--host-memory", "128GB"]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_the_page_of_check_is_what_check_prints(capsys):
    page = PAGES["minimore/README.md"]
    shown = re.search(r"```\n(family .*?)```", page, re.S).group(1).splitlines()
    main(["check", str(ROOT / "tests" / "goldens" / "gpt_neox"), "--parity", "none"])
    printed = capsys.readouterr().out.splitlines()
    assert len(shown) == len(printed) == 8
    for expected, line in zip(shown[:-1], printed):
        start = expected.removesuffix("...").rstrip()
        assert line.startswith(start) and (line == start or expected.endswith("...")), line
