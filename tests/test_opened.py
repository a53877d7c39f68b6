"""`minimore.load`: the rewards of the command in one call."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import GOLDENS
from runs import options

import minimore
from minimore.calibration import probability
from minimore.cli import main
from minimore.options import InputError
from minimore.temperature import TEMPERATURE, store_temperature, stored_temperature
from minimore.train import train

PROMPT, RESPONSES = "amber basil", [" cedar", " d e f", " basil amber coral"]
QUESTION = [{"role": "user", "content": "hi"}]
ANSWERS = [{"role": "assistant", "content": text} for text in ("yes", "no, thanks")]


@pytest.fixture(scope="module")
def model():
    return minimore.load(str(GOLDENS / "gpt_neox"), device="cpu")


def command(tmp_path, records, model=GOLDENS / "gpt_neox"):
    """What `minimore score` writes."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out.unlink(missing_ok=True)
    words = ["score", "--model", str(model), "--input", str(path), "--output", str(out)]
    assert main([*words, "--device", "cpu"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_strings_in_every_number_are_scored_as_the_command_does(model, tmp_path):
    (record,) = command(tmp_path, [{"prompt": PROMPT, "responses": RESPONSES}])
    expected = pytest.approx(record["rewards"], abs=1e-5)
    assert model.score(PROMPT, RESPONSES) == expected
    assert model.score(PROMPT, tuple(RESPONSES)) == expected
    assert [model.score(PROMPT, response) for response in RESPONSES] == expected
    assert model.score([PROMPT] * 3, RESPONSES) == expected
    assert model.score([PROMPT, "x"], [RESPONSES, []]) == [expected, []]
    assert len({round(reward, 3) for reward in record["rewards"]}) == 3


def test_messages_in_every_number_are_scored_as_the_command_does(model, tmp_path):
    whole = [[*QUESTION, answer] for answer in ANSWERS]
    records = command(tmp_path, [{"messages": messages} for messages in whole])
    expected = pytest.approx([record["reward"] for record in records], abs=1e-5)
    assert model.score(whole) == expected
    assert [model.score(messages) for messages in whole] == expected
    assert [model.score(QUESTION, answer) for answer in ANSWERS] == expected
    assert [model.score(QUESTION, [answer]) for answer in ANSWERS] == expected
    assert [model.score([QUESTION], [[answer]])[0] for answer in ANSWERS] == expected


def test_nothing_to_score_gives_nothing(model):
    assert model.score(PROMPT, []) == model.score([], []) == model.score([]) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((3, "a"), "prompt"),
        ((PROMPT, 3), "response"),
        ((PROMPT,), "expected a prompt and a response, or a conversation"),
        ((QUESTION,), "expected a prompt and a response, or a conversation"),
        (([PROMPT, PROMPT],), "expected a prompt and a response, or a conversation"),
        (([PROMPT], [" a", " b"]), "1 prompts and 2 responses"),
        ((PROMPT, [" a", 3]), "response"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(model, arguments, words):
    with pytest.raises(InputError, match=words) as error:
        model.score(*arguments)
    assert "\n" not in str(error.value)


def test_several_threads_may_ask(model):
    prompts = [f"amber {'basil ' * (i % 5)}" for i in range(24)]
    alone = [model.score(prompt, RESPONSES) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: model.score(prompt, RESPONSES), prompts))
    assert together == [pytest.approx(rewards, abs=1e-5) for rewards in alone]


def test_a_preference_is_the_probability_of_the_margin(model):
    first, second = model.score(PROMPT, RESPONSES[:2])
    preference = model.prefers(PROMPT, *RESPONSES[:2])
    assert preference == pytest.approx(probability(first - second), abs=1e-6)
    assert model.prefers(PROMPT, *RESPONSES[1::-1]) == pytest.approx(1 - preference, abs=1e-6)
    margin = model.score(QUESTION, ANSWERS[0]) - model.score(QUESTION, ANSWERS[1])
    assert model.prefers(QUESTION, *ANSWERS) == pytest.approx(probability(margin), abs=1e-5)


# ---- the temperature -----------------------------------------------------------------------------

PAIRS = [
    {"prompt": f"amber {i}", "chosen": chosen, "rejected": rejected}
    for i, (chosen, rejected) in enumerate([(" cedar", " d e f"), (" d e f", " cedar")] * 20)
]


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(GOLDENS / "gpt_neox", tmp_path / "run")


def test_a_stored_temperature_changes_probabilities_and_nothing_else(run, tmp_path, capsys):
    for name, own in (("held", PAIRS[:30]), ("test", PAIRS[30:])):
        lines = "".join(json.dumps(pair) + "\n" for pair in own)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    before = command(tmp_path, PAIRS[:3], run)
    words = ["evaluate", "--model", str(run), "--source", f"a={tmp_path}/test.jsonl"]
    words += ["--calibrate", f"a={tmp_path}/held.jsonl", "--store-temperature"]
    assert main(words) == 0
    temperature = stored_temperature(run)
    assert f"temperature {temperature:.3f}, fitted on 30 pairs" in capsys.readouterr().out
    assert abs(temperature - 1) > 0.3
    after = command(tmp_path, PAIRS[:3], run)
    assert f"sigmoid(margin / {temperature:.3f})" in capsys.readouterr().out
    for old, new in zip(before, after):
        margin = old["chosen_reward"] - old["rejected_reward"]
        assert new == old | {"probability": pytest.approx(float(probability(margin / temperature)))}
    opened, pair = minimore.load(str(run), device="cpu"), PAIRS[0]
    asked = opened.prefers(pair["prompt"], pair["chosen"], pair["rejected"])
    assert asked == pytest.approx(after[0]["probability"], abs=1e-5)


def test_a_damaged_temperature_is_refused(run):
    store_temperature(run, 1.25, {"a": "held.jsonl"}, 30)
    assert stored_temperature(run) == 1.25
    text = (run / TEMPERATURE).read_text()
    (run / TEMPERATURE).write_text(text.replace("1.25", "1.75"))
    with pytest.raises(InputError, match="not as it was written"):
        minimore.load(str(run))
    store_temperature(run, -1.0, {}, 0)
    with pytest.raises(InputError, match="no positive temperature"):
        stored_temperature(run)


def test_a_temperature_needs_pairs_to_be_fitted_on(run, tmp_path, capsys):
    words = ["evaluate", "--model", str(run), "--source", "a=x.jsonl", "--store-temperature"]
    assert main(words) == 2 and "needs --calibrate" in capsys.readouterr().err


def test_a_temperature_is_not_fitted_where_the_model_was_trained(world, tmp_path, capsys):
    """Neither on the file itself, nor on its prompts in another file."""
    run, (train_file, test_file) = tmp_path / "trained", world[1]["ana"]
    assert train(options(world, run)) == 0
    words = ["evaluate", "--model", str(run), "--source", f"ana={test_file}", "--store-temperature"]
    capsys.readouterr()
    assert main([*words, "--calibrate", f"ana={train_file}"]) == 2
    assert "--calibrate ana=" in (said := capsys.readouterr().err) and "was trained on" in said
    copy = shutil.copy(train_file, tmp_path / "copy.jsonl")
    assert main([*words, "--calibrate", f"ana={copy}"]) == 2
    assert "calibration prompts are training prompts" in capsys.readouterr().err
    assert not (run / TEMPERATURE).exists()
    assert main([*words, "--calibrate", f"ana={copy}", "--allow-overlap"]) == 0
    assert (run / TEMPERATURE).exists()


def test_an_untrained_head_is_told(world):
    with pytest.warns(UserWarning, match="untrained head"):
        assert not minimore.load(str(world[0] / "model"), device="cpu").has_head


@pytest.mark.parametrize(
    "model, options, words",
    [
        (3, {}, "model 3: expected str"),
        (b"demo/more", {}, "model b'demo/more': expected str"),
        (None, {}, "model None: expected str"),
        ("x", {"device": "tpu"}, "device 'tpu': expected one of auto"),
        ("x", {"append_eos": True}, "append_eos True: expected one of auto"),
        ("x", {"max_length": 1.5}, "max_length 1.5: expected int"),
        ("x", {"max_length": True}, "max_length True: expected int"),
        ("x", {"micro_tokens": None}, "micro_tokens None: expected int"),
        ("x", {"chat": "yes"}, "chat 'yes': expected bool"),
        (GOLDENS / "nowhere", {}, "nowhere"),
    ],
)
def test_options_from_python_are_checked_as_those_of_the_command(model, options, words):
    with pytest.raises(InputError, match=words):
        minimore.load(model, **options)
