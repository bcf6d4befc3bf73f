"""One run as planning sees it: networks, sizes of the work, and where things lie."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from lit_instruct.planning.activations import Numerics, Pass
from lit_instruct.planning.architecture import Architecture
from lit_instruct.planning.networks import Network, Plan

Stage = Literal["sft", "rm", "ppo"]
Strategy = Literal["sharded", "replicated"]


class Lengths(NamedTuple):
    """Tokens of a row: the mean says how long things take, the longest how much memory they need.

    Attributes:
        prompt: mean.
        response: mean.
        longest_prompt: most.
        longest_response: most.
    """

    prompt: float
    response: float
    longest_prompt: int
    longest_response: int

    @property
    def mean(self) -> float:
        """Prompt and response."""
        return self.prompt + self.response

    @property
    def longest(self) -> int:
        """Prompt and response."""
        return self.longest_prompt + self.longest_response


class Text(NamedTuple):
    """Pretraining text that is mixed in.

    Attributes:
        ratio: chunks for each row of an optimizer step.
        micro_rows: chunks a pass on each device.
        chunk_tokens: of a chunk.
        measured: gradients of the text are copied, so that their norm is known.
    """

    ratio: float
    micro_rows: int
    chunk_tokens: int
    measured: bool


class Work(NamedTuple):
    """What one iteration does, over all devices. SFT and reward model: an iteration is one optimizer step.

    Attributes:
        rows: PPO: prompts; SFT: demonstrations; reward model: prompts with their responses.
        step_rows: rows of one optimizer step.
        micro_rows: most rows of a pass, on each device.
        micro_tokens: most tokens of a pass, on each device; None: any number.
        rollout_rows: rows decoded together, on each device.
        inner_epochs: passes over a rollout.
        lengths: of rows.
        responses: to one prompt: reward model 4 to 9, else 1.
        text: mixed in, or None.
        logit_tokens: most positions whose logits are there together; None: all of a pass.
    """

    rows: int
    step_rows: int
    micro_rows: int
    micro_tokens: int | None
    rollout_rows: int
    inner_epochs: int
    lengths: Lengths
    responses: float = 1.0
    text: Text | None = None
    logit_tokens: int | None = None


class Setup(NamedTuple):
    """A run.

    Attributes:
        stage: of training.
        plan: which networks share what.
        networks: all of them, the first one is the one that samples.
        numerics: of the trained ones.
        work: of an iteration.
        devices: how many.
        strategy: sharded: parameters, gradients and optimizer state are spread (FSDP2); replicated: all have all (DDP).
        optimizer_bytes: of state for each weight of a trained matrix in a block: Adam in fp32 has 8, in 8 bit 2.
        averages: an average of the policy's weights is kept in fp32 (``WeightEMA``).
        rollout_bytes: of a weight of a rounded copy that samples; None: the policy itself samples.
        rollout: gathered: each device has the sampler's weights whole; synced: block by block at each token.
        recompute_logprobs: the policy reads its responses anew.
        offload_frozen: frozen networks are on the device until the updates begin, and not during these.
    """

    stage: Stage
    plan: Plan
    networks: tuple[Network, ...]
    numerics: Numerics
    work: Work
    devices: int = 1
    strategy: Strategy = "sharded"
    optimizer_bytes: float = 8.0
    averages: bool = False
    rollout_bytes: int | None = None
    rollout: Literal["gathered", "synced"] = "gathered"
    recompute_logprobs: bool = True
    offload_frozen: bool = False

    @property
    def sharded(self) -> bool:
        """Whether anything is spread over devices."""
        return self.strategy == "sharded" and self.devices > 1

    @property
    def share(self) -> float:
        """The part of every network that a device keeps."""
        return 1.0 / self.devices if self.sharded else 1.0

    @property
    def step_rows(self) -> float:
        """Rows of an optimizer step, on each device."""
        return self.work.step_rows / self.devices

    @property
    def trained(self) -> list[Network]:
        """Networks with gradients."""
        return [network for network in self.networks if network.trained]

    def state_bytes(self, network: Network) -> float:
        """Optimizer state of a network; where matrices have one of 8 bits, embeddings, norms and biases keep fp32's."""
        # All that adapters train is matrices, but for a head; and it is far less than the matrices below them.
        matrices = min(network.trained, network.shape.layers * network.shape.block_matrices)
        return self.share * (matrices * self.optimizer_bytes + (network.trained - matrices) * 8.0)

    def passes(self, rows: float, row_tokens: float) -> int:
        """How many forward passes so many rows take on a device."""
        return max(math.ceil(rows / self.rows_together(row_tokens)), 1)

    def rows_together(self, row_tokens: float) -> float:
        """Rows of one pass; a single row that is longer than ``micro_tokens`` goes by itself."""
        by_tokens = math.inf if self.work.micro_tokens is None else self.work.micro_tokens // row_tokens
        return max(min(self.work.micro_rows, by_tokens, self.step_rows), 1.0)

    def largest_pass(self) -> Pass:
        """The pass of an update with the longest rows."""
        lengths = self.work.lengths
        row_tokens = lengths.longest_prompt + lengths.longest_response * self.work.responses
        rows = self.rows_together(row_tokens)
        wanted = 0.0 if self.stage == "rm" else rows * lengths.longest_response
        return Pass(rows * row_tokens, rows, wanted)

    def text_pass(self) -> Pass:
        """The pass over pretraining text, of which every token is predicted."""
        assert self.work.text is not None
        rows = min(self.work.text.micro_rows, max(self.work.text.ratio * self.step_rows, 1.0))
        tokens = rows * self.work.text.chunk_tokens
        return Pass(tokens, rows, tokens)

    def backward_passes(self) -> int:
        """Passes of the module's own loss in one optimizer step, on each device."""
        return self.passes(self.step_rows, self.work.lengths.longest)


def key_value_bytes(shape: Architecture, number: int) -> float:
    """Bytes of a token's keys and values in all layers.

    Args:
        shape: of the decoder.
        number: bytes of one number.
    """
    return 2.0 * shape.layers * shape.key_width * number
