"""Special tokens, BOS and chat templates."""

import json
import shutil

import pytest
from conftest import GOLDENS, edit_json

from minimore.data.forms import record_pairs
from minimore.data.pairs import load_source
from minimore.model.tokenizer import Tokenizer
from minimore.options import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('Only user and assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
USER, GOOD, BAD = (
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": "three"},
)


@pytest.fixture
def open_with(tmp_path):
    """open_with(template, **tokenizer_config): the stored Llama tokenizer, which adds BOS.

    ChatML's markers are special tokens of it.
    """

    def make(template=None, **config):
        directory = tmp_path / "tokenizer"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        file = json.loads((GOLDENS / "llama" / "tokenizer.json").read_text("utf-8"))
        for i, text in enumerate(("<|im_start|>", "<|im_end|>"), 290):
            file["added_tokens"].append(
                {
                    "id": i,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
        (directory / "tokenizer.json").write_text(json.dumps(file))
        (directory / "tokenizer_config.json").write_text(
            json.dumps(
                {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
            )
        )
        return Tokenizer(directory)

    return make


def source_of(tokenizer, tmp_path, *records):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return load_source("s", str(tmp_path / "pairs.jsonl"), tokenizer, 200)


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_rendering_and_ids_are_those_of_transformers(transformers, open_with, template):
    ours = open_with(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ours.directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = template
    for messages in (
        [USER],
        [USER, GOOD],
        [USER, GOOD, {"role": "user", "content": "  Grüße\n"}, BAD],
    ):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(messages, prompt) == expected
        plain = theirs(ours.render(messages), add_special_tokens=False)["input_ids"]
        assert ours.encode([ours.render(messages)], rendered=True) == [
            plain if plain[0] == 1 else [1] + plain
        ]


TEMPLATES = [
    "{% if tools is not none %}TOOLS{% endif %}{{ documents is none }}{{ messages[0].content }}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "{{ messages[0] | tojson(indent=2) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "{{ sep_token }}{{ image_token }}{{ messages[0].content }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(transformers, open_with, template):
    ours = open_with(template, sep_token="</s>", extra_special_tokens={"image_token": "<|im_end|>"})
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ours.directory / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        extra_special_tokens={"image_token": "<|im_end|>"},
    )
    theirs.chat_template = template
    messages = [USER, GOOD | {"content": "Grüße <b> & 'x'"}, BAD]
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


ADDED = {
    "content": "<|new|>",
    "lstrip": False,
    "rstrip": True,
    "normalized": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    "config, marked",
    [
        ({"added_tokens_decoder": {"292": ADDED}}, "<|new|>"),
        ({"additional_special_tokens": ["<|new|>"]}, "<|new|>"),
        ({"eos_token": "ital"}, "ital"),
    ],
    ids=str,
)
def test_what_only_the_config_calls_special_is_special(open_with, config, marked):
    """In a rendered conversation; in a user's text it is text, and in a message it is refused."""
    tokenizer = open_with("{{ messages[0].content }}" + marked, **config)
    (rendered,) = tokenizer.encode(["a" + marked + "  b"], rendered=True)
    assert tokenizer.file.token_to_id(marked) in rendered
    assert tokenizer.names_special("a" + marked) and marked in tokenizer.markers
    if marked == "<|new|>":
        assert 292 not in tokenizer.encode(["a" + marked])[0]
        plain = tokenizer.encode(["a", "b"] if "added_tokens_decoder" in config else ["a", "  b"])
        assert rendered == plain[0] + [292] + plain[1][1:]  # rstrip takes the spaces


def test_added_tokens_with_another_id_are_refused(open_with):
    with pytest.raises(InputError, match="added_tokens_decoder.*295.*has 292"):
        open_with(None, added_tokens_decoder={"295": ADDED})


def test_markers_that_are_not_special_are_refused_in_a_message_too(open_with, tmp_path):
    tokenizer = open_with(
        "{{ messages[0].content }}<|turn|>",
        added_tokens_decoder={"292": ADDED | {"content": "<|turn|>", "special": False}},
    )
    with pytest.raises(InputError, match="turn"):
        source_of(
            tokenizer,
            tmp_path,
            {"chosen": [USER, GOOD | {"content": "<|turn|>"}], "rejected": [USER, BAD]},
        )


def test_the_map_of_special_tokens_goes_before_the_config(open_with):
    directory = open_with(None).directory
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": None})
    )
    tokenizer = Tokenizer(directory)
    assert (
        tokenizer.special["eos_token"] == "<|im_end|>" and tokenizer.special["bos_token"] == "<s>"
    )


def test_a_damaged_template_is_one_line(open_with):
    directory = open_with("{% for %}").directory
    with pytest.raises(InputError, match="chat template"):
        Tokenizer(directory).render([USER])
    assert (
        open_with(
            [{"name": {"a": 1}, "template": "x"}, {"name": "default", "template": "y"}, 5]
        ).render([USER])
        == "y"
    )
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        Tokenizer(directory).render([USER])


def test_markers_of_a_template_parse_and_markers_in_a_users_text_stay_text(open_with):
    tokenizer = open_with(CHATML)
    (rendered,) = tokenizer.encode([tokenizer.render([USER])], rendered=True)
    (plain,) = tokenizer.encode(["<|im_start|>user"])
    assert rendered[:2] == [1, 290] and 291 in rendered
    assert (
        plain[0] == 1
        and 290 not in plain
        and tokenizer.file.decode(plain[1:], skip_special_tokens=False) == "<|im_start|>user"
    )


def test_conversations_become_pairs(open_with, tmp_path):
    tokenizer = open_with(CHATML)
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    apart = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    texts = {"prompt": USER["content"], "chosen": [GOOD], "rejected": "three"}
    pairs = [record_pairs(r, "", tokenizer)[0][0] for r in (whole, apart, texts)]
    assert pairs[0] == pairs[1] == pairs[2] and pairs[0].rendered
    assert (
        pairs[0].prompt.endswith("<|im_start|>assistant\n") and pairs[0].chosen == "2<|im_end|>\n"
    )
    several = record_pairs(
        apart | {"rejected": [[BAD], [{"role": "assistant", "content": "4"}]]}, "", tokenizer
    )[0]
    assert [p.rejected for p in several] == ["three<|im_end|>\n", "4<|im_end|>\n"]
    assert [
        p.rejected
        for p in record_pairs({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, "")[0]
    ] == ["b", "c"]
    mixed = source_of(
        tokenizer,
        tmp_path,
        whole,
        {"prompt": "q", "chosen": "<|im_end|>", "rejected": "b"},
        apart | {"chosen": [GOOD | {"content": " "}]},
    )
    assert (
        (len(mixed.pairs), mixed.blank, mixed.named) == (3, 1, 1)
        and "1 pairs hold names of special tokens" in mixed.line()
        and 291 not in mixed.pairs[1].chosen.tolist()
    )
    assert (
        mixed.pairs[0].chosen.tolist()
        == tokenizer.encode([tokenizer.render([USER, GOOD])], rendered=True)[0]
    )


def test_without_a_template_the_rendering_is_plain(open_with):
    tokenizer = open_with(None)
    assert tokenizer.render([USER, GOOD]) == "\n\nHuman: 1 + 1?\n\nAssistant: 2"
    pair = record_pairs(
        {"chosen": [USER, GOOD | {"content": "<|im_end|>"}], "rejected": [USER, BAD]}, "", tokenizer
    )[0][0]
    assert pair.prompt == "\n\nHuman: 1 + 1?\n\nAssistant:" and not pair.rendered


def test_a_marker_in_a_message_is_refused(open_with, tmp_path):
    with pytest.raises(
        InputError, match=r"pairs.jsonl:1: .chosen.\[0\]: the content holds '<.im_start.>'"
    ):
        source_of(
            open_with(CHATML),
            tmp_path,
            {
                "prompt": [USER],
                "chosen": [GOOD | {"content": "2<|im_end|>\n<|im_start|>user"}],
                "rejected": [BAD],
            },
        )
    with pytest.raises(InputError, match="the role holds '<.im_end.>'"):
        source_of(
            open_with(CHATML),
            tmp_path,
            {"prompt": [USER], "chosen": [GOOD | {"role": "tool<|im_end|>"}], "rejected": [BAD]},
        )


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": "2", "rejected": "three"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": "three"},
        {"prompt": USER["content"], "chosen": "2", "rejected": [BAD]},
    ],
    ids=str,
)
def test_messages_and_strings_mix(open_with, record):
    tokenizer = open_with(CHATML)
    expected = record_pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "", tokenizer)
    assert record_pairs(record, "", tokenizer) == expected


def edited(open_with, edit):
    """Open the stored tokenizer with other content in tokenizer.json."""
    path = open_with().directory / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")
    return Tokenizer(path.parent)


def test_an_id_up_to_which_nobody_counts_is_refused(open_with):
    """The library makes a list of all ids that are missing: 8 GB of it, in minutes."""

    def change(content):
        vocabulary = content["model"]["vocab"]
        vocabulary[next(iter(vocabulary))] = 2**31

    with pytest.raises(InputError, match="a token has the id 2,147,483,648; expected at most"):
        edited(open_with, change)


def test_dropout_is_refused(open_with):
    assert edited(open_with, lambda content: content["model"].update(dropout=None))
    with pytest.raises(InputError, match='"dropout" 0.1'):
        edited(open_with, lambda content: content["model"].update(dropout=0.1))


def test_a_normalizer_that_blows_texts_up_is_refused(open_with):
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    normalizer = {"type": "Sequence", "normalizers": [grow] * 3}
    with pytest.raises(InputError, match="1,000,000,000 times as long"):
        edited(open_with, lambda content: content.update(normalizer=normalizer))


def test_a_bos_that_is_normalized_is_seen_in_a_text(open_with):
    """As in LLaMA-1's file: what is added reads as "▁<s>", and a text begins with "<s>"."""

    def normalize(content):
        for token in content["added_tokens"]:
            token["normalized"] = True

    tokenizer = edited(open_with, normalize)
    assert tokenizer.is_doubled("<s>Hi") and not tokenizer.is_doubled("Hi <s>")


def test_a_doubled_bos_is_refused(open_with, tmp_path):
    with pytest.raises(InputError, match="begins with '<s>', which the tokenizer adds itself"):
        source_of(open_with(), tmp_path, {"prompt": "<s>q", "chosen": "a", "rejected": "b"})
    for record in ({"chosen": "a", "rejected": "<s>b"}, {"text": ["a", "<s>b"], "score": [1, 2]}):
        with pytest.raises(InputError, match="begins with '<s>'"):
            source_of(open_with(), tmp_path, record)
    assert source_of(
        open_with(add_bos_token=False), tmp_path, {"prompt": "<s>q", "chosen": "a", "rejected": "b"}
    ).pairs
    tokenizer = open_with(LLAMA)
    assert tokenizer.encode([tokenizer.render([USER])], rendered=True)[0].count(1) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    ],
)
def test_templates_run_in_a_sandbox_and_fail_in_one_line(
    open_with, tmp_path, monkeypatch, template
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the chat template refuses these messages"):
        open_with(template).render([USER])
    assert not (tmp_path / "ran").exists()


def test_a_template_that_writes_a_date_is_warned_about(open_with, capsys):
    open_with("{{ strftime_now('%Y') }}").render([USER])
    assert "rewards may change from day to day" in capsys.readouterr().err


def test_templates_come_from_their_own_file_or_by_name(open_with):
    assert (
        open_with(
            [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        ).template
        == CHATML
    )
    tokenizer = open_with("x")
    (tokenizer.directory / "chat_template.jinja").write_text(LLAMA)
    again = Tokenizer(tokenizer.directory)
    assert again.template == LLAMA and "chat_template.jinja" in again.files
    edit_json(tokenizer.directory / "tokenizer_config.json", {"chat_template": ...})
    assert Tokenizer(tokenizer.directory).template == LLAMA
