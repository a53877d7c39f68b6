"""Stored states are the model's; a head trained on them is what autograd and torch's Adam make."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minimore.lab.features
from minimore.cli import main
from minimore.data.pairs import load_source, pack_pairs
from minimore.data.sampling import epoch_steps
from minimore.data.world import World
from minimore.lab.features import load_features
from minimore.lab.probe import ProbeOptions, train_head
from minimore.more import WEIGHTINGS, bradley_terry_losses, head_gradients, weighted_loss
from minimore.reward import ModelOptions, fresh_head, open_reward_model
from minimore.uncertainty import over_seeds


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    paths = World(annotators=("ana", "ben", "cleo"), train_pairs=(60, 40, 30), test_pairs=25).write(
        directory
    )
    command = [
        "features",
        "--model",
        str(directory / "model"),
        *(a for n, (x, y) in paths.items() for a in ("--source", f"{n}={x},{y}")),
        "--output",
        str(directory / "states"),
    ]
    assert main(command) == 0
    return directory, paths, command


def test_states_are_the_models(stored):
    directory, paths, _ = stored
    model, checkpoint = open_reward_model(ModelOptions(model=str(directory / "model")))
    described, found = load_features(str(directory / "states"))
    assert (
        list(found) == ["ana", "ben", "cleo"]
        and described["width"] == 64
        and "not the paper's Table 2" in described["note"]
    )
    for name, files in paths.items():
        for part, path in zip(("train", "test"), files):
            source = load_source(name, str(path), checkpoint.tokenizer, 512)
            with torch.no_grad():
                chosen, rejected = model.features(pack_pairs(source.pairs))
            assert torch.allclose(
                found[name][part].difference.float(), chosen - rejected, atol=4e-3
            )
            assert found[name][part].longer.tolist() == [p.longer for p in source.pairs]
            assert described["sources"][name][part]["pairs"] == len(source.pairs)


def test_an_interrupted_command_goes_on_and_a_whole_directory_is_left_alone(
    stored, tmp_path, capsys, monkeypatch
):
    directory, _, command = stored
    again = [*command[:-1], str(tmp_path / "states")]
    written, real = [], minimore.lab.features.write_tensors

    def stop(path, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *rest)

    monkeypatch.setattr("minimore.lab.features.write_tensors", stop)
    assert main(again) == 130
    assert main(["probe", "--features", str(tmp_path / "states")]) == 2
    assert "is not whole" in capsys.readouterr().err
    monkeypatch.setattr(
        "minimore.lab.features.write_tensors",
        lambda path, *rest: (written.append(path.name), real(path, *rest)),
    )
    assert main(again) == 0
    assert sorted(written) == sorted(
        p.name for p in (tmp_path / "states").glob("*.safetensors")
    )  # each written once
    for path in (tmp_path / "states").glob("*.safetensors"):
        assert path.read_bytes() == (directory / "states" / path.name).read_bytes()
    assert main(again) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("method", list(WEIGHTINGS))
@pytest.mark.parametrize("sampling", ["equal", "proportional"])
def test_heads_are_those_of_autograd_and_adam(stored, method, sampling):
    _, found = load_features(str(stored[0] / "states"))
    train = [s["train"].difference.float() for s in found.values()]
    options = ProbeOptions(
        features="", epochs=2, batch_size=12, sampling=sampling, label_smoothing=0.1
    )
    mine, weights = train_head(train, method, options, seed=3)

    head = torch.nn.Parameter(fresh_head(64, 3))
    optimizer, state = torch.optim.Adam([head], lr=1e-2), {}
    plans = [
        s for e in range(2) for s in epoch_steps([len(t) for t in train], sampling, None, 12, 3, e)
    ]
    for t, plan in enumerate(plans):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t / len(plans))
        z, source = torch.stack([train[k][i] for k, i in plan]), torch.tensor(plan[:, 0])
        losses = bradley_terry_losses(head, z, torch.zeros_like(z), source, 3, 0.1)
        gradients = head_gradients(head, z, torch.zeros_like(z), source, 3, 0.1)
        w = WEIGHTINGS[method](losses, gradients, torch.bincount(source, minlength=3), state)
        assert np.allclose(w.detach().numpy(), weights[t], atol=1e-3)
        optimizer.zero_grad()
        weighted_loss(w.detach(), losses).backward()
        optimizer.step()
    assert torch.allclose(mine, head.detach(), atol=2e-4)
    assert len(weights) == len(plans)


def test_probe_reports_every_method_and_the_worst_source(stored, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert (
        main(
            [
                "probe",
                "--features",
                str(stored[0] / "states"),
                "--seeds",
                "4",
                "--method",
                "uniform",
                "--method",
                "more",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    accuracies = np.array(found["methods"]["more"]["accuracy"])
    assert accuracies.shape == (4, 3) and "linear probe" in said and "more - uniform" in said
    mean, half = over_seeds(accuracies.min(1))
    assert f"{mean:.4f} ± {half:.4f}" in said
    assert (
        main(
            [
                "probe",
                "--features",
                str(stored[0] / "states"),
                "--seeds",
                "4",
                "--json",
                str(tmp_path / "q.json"),
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "q.json").read_text())["methods"] == found["methods"]
    )  # the default, and the same seeds


def test_intervals_over_seeds():
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, rel=0.01)
    assert np.isnan(over_seeds([1.0, 2.0])[1])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "features.json").write_text("{"), "not readable as JSON"),
        (lambda d: (d / "features.json").write_text("{}"), "damaged"),
        (lambda d: (d / "00.train.safetensors").unlink(), "damaged"),
        (lambda d: (d / "01.test.safetensors").write_bytes(b"x" * 50), "damaged"),
        (
            lambda d: (d / "features.json").write_text(
                (d / "features.json").read_text().replace("00.train", "../../etc/x")
            ),
            "damaged",
        ),
        (
            lambda d: save_file(
                load_file(d / "00.test.safetensors") | {"chosen": torch.zeros(3, 64)},
                d / "00.test.safetensors",
            ),
            "damaged",
        ),
        (
            lambda d: (d / "features.json").write_text(
                (d / "features.json").read_text().replace("00.train", "../states/00.train")
            ),
            "damaged",
        ),
        (
            lambda d: save_file(
                (t := load_file(d / "00.train.safetensors"))
                | {"chosen": t["chosen"] * float("nan")},
                d / "00.train.safetensors",
            ),
            "not finite",
        ),
        (
            lambda d: (d / "features.json").write_text(
                (d / "features.json").read_text().replace('"width": 64', '"width": 65')
            ),
            "damaged",
        ),
    ],
)
def test_damaged_features_are_refused(stored, tmp_path, capsys, damage, words):

    shutil.copytree(stored[0] / "states", tmp_path / "states")
    damage(tmp_path / "states")
    assert main(["probe", "--features", str(tmp_path / "states")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_what_overflows_and_too_many_sources_are_one_line(stored, tmp_path, capsys):
    assert (
        main(
            [
                "probe",
                "--features",
                str(stored[0] / "states"),
                "--seeds",
                "1",
                "--learning-rate",
                "1e39",
            ]
        )
        == 1
    )
    assert "not finite" in capsys.readouterr().err
    shutil.copytree(stored[0] / "states", tmp_path / "many")
    described = json.loads((tmp_path / "many" / "features.json").read_text())
    described["sources"] = {f"s{i}": described["sources"]["ana"] for i in range(13)}
    (tmp_path / "many" / "features.json").write_text(json.dumps(described))
    assert main(["probe", "--features", str(tmp_path / "many"), "--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert "at most 12" in said and said.count("\n") == 1


def test_bad_options(stored, tmp_path, capsys):
    directory, paths, command = stored
    assert (
        main([*command[:3], "--source", f"a={paths['ana'][0]}", "--output", str(tmp_path / "x")])
        == 2
    )
    assert "no test file" in capsys.readouterr().err and not (tmp_path / "x").exists()
    for flags in (
        ["--seeds", "0"],
        ["--batch-size", "4"],
        ["--learning-rate", "0"],
        ["--label-smoothing", ".5"],
        ["--features", str(tmp_path)],
    ):
        assert main(["probe", "--features", str(directory / "states"), *flags]) == 2, flags
        assert capsys.readouterr().err.count("\n") == 1
