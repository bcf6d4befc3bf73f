"""What a pass keeps for its way back: the tensors that autograd holds on to, one by one.

Letters: D hidden, A all query heads, K all key heads, I feed-forward, H heads; of one token in one block::

    norm         its input x                        D stream       (twice a block)
                 x / rms, where the model's own code runs          D in fp32: not on a CPU in fp32 streams, see rms_norm
    linear       what they multiply                 D compute      once for all that share it; under autocast each casts
                                                                   its own
    attention    queries, keys, values, result      2A + 2K compute
                 a second result, joined from those of the segments: torch's fused kernel on a CPU     A compute
                 log-sum of the scores              4 H bytes; or, short segments in bf16 on a CPU, all weights:
                                                    H x keys compute
    adapter      what stands between its two matrices  rank compute   each; under autocast it casts the layer's input,
                                                                   which a frozen layer has no other need of
    feed-forward gate, its silu, up, product        4I compute; GPT-2's gelu 5I, torch's gelu 2I

*Stream* is the residual stream's dtype, fp32 but in bf16-true; *compute* that of products. Under autocast the bf16
copies of the matrices are held too. ``tests/unit/planning`` counts the tensors that autograd really saves, family by
family.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_instruct.planning.architecture import Architecture

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]

_SHORT = 384  # of models/short_attention.py, which this module does not import: it would bring torch


class Numerics(NamedTuple):
    """In what dtype a network computes, and with whose kernels.

    Attributes:
        precision: Lightning's name.
        on_cpu: the kernels are those for a CPU.
        checkpointing: only the inputs of blocks are kept.
    """

    precision: Precision
    on_cpu: bool
    checkpointing: bool = False

    @property
    def mixed(self) -> bool:
        """Whether autocast casts fp32 weights for each product."""
        return self.precision == "bf16-mixed"

    @property
    def parameter(self) -> int:
        """Bytes of a trained parameter and of its gradient."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def compute(self) -> int:
        """Bytes of what products read and write."""
        return 4 if self.precision == "32-true" else 2

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream."""
        return self.parameter


class Pass(NamedTuple):
    """The rows that go through a network together.

    Attributes:
        tokens: of all rows.
        rows: how many.
        logits: positions at which there are logits; 0: a scalar head.
    """

    tokens: float
    rows: float
    logits: float


def kept_in_block(shape: Architecture, numerics: Numerics, one: Pass, rank: int = 0) -> float:
    """Bytes that one block keeps for the backward pass, its bf16 copies of weights included."""
    per_token = _norms(shape, numerics) + _attention(shape, numerics, one) + _feed_forward(shape, numerics)
    per_token += rank * len(shape.adapted) * numerics.compute
    return per_token * one.tokens + _weight_copies(shape, numerics, rank)


def kept(shape: Architecture, numerics: Numerics, one: Pass, rank: int = 0) -> float:
    """Bytes that a whole decoder keeps for the backward pass, without logits.

    Args:
        shape: of the decoder.
        numerics: of the run.
        one: the pass.
        rank: of its adapters; 0: none.

    Returns:
        Bytes at the end of the forward pass.
    """
    block = shape.hidden * numerics.stream * one.tokens
    if not numerics.checkpointing:
        block = kept_in_block(shape, numerics, one, rank)
    # Behind the last block: its output, which the last norm holds, and the states whose logits are wanted.
    last = shape.hidden * (numerics.stream + _normed(shape, numerics)) * one.tokens
    last += shape.hidden * numerics.compute * one.logits
    unembedding = shape.unembedding_matrix * 2 if numerics.mixed and one.logits else 0
    return shape.layers * block + last + unembedding


def forward_workspace(shape: Architecture, numerics: Numerics, one: Pass) -> float:
    """Bytes that are alive at the widest place of a block's forward pass when nothing is kept.

    There are the residual stream, the norm of it, and at the same time queries, keys, values with their rotated selves,
    or the feed-forward's three widest tensors.
    """
    compute = numerics.compute
    attention = (2 * shape.query_width + 2 * shape.key_width) * compute + shape.query_width * compute
    weights = _attention_weights(shape, numerics, one)
    feed_forward = 3 * shape.intermediate * compute
    widest = max(attention + weights, feed_forward)
    return one.tokens * (shape.hidden * (numerics.stream + 4) + widest) + _weight_copies(shape, numerics) / 3


def backward_workspace(shape: Architecture, numerics: Numerics, one: Pass, rank: int = 0) -> float:
    """Bytes that are alive at the widest place of a block's backward pass, beside what was kept.

    These are gradients: of the stream, and of the product, gate and up of the feed-forward (or before and behind its
    activation). With checkpointing the block's own tensors are there again.
    """
    wide = (3 if shape.traits.gated else 2) * shape.intermediate * numerics.compute
    again = kept_in_block(shape, numerics, one, rank) if numerics.checkpointing else 0.0
    return one.tokens * (shape.hidden * numerics.stream + wide) + again


def logits(shape: Architecture, numerics: Numerics, one: Pass) -> float:
    """Bytes of the logits; their gradient takes as many."""
    return one.logits * shape.vocabulary * numerics.compute


def _norms(shape: Architecture, numerics: Numerics) -> float:
    """The two norms of a block with the linear layers' inputs that come out of them."""
    inputs = 1 if shape.family == "gpt_neox" else 2  # attention and feed-forward read the same stream there
    readers = 2
    if numerics.mixed:
        readers = (1 if shape.traits.packs_attention else 3) + (2 if shape.traits.gated else 1)
    own = inputs * shape.hidden * numerics.stream + readers * shape.hidden * numerics.compute
    moments = 2 * numerics.stream if shape.traits.norm == "layer" else 4
    return own + 2 * shape.hidden * _normed(shape, numerics) + 2 * moments


