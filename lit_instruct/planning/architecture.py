"""How many parameters a decoder has, and which, from its Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lit_instruct.planning.refusal import refuse


class _Family(NamedTuple):
    """What the configurations of a model type do not say, because it is always so."""

    gated: bool  # feed-forward of three matrices instead of two
    biases: Literal["none", "query", "all"]  # on linear layers: on none, on queries, keys and values, on all
    norm: Literal["rms", "layer"]
    learned_positions: bool
    tied: bool  # the default of tie_word_embeddings
    head_norms: bool = False  # norms of queries and keys, as wide as a head
    packs_attention: bool = False  # queries, keys and values come out of one product


_FAMILIES = {
    "llama": _Family(gated=True, biases="none", norm="rms", learned_positions=False, tied=False),
    "mistral": _Family(gated=True, biases="none", norm="rms", learned_positions=False, tied=False),
    "qwen2": _Family(gated=True, biases="query", norm="rms", learned_positions=False, tied=False),
    "qwen3": _Family(gated=True, biases="none", norm="rms", learned_positions=False, tied=False, head_norms=True),
    "gpt2": _Family(gated=False, biases="all", norm="layer", learned_positions=True, tied=True, packs_attention=True),
    "gpt_neox": _Family(
        gated=False, biases="all", norm="layer", learned_positions=False, tied=False, packs_attention=True
    ),
}

# Our name -> the names that configurations have for it.
_NAMES = {
    "hidden": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}


class Architecture(NamedTuple):
    """A decoder's shape.

    Attributes:
        family: its ``model_type``.
        hidden: width of the residual stream.
        layers: blocks.
        heads: of the queries.
        key_heads: of keys and values.
        head_width: of one head.
        intermediate: width of the feed-forward.
        vocabulary: tokens.
        context: tokens that it can attend to.
        tied: the unembedding is the embedding.
        activation: of the feed-forward, by its name in configurations.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    activation: str

    @property
    def traits(self) -> _Family:
        """What is the same in all models of the family."""
        return _FAMILIES[self.family]

    @property
    def query_width(self) -> int:
        """Of all query heads together."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Of all key heads together; values have the same."""
        return self.key_heads * self.head_width

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of a block; queries, keys and values apart."""
        attention = [(self.hidden, self.query_width), (self.hidden, self.key_width), (self.hidden, self.key_width)]
        attention.append((self.query_width, self.hidden))
        up = [(self.hidden, self.intermediate)] * (2 if self.traits.gated else 1)
        return [*attention, *up, (self.intermediate, self.hidden)]

    @property
    def adapted(self) -> list[tuple[int, int]]:
        """(in, out) of each layer of a block that gets an adapter: what comes out of one product has one."""
        if self.traits.packs_attention:
            return [(self.hidden, self.query_width + 2 * self.key_width), *self.linears[3:]]
        return self.linears

    @property
    def block_matrices(self) -> int:
        """Weights of a block's linear layers: what multiplies each token, and what can be quantised."""
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def block_parameters(self) -> int:
        """All parameters of a block: matrices, biases and norms."""
        outputs = [out for _, out in self.linears]
        biased = {"none": [], "query": outputs[:3], "all": outputs}[self.traits.biases]
        head_norms = 2 * self.head_width if self.traits.head_norms else 0
        return self.block_matrices + sum(biased) + 2 * self.norm_parameters + head_norms

    @property
    def norm_parameters(self) -> int:
        """Of one norm as wide as the residual stream."""
        return self.hidden * (2 if self.traits.norm == "layer" else 1)

    @property
    def embedding_parameters(self) -> int:
        """Of tokens, and of positions where these are learned."""
        return self.hidden * (self.vocabulary + (self.context if self.traits.learned_positions else 0))

    @property
    def unembedding_matrix(self) -> int:
        """Weights between hidden states and logits, whether or not they are the embedding's."""
        return self.hidden * self.vocabulary

    @property
    def decoder_parameters(self) -> int:
        """Without the unembedding: the trunk of a reward or value model."""
        return self.embedding_parameters + self.layers * self.block_parameters + self.norm_parameters

    @property
    def parameters(self) -> int:
        """Of the language model; what is tied counts once."""
        return self.decoder_parameters + (0 if self.tied else self.unembedding_matrix)

    def adapter_parameters(self, rank: int) -> int:
        """LoRA's on all linear layers of all blocks.

        Args:
            rank: of the adapters; 0: none.
        """
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.adapted)


GPT3 = {
    "1.3b": Architecture("gpt2", 2048, 24, 16, 16, 128, 8192, 50257, 2048, True, "gelu_new"),
    "6b": Architecture("gpt2", 4096, 32, 32, 32, 128, 16384, 50257, 2048, True, "gelu_new"),
    "175b": Architecture("gpt2", 12288, 96, 96, 96, 128, 49152, 50257, 2048, True, "gelu_new"),
}
"""GPT-3's shapes (Brown et al. 2020, table 2.1) under InstructGPT's names. Its 1.3B row has 24 heads of 128, which is
not its width of 2048: 16 here. Layers whose attention is sparse there are dense here."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a configuration.

    Args:
        config: of a model, as in its ``config.json``.

    Returns:
        The shape.

    Raises:
        ConfigError: the model type is none that is known here, or a size is missing.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        refuse(
            "model",
            f"a configuration of the type {family!r}",
            f"one of {', '.join(_FAMILIES)}",
            "plan with a model of one of these types and about the same sizes",
        )
    sizes = {ours: _size(config, ours, names) for ours, names in _NAMES.items()}
    heads, traits = sizes["heads"], _FAMILIES[family]
    wide = config.get("intermediate_size") or config.get("n_inner")
    if wide is None and family != "gpt2":  # GPT-2 alone has a rule for it
        _size(config, "intermediate", ("intermediate_size",))
    tied = config.get("tie_word_embeddings")
    return Architecture(
        family=family,
        **sizes,
        key_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or (128 if traits.head_norms else sizes["hidden"] // heads),
        intermediate=wide or 4 * sizes["hidden"],
        tied=traits.tied if tied is None else tied,
        activation=config.get("hidden_act") or config.get("activation_function") or _activation(family),
    )


def _activation(family: str) -> str:
    return {"gpt2": "gelu_new", "gpt_neox": "gelu"}.get(family, "silu")


def _size(config: Mapping[str, Any], ours: str, names: tuple[str, ...]) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    return refuse("model", f"a configuration without {names[0]}", f"a whole number ({ours})", f"add {names[0]}")
