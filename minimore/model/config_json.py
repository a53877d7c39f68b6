"""config.json with typed access: what all families spell alike, as fields of ModelConfig."""

import json
from collections.abc import Sequence
from typing import Any

from ..options import InputError, require

LARGEST = 2**31  # of any number in a config.json
MOST_BLOCKS, MOST_PARAMETERS = 1000, 10**12  # what no checkpoint has; more is a damaged config.json

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


KINDS = {
    int: "a positive whole number",
    float: "a positive number",
    bool: "true or false",
    str: "a string",
}

Fields = dict[str, Any]  # of ModelConfig
SIZE_KEYS = ("hidden_size", "num_attention_heads", "num_hidden_layers")  # width, heads, blocks


class Json:
    """config.json with typed access: a wrong or missing value is one clear line."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """values[key] as int, float, bool or str; the default where it is missing or null.

        Raises InputError for anything else.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        is_in_range = kind not in (int, float) or type(value) is not kind or 0 < value < LARGEST
        if type(value) is not kind or not is_in_range:
            what = f"is {json.dumps(value)[:80]}" if key in self.values else "is missing"
            raise InputError(f'{self.where}: "{key}" {what}; expected {KINDS[kind]}')
        return value

    def is_null(self, key: str) -> bool:
        """Whether a key is missing or null."""
        return self.values.get(key) is None

    def part(self, key: str) -> "Json":
        """values[key], which is an object; an empty one where it is missing or null."""
        values = {} if self.is_null(key) else self.values[key]
        require(isinstance(values, dict), f'{self.where}: "{key}" is not an object')
        return Json(values, f"{self.where}: {key}")

    def refuse(self, key: str, what: str) -> None:
        """Refuse a config.json in which a key is set; what: which models have it."""
        require(
            not self.values.get(key),
            f'{self.where}: "{key}" is set; {what} are not supported',
        )

    def activation(self, default: str, key: str = "hidden_act") -> str:
        """The name of an activation, a key of trunk.ACTIVATIONS."""
        name = self.get(key, str, default)
        require(
            name in ACTIVATION_NAMES,
            f'{self.where}: "{key}" is {name!r}; known: {", ".join(ACTIVATION_NAMES)}',
        )
        return ACTIVATION_NAMES[name]

    # ---- rotation ----

    def rope(
        self,
        head_width: int,
        base_key: str,
        share_key: str | None,
        share: float,
        longest: int,
        base: float = 10000.0,
        scaling: "Json | None" = None,
    ) -> Fields:
        """Rotary fields, in the old spelling (rope_scaling) and in the new (rope_parameters).

        share_key: the key of the share of a head that rotates, with its default; None rotates whole
        heads. longest, base: the family's own max_position_embeddings and base. scaling: the object
        that describes rotation, where it is not one of those two.
        """
        scaling = scaling or self._rope_object()
        base = scaling.get("rope_theta", float, self.get(base_key, float, base))
        if share_key is not None:
            default = self.get(share_key, float, share)
            share = scaling.get("partial_rotary_factor", float, default)
        rotary_width = int(head_width * share)
        # An odd width rotates one dimension more, as in transformers.
        require(
            0 < rotary_width + rotary_width % 2 <= head_width,
            f"{self.where}: {rotary_width} rotary dimensions do not fit in heads of width"
            f" {head_width}",
        )
        fields = {
            "rotary_width": rotary_width,
            "rope_base": base,
            "named_positions": self.get("max_position_embeddings", int, longest),
        }
        return fields | self._rope_scaling(scaling, longest)

    def _rope_object(self) -> "Json":
        """The object that describes rotation; empty if there is none."""
        is_old = self.values.get("rope_scaling") not in (None, {})
        return self.part("rope_scaling" if is_old else "rope_parameters")

    def _rope_scaling(self, scaling: "Json", longest: int) -> Fields:
        """How frequencies are changed for longer texts."""
        kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
        if kind == "default":
            return {}
        if kind == "linear":
            return {"rope_factor": scaling.get("factor", float)}
        if kind == "dynamic":  # it scales texts that are longer than those of pretraining alone
            return {"rope_positions": self.get("max_position_embeddings", int, longest)}
        require(
            kind == "llama3",
            f"{self.where}: rope scaling {kind!r} is not supported;"
            " known: default, dynamic, linear, llama3",
        )
        key = "original_max_position_embeddings"
        if self.is_null(key):
            default = self.get("max_position_embeddings", int, longest)
            original = scaling.get(key, int, default)
        else:
            original = self.get(key, int)
        factor = scaling.get("factor", float)
        low, high = scaling.get("low_freq_factor", float), scaling.get("high_freq_factor", float)
        require(
            low < high, f'{self.where}: "low_freq_factor" must be smaller than "high_freq_factor"'
        )
        return {"rope_llama3": (factor, low, high, original)}

    # ---- windows ----

    def windows(self, window: int | None, slides: Sequence[bool]) -> tuple[int | None, ...]:
        """The sliding window of every block; () if there is none.

        slides: whether it slides in a block, for every block; `layer_types` may say otherwise.
        """
        types, blocks = self.values.get("layer_types"), len(slides)
        if types is None:
            types = [
                "sliding_attention" if window and block_slides else "full_attention"
                for block_slides in slides
            ]
        known = ("sliding_attention", "full_attention")
        is_whole = (
            isinstance(types, list) and len(types) == blocks and all(t in known for t in types)
        )
        require(
            is_whole,
            f'{self.where}: "layer_types" is {json.dumps(types)[:80]};'
            f" expected {blocks} of full_attention or sliding_attention",
        )
        if not window:
            return ()
        return tuple(window if t == "sliding_attention" else None for t in types)

    # ---- sizes ----

    def sizes(
        self,
        mlp_key: str = "intermediate_size",
        kv_heads: int | None = None,
        head_width: int | None = None,
        plain: bool = False,
        keys: tuple[str, str, str] = SIZE_KEYS,
        mlp_width: int | None = None,
    ) -> Fields:
        """The sizes that nearly all families spell alike.

        kv_heads, head_width, mlp_width: a family's own defaults. plain: the family knows no other
        number of key/value heads or head width, so these keys are not read. keys: those of width,
        heads and blocks.
        """
        if plain:
            own_keys = ("num_key_value_heads", "head_dim")
            values = {key: value for key, value in self.values.items() if key not in own_keys}
            plain_json = Json(values, self.where)
            return plain_json.sizes(mlp_key, kv_heads, head_width, keys=keys, mlp_width=mlp_width)
        width_key, heads_key, blocks_key = keys
        width, heads = self.get(width_key, int), self.get(heads_key, int)
        if "num_key_value_heads" in self.values or kv_heads is None:
            kv_heads = heads
        kv_heads = self.get("num_key_value_heads", int, kv_heads)
        has_head_width = head_width is not None or not self.is_null("head_dim")
        require(
            (has_head_width or width % heads == 0) and heads % kv_heads == 0,
            f"{self.where}: {width_key} {width}, {heads_key} {heads} and"
            f" num_key_value_heads {kv_heads} do not divide",
        )
        fields = {
            "vocabulary": self.get("vocab_size", int),
            "width": width,
            "blocks": self.get(blocks_key, int),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": self.get("head_dim", int, head_width or max(1, width // heads)),
            "mlp_width": self.get(mlp_key, int, mlp_width),
        }
        self._require_a_model_that_exists(fields)
        return fields

    def _require_a_model_that_exists(self, fields: Fields) -> None:
        attention = (fields["heads"] + fields["kv_heads"]) * fields["head_width"]
        of_blocks = 2 * fields["blocks"] * (attention + fields["mlp_width"])
        parameters = fields["width"] * (fields["vocabulary"] + of_blocks)
        require(
            fields["blocks"] <= MOST_BLOCKS and parameters <= MOST_PARAMETERS,
            f"{self.where}: describes {fields['blocks']} blocks and about {parameters:.0e}"
            " parameters; expected a model that exists",
        )
