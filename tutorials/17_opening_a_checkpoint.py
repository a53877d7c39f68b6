"""Tutorial 17: opening a checkpoint.

Question      What is in a checkpoint directory, and how do its bytes become the hidden state that a
              reward is read from?
You will see  config.json; the header of a safetensors file read byte by byte; a GPT-NeoX block
              computed by hand from the tensors in it; and the same hidden state from
              `minimore.Checkpoint`, which also refuses a file that does not fit.
Takes         about 3 seconds on a laptop CPU. Nothing is downloaded.
"""

import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from minimore import Checkpoint
from minimore.data.world import small_gpt_neox, train_tokenizer
from minimore.model.attention import pack
from minimore.model.checkpoint import random_checkpoint
from minimore.options import InputError

# %% A directory
# We write a model of one block, of width 32, with two heads of width 16. Its weights are random,
# with a standard deviation of .3. Real ones differ in size only: Pythia-6.9B has 32 blocks of width
# 4096 with 32 heads.

folder = tempfile.TemporaryDirectory()
directory = Path(folder.name) / "model"
tokenizer_file = Path(folder.name) / "tokenizer.json"
train_tokenizer(["the cat sat on the mat"], tokenizer_file, vocabulary=280)
random_checkpoint(directory, small_gpt_neox(32, 1, 2, 280), tokenizer_file, seed=0, std=0.3)
config = json.loads((directory / "config.json").read_text())
print({path.name: path.stat().st_size for path in directory.iterdir()})
for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "rotary_pct"):
    print(f"  {key}: {config[key]}")

# %% The bytes of a safetensors file
# Eight bytes say how long the header is. The header is JSON: name -> type, shape, and where the
# bytes of this tensor begin and end. The rest is numbers. There is no code in it, so nothing can
# run when it is opened. Here are 16 tensors of fp32, of which one is the language-model head.

data = (directory / "model.safetensors").read_bytes()
length = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + length])
header.pop("__metadata__")
numbers = len(data) - 8 - length  # bytes
print(f"{len(data)} bytes: 8 + {length} of header + {numbers} of numbers, {len(header)} tensors")


def tensor(name):
    """A tensor of the file, from its bytes."""
    entry = header["gpt_neox." + name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    flat = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32)
    return flat.view(entry["shape"])


# %% Two kinds of layer
# A linear layer is y = x Wᵀ + b. A layer norm centres every hidden state, divides it by its
# standard deviation, and scales and shifts each dimension:
#
#     y = (x - mean x) / sqrt(var x + eps) * weight + bias


def linear(x, name):
    """A linear layer of the file."""
    return x @ tensor(name + ".weight").T + tensor(name + ".bias")


def norm(x, name):
    """A layer norm of the file."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    scaled = centred / (variance + config["layer_norm_eps"]).sqrt()
    return scaled * tensor(name + ".weight") + tensor(name + ".bias")


# %% From tokens to queries, keys and values
# Query, key and value of one head stand side by side in one matrix: (heads, 3, width of a head). A
# quarter of each head rotates with the position (rotary_pct .25): dimensions 0 to 3, of which 0 is
# paired with 2 and 1 with 3. The rest stays as it is.

opened = Checkpoint(str(directory))
tokens = opened.tokenizer.encode(["the cat sat on the mat"])[0]
N, H, C, R = len(tokens), 2, 16, 4
x = tensor("embed_in.weight")[tokens]  # (N, D)
normed = norm(x, "layers.0.input_layernorm")
qkv = linear(normed, "layers.0.attention.query_key_value").view(N, H, 3, C)
angle = torch.arange(N)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / R)  # (N, R / 2)


def rotate(heads):
    """Rotate the first R dimensions of every head by the angle of its position."""
    a, b, rest = heads[..., :2], heads[..., 2:4], heads[..., 4:]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]  # (N, H, C) each
print(f"{N} tokens, hidden states {tuple(x.shape)}, queries {tuple(q.shape)}")

# %% Attention: every token sees itself and what came before
#
#     softmax(q kᵀ / sqrt(C)) v

scores = torch.einsum("qhc,khc->hqk", q, k) / C**0.5
is_future = torch.ones(N, N, dtype=torch.bool).triu(1)
scores = scores.masked_fill(is_future, -torch.inf)
seen = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(N, -1)
attended = linear(seen, "layers.0.attention.dense")

# %% MLP, residual, final norm
# GPT-NeoX adds attention and MLP to the stream in parallel: both read the same x.

normed = norm(x, "layers.0.post_attention_layernorm")
inner = F.gelu(linear(normed, "layers.0.mlp.dense_h_to_4h"))
after_block = x + attended + linear(inner, "layers.0.mlp.dense_4h_to_h")
by_hand = norm(after_block, "final_layer_norm")[-1]
print("last hidden state by hand:    ", by_hand[:4])

# %% The same from the library
# `load` builds the model without memory and fills it tensor by tensor. The stream is read at its
# last token, which is the text's own: by default no EOS token is put behind it. So whoever gives
# the same text to transformers reads the same state. `--append-eos yes` puts one there. Compare the
# two lines.

trunk, head = opened.load()
with torch.no_grad():
    hidden = trunk(pack([([], [tokens])]))[0]
print("last hidden state by minimore:", hidden[:4])

# %% A file that does not fit
# A reward model is this state times a head. This checkpoint is a language model, so it has no such
# head yet. What does not fit is refused in one line: say another hidden size, and the file
# disagrees.

(directory / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
try:
    Checkpoint(str(directory)).load()
except InputError as error:
    refusal = str(error).split("/")[-1]
print("with hidden_size 64:", refusal)
folder.cleanup()

# %% What was claimed
spans = [entry["data_offsets"] for entry in header.values()]
assert len(header) == 16 and sum(end - begin for begin, end in spans) == numbers
assert all(entry["dtype"] == "F32" for entry in header.values())
assert torch.allclose(by_hand, hidden, atol=1e-5) and hidden.std() > 0.5
assert head is None
assert "has shape (280, 32), but config.json asks for (280, 64)" in refusal

# %% Two exercises
# Exercise 1. Make one mistake at a time: attention and MLP one after the other, all of each head
#             rotated, a GELU approximated by tanh (`approximate="tanh"`), an eps of 1e-6. How far
#             does each move the hidden state? Which would you not have noticed?
# Exercise 2. Write the tensors into a new file with your own header, one of them twice as large.
#             What does `Checkpoint` say, and when?
