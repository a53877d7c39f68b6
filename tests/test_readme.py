"""README is true: its commands parse, its tree is the tree, its tables name things that exist."""

import importlib
import json
import re
import shlex

from conftest import ROOT

from minimore.cli import VERBS, build_parser, main

README = (ROOT / "README.md").read_text("utf-8")


def commands():
    """Every line of the shell blocks, backslash continuations joined."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        yield from (
            c
            for c in block.replace("\\\n", " ").splitlines()
            if c.strip() and not c.startswith("#")
        )


def test_commands_parse():
    verbs = set()
    for command in commands():
        for part in command.split("&&"):
            words = shlex.split(part, comments=True)
            if words[0] == "minimore":
                build_parser().parse_args(words[1:])
                verbs.add(words[1])
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), command
            else:
                assert words[0] == "pip" or words[:3] == ["python", "-m", "pytest"], command
    assert verbs == set(VERBS)


def test_the_two_set_up_commands_are_marked():
    for name in ("demo", "test"):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.S).group(1)
        assert block.count("\n") == 1 and block.startswith("pip install ")
    assert "command: test" in (ROOT / ".ci" / "run").read_text()


def test_the_tree_is_the_tree():
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", README, re.S).group(1)
    named = re.findall(r"^\s*(\S+\.py)", tree, re.M)
    there = [
        p.name
        for folder in ("minimore", "tutorials")
        for p in (ROOT / folder).glob("*.py")
        if p.stem != "__main__"
    ]
    assert sorted(named) == sorted(there)


def test_equation_table_names_exist():
    rows = [line for line in README.splitlines() if line.startswith("|") and "test_" in line]
    assert len(rows) >= 8
    for row in rows:
        for module, name in re.findall(r"`([a-z_]+)\.([a-z_]+)`", row):
            assert hasattr(importlib.import_module(f"minimore.{module}"), name), row
        for test in re.findall(r"`(test_\w+\.py::test_\w+)`", row):
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), row


def test_options_named_in_the_text_exist():
    helps = {
        flag
        for parser in build_parser()._subparsers._group_actions[0].choices.values()
        for flag in parser._option_string_actions
    }
    bench = "".join(p.read_text("utf-8") for p in (ROOT / "tests" / "bench").glob("*.py"))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in helps or f'"{flag}"' in bench or flag == "--version", flag


def test_the_page_of_plan_is_what_plan_prints(capsys, tmp_path):
    shown = re.search(r"```\n(model   gpt_neox.*?)```", README, re.S).group(1)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
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
        )
    )  # Pythia-6.9B's
    assert main(["plan", str(tmp_path), "--memory", "24GB"]) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_the_page_of_check_is_what_check_prints(capsys):
    shown = re.search(r"```\n(family .*?)```", README, re.S).group(1).splitlines()
    main(["check", str(ROOT / "tests" / "goldens" / "gpt_neox"), "--parity", "none"])
    printed = capsys.readouterr().out.splitlines()
    assert len(shown) == len(printed) == 8
    for expected, found in zip(shown[:-1], printed):
        start = expected.removesuffix("...").rstrip()
        assert found.startswith(start) and (found == start or expected.endswith("...")), found
