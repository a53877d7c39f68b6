"""Stored states are the model's; a head trained on them is what autograd and torch's Adam make."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minimore.lab.features
from minimore.calibration import accuracy
from minimore.checksums import write_checked_json
from minimore.cli import main
from minimore.data.pairs import load_source, pack_pairs
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.lab.features import load_features, load_states
from minimore.lab.methods.by_name import METHODS
from minimore.lab.probe import ProbeOptions, train_head
from minimore.lab.solved import as_pairs, scales_of
from minimore.model.attention import pack
from minimore.model.tensors import write_tensors
from minimore.more import WEIGHTINGS, bradley_terry_losses, head_gradients, weighted_loss
from minimore.reward import ModelOptions, fresh_head, open_reward_model
from minimore.uncertainty import over_seeds


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """States of a small world: (its directory, its paths, the command that stored them)."""
    directory = tmp_path_factory.mktemp("world")
    world = World(annotators=("ana", "ben", "cleo"), train_pairs=(60, 40, 30), test_pairs=25)
    paths = world.write(directory)
    command = ["features", "--model", str(directory / "model")]
    for name, (train, test) in paths.items():
        command += ["--source", f"{name}={train},{test}"]
    command += ["--output", str(directory / "states")]
    assert main(command) == 0
    return directory, paths, command


def test_states_are_the_models(stored):
    directory, paths, _ = stored
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    described, states = load_features(str(directory / "states"))
    assert list(states) == ["ana", "ben", "cleo"] and described["width"] == 64
    assert "not the paper's Table 2" in described["note"]
    for name, files in paths.items():
        for part, path in zip(("train", "test"), files):
            source = load_source(name, str(path), checkpoint.tokenizer, 512)
            with torch.no_grad():
                chosen, rejected = model.features(pack_pairs(source.pairs))
            difference, longer = states[name][part]
            assert torch.allclose(difference.float(), chosen - rejected, atol=4e-3)
            assert longer.tolist() == [pair.longer for pair in source.pairs]
            assert described["sources"][name][part]["pairs"] == len(source.pairs)


def test_an_interrupted_command_goes_on_and_a_whole_directory_is_left_alone(
    stored, tmp_path, capsys, monkeypatch
):
    directory, _, command = stored
    states = tmp_path / "states"
    command = [*command[:-1], str(states)]
    written, write_tensors = [], minimore.lab.features.write_tensors

    def write_and_note(path, *rest):
        written.append(path.name)
        write_tensors(path, *rest)

    def write_three(path, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        write_and_note(path, *rest)

    monkeypatch.setattr(minimore.lab.features, "write_tensors", write_three)
    assert main(command) == 130
    assert main(["probe", "--features", str(states)]) == 2
    assert "is not whole" in capsys.readouterr().err
    monkeypatch.setattr(minimore.lab.features, "write_tensors", write_and_note)
    assert main(command) == 0
    files = sorted(states.glob("*.safetensors"))
    assert sorted(written) == [file.name for file in files]  # each is written once
    for file in files:
        assert file.read_bytes() == (directory / "states" / file.name).read_bytes()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("method", list(WEIGHTINGS))
@pytest.mark.parametrize("sampling", ["equal", "proportional"])
def test_heads_are_those_of_autograd_and_adam(stored, method, sampling):
    _, states = load_features(str(stored[0] / "states"))
    train = [parts["train"].difference.float() for parts in states.values()]
    options = ProbeOptions(
        features="", epochs=2, batch_size=12, sampling=sampling, label_smoothing=0.1
    )
    ours, weights_of_steps = train_head(train, method, options, seed=3)

    head = torch.nn.Parameter(fresh_head(64, 3))
    optimizer, weighting_state = torch.optim.Adam([head], lr=1e-2), {}
    sizes = [len(differences) for differences in train]
    steps = [
        sampled
        for epoch in range(2)
        for sampled in epoch_steps(sizes, sampling, None, 12, 3, epoch)
    ]
    for t, sampled in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / len(steps))
        z = torch.stack([train[k][i] for k, i in sampled])
        source = torch.tensor(sampled[:, 0])
        losses = bradley_terry_losses(head, z, torch.zeros_like(z), source, 3, 0.1)
        gradients = head_gradients(head, z, torch.zeros_like(z), source, 3, 0.1)
        counts = torch.bincount(source, minlength=3)
        weights = WEIGHTINGS[method](losses, gradients, counts, weighting_state).detach()
        assert np.allclose(weights.numpy(), weights_of_steps[t], atol=1e-3)
        optimizer.zero_grad()
        weighted_loss(weights, losses).backward()
        optimizer.step()
    assert torch.allclose(ours, head.detach(), atol=2e-4)
    assert len(weights_of_steps) == len(steps)


def test_probe_reports_every_method_and_the_worst_source(stored, tmp_path, capsys):
    def methods_of(name, *flags):
        """The figures by method that `probe` writes, and what it prints."""
        path = tmp_path / name
        states = str(stored[0] / "states")
        command = ["probe", "--features", states, "--seeds", "4", "--json", str(path), *flags]
        assert main(command) == 0
        return json.loads(path.read_text())["methods"], capsys.readouterr().out

    methods, printed = methods_of("both.json", "--method", "uniform", "--method", "more")
    accuracies = np.array(methods["more"]["accuracy"])
    assert accuracies.shape == (4, 3)
    assert "linear probe" in printed and "more - uniform" in printed
    mean, half = over_seeds(accuracies.min(1))
    assert f"{mean:.4f} ± {half:.4f}" in printed
    by_default, _ = methods_of("default.json")  # the same methods and seeds
    assert by_default == methods


@pytest.fixture(scope="module")
def with_prompts(stored, tmp_path_factory):
    """The same states with those of the prompts."""
    states = tmp_path_factory.mktemp("prompts") / "states"
    assert main([*stored[2][:-1], str(states), "--prompt-states"]) == 0
    return states


def test_prompt_states_are_those_of_the_prompt_alone(stored, with_prompts, capsys):
    directory, paths, _ = stored
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    states, old = load_states(str(with_prompts)), load_states(str(directory / "states"))
    for name, (path, _) in paths.items():
        pairs = load_source(name, str(path), checkpoint.tokenizer, 512).pairs
        alone = [(pair.chosen[: pair.shared].tolist(),) for pair in pairs]
        with torch.no_grad():
            z = torch.cat([model.trunk(pack([([], list(text))])) for text in alone])
        part = states[name]["train"]
        assert torch.allclose(part.prompt.float(), z, atol=4e-3)
        assert old[name]["train"].prompt is None  # a store without prompts is readable
        assert torch.equal(old[name]["train"].chosen, part.chosen)
        difference = load_features(str(with_prompts))[1][name]["train"].difference
        assert torch.equal(difference, part.chosen - part.rejected)


def test_probe_takes_the_methods_of_neighbours(with_prompts, tmp_path, capsys):
    flags = [flag for name in ("uniform", "own", "ensemble") for flag in ("--method", name)]
    path = tmp_path / "all.json"
    command = ["probe", "--features", str(with_prompts), "--seeds", "2", "--json", str(path)]
    assert main([*command, *flags]) == 0
    printed, runs = capsys.readouterr().out, json.loads(path.read_text())["methods"]
    assert list(runs) == ["uniform", "own", "own, source known", "ensemble"]
    assert "own, source known - uniform" in printed and printed.count("weights") == 1
    assert "solved on all training pairs" in printed

    states = list(load_states(str(with_prompts)).values())
    scales = scales_of([parts["train"] for parts in states])
    train, test = (
        as_pairs([parts[name] for parts in states], scales) for name in ("train", "test")
    )
    assert train.difference.square().mean() == pytest.approx(1, rel=1e-4)
    assert train.chosen.mean(0) + train.rejected.mean(0) == pytest.approx(0, abs=1e-3)
    parameters = METHODS["own"].fit(train, 0)
    margins = METHODS["own"].margins(parameters, test, True).numpy()
    own = [accuracy(margins[test.source == k]) for k in range(3)]
    assert runs["own, source known"]["accuracy"] == [own] * 2
    accuracies = np.array(runs["ensemble"]["accuracy"])  # whose start is drawn
    assert not np.array_equal(accuracies[0], accuracies[1])


def test_a_gate_reads_prompts_where_they_are_stored(stored, with_prompts, capsys):
    tables = []
    for states in (stored[0] / "states", with_prompts):
        assert main(["probe", "--features", str(states), "--seeds", "1", "--method", "gated"]) == 0
        tables.append(capsys.readouterr().out)
    without, read = tables
    assert "constant gate" in without and "constant gate" not in read and without != read
    assert not any("weights " in table for table in tables)


def test_intervals_over_seeds():
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=0.01)
    assert np.isnan(over_seeds([1.0, 2.0])[1])


def description_with(old, new):
    """Damage: replace a text in features.json, with a checksum that is right."""

    def damage(directory):
        path = directory / "features.json"
        description = json.loads(path.read_text())
        del description["crc32"]
        text = json.dumps(description)
        assert old in text
        write_checked_json(path, json.loads(text.replace(old, new)))

    return damage


def a_flipped_bit(name):
    """Damage: one bit of a file."""

    def damage(directory):
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 4
        (directory / name).write_bytes(content)

    return damage


def description_is(text):
    """Damage: another features.json."""
    return lambda directory: (directory / "features.json").write_text(text)


def rewrite(path, **changes):
    """Write a file of states again with other tensors, as what it was."""
    with safe_open(path, framework="pt") as file:
        metadata = {"of": file.metadata()["of"]}
    write_tensors(path, load_file(path) | changes, metadata)


def too_few_states(directory):
    rewrite(directory / "00.test.safetensors", chosen=torch.zeros(3, 64))


def states_that_are_not_finite(directory):
    path = directory / "00.train.safetensors"
    rewrite(path, chosen=load_file(path)["chosen"] * float("nan"))


def train_and_test_swapped(directory):
    train, test, aside = (directory / f"00.{name}" for name in ("train", "test", "aside"))
    train, test = (path.with_name(f"{path.name}.safetensors") for path in (train, test))
    train.rename(aside)
    test.rename(train)
    aside.rename(test)


def a_missing_file(directory):
    (directory / "00.train.safetensors").unlink()


def a_file_of_something_else(directory):
    (directory / "01.test.safetensors").write_bytes(b"x" * 50)


@pytest.mark.parametrize(
    "damage, words",
    [
        (description_is("{"), "not readable as JSON"),
        (description_is("{}"), "damaged"),
        (a_flipped_bit("features.json"), "damaged"),
        (a_flipped_bit("00.train.safetensors"), "not as it was written"),
        (a_flipped_bit("01.test.safetensors"), "not as it was written"),
        (a_missing_file, "damaged"),
        (a_file_of_something_else, "damaged"),
        (description_with("00.train", "../../etc/x"), "damaged"),
        (description_with("00.train", "../states/00.train"), "damaged"),
        (too_few_states, "expected (N, 64)"),
        (train_and_test_swapped, "holds states of other pairs or of another model"),
        (states_that_are_not_finite, "not finite"),
        (description_with('"width": 64', '"width": 65'), "damaged"),
    ],
)
def test_damaged_features_are_refused(stored, tmp_path, capsys, damage, words):
    shutil.copytree(stored[0] / "states", tmp_path / "states")
    damage(tmp_path / "states")
    assert main(["probe", "--features", str(tmp_path / "states")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_margin_that_overflows_is_one_line(stored, capsys):
    states = str(stored[0] / "states")
    command = ["probe", "--features", states, "--seeds", "1", "--learning-rate", "1e39"]
    assert main(command) == 1
    assert "not finite" in capsys.readouterr().err


def test_too_many_sources_are_one_line(stored, tmp_path, capsys):
    many = tmp_path / "many"
    shutil.copytree(stored[0] / "states", many)
    described = json.loads((many / "features.json").read_text())
    described["sources"] = {f"s{i}": described["sources"]["ana"] for i in range(13)}
    del described["crc32"]
    write_checked_json(many / "features.json", described)
    assert main(["probe", "--features", str(many), "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert "at most 12" in error and error.count("\n") == 1


def test_bad_options(stored, tmp_path, capsys):
    directory, paths, command = stored
    output = tmp_path / "states"
    assert main([*command[:3], "--source", f"a={paths['ana'][0]}", "--output", str(output)]) == 2
    assert "no test file" in capsys.readouterr().err and not output.exists()
    for flags in (
        ["--seeds", "0"],
        ["--batch-size", "4"],
        ["--learning-rate", "0"],
        ["--label-smoothing", ".5"],
        ["--features", str(tmp_path)],
    ):
        assert main(["probe", "--features", str(directory / "states"), *flags]) == 2, flags
        assert capsys.readouterr().err.count("\n") == 1