def _normed(shape: Architecture, numerics: Numerics) -> int:
    """Bytes a number that a norm written out in tensor operations keeps beside its input."""
    if shape.traits.norm == "layer" or (numerics.on_cpu and numerics.stream == 4):
        return 0
    return 4


def _attention(shape: Architecture, numerics: Numerics, one: Pass) -> float:
    queries, keys, compute = shape.query_width, shape.key_width, numerics.compute
    projected = queries + 2 * keys
    if shape.family == "gpt_neox":
        projected += queries + keys  # rotated ones, beside the three that came out of one product
    head_norms = 0
    if shape.traits.head_norms:
        # Each norm's input, in fp32 and in half precision over its root mean square too, and that of each head.
        beside = 4 if numerics.on_cpu and compute == 4 else 4 + compute
        head_norms = (queries + keys) * beside + 4 * (shape.heads + shape.key_heads)
    if _is_short(numerics, one):
        return (projected + queries) * compute + head_norms + _attention_weights(shape, numerics, one)
    results = 2 if numerics.on_cpu else 1
    return (projected + results * queries) * compute + head_norms + 4 * shape.heads


def _attention_weights(shape: Architecture, numerics: Numerics, one: Pass) -> float:
    """Bytes a token of the weights that short attention holds."""
    return shape.heads * one.tokens / one.rows * numerics.compute if _is_short(numerics, one) else 0.0


def _is_short(numerics: Numerics, one: Pass) -> bool:
    return numerics.on_cpu and numerics.compute == 2 and one.tokens / one.rows <= _SHORT


def _feed_forward(shape: Architecture, numerics: Numerics) -> float:
    wide, compute = shape.intermediate, numerics.compute
    if shape.traits.gated:
        return 4 * wide * compute
    if shape.activation == "gelu_new":
        # x (for its cube), tanh, 1 + tanh, x / 2 and the result. Autocast on a GPU takes powers in fp32, and what
        # comes of them stays so.
        in_fp32 = numerics.mixed and not numerics.on_cpu
        return wide * (3 * 4 + 2 * 2 if in_fp32 else 5 * compute)
    return 2 * wide * compute


def _weight_copies(shape: Architecture, numerics: Numerics, rank: int = 0) -> float:
    adapters = rank * sum(inputs + outputs for inputs, outputs in shape.adapted)
    return 2.0 * (shape.block_matrices + adapters) if numerics.mixed else 0.0
