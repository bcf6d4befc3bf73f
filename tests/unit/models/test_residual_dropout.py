"""Residual dropout on many families: where it acts is worked out anew from what the blocks add."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.residual_dropout import add_residual_dropout, residual_branches
from lit_instruct.types import ConfigError
from tests.helpers.numbers import assert_close

WIDTH, VOCABULARY = 16, 41
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "num_key_value_heads": 1}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DROPOUTS = dict.fromkeys(("resid_pdrop", "hidden_dropout", "attention_dropout", "dropout", "attn_pdrop"), 0.3)

# name -> what differs from the common configuration; own dropouts are given too, which loading switches off
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 8},
    "mixtral": _EXPERTS,  # attention and a mixture of experts, whose ModuleLists are no blocks
    "granite": {"residual_multiplier": 0.3},  # what is added is a multiple of what the branch gives
    "gemma2": _GEMMA,  # norms before and after each branch
    "gemma3_text": _GEMMA,
    "olmo2": {},  # norms only after each branch
    "cohere": {},  # parallel
    "phi": {},  # parallel, one module for both dropouts of its own
    "gpt_neox": {},
    "gpt_neox one by one": {"use_parallel_residual": False},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "falcon": {},  # parallel, adds in place
    "falcon one by one": {"parallel_attn": False, "alibi": True, "multi_query": False},
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "init_std": 0.3},
    "opt norm of the sum": {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False, "init_std": 0.3},
    "openai-gpt": _GPT2,  # norms of the sum
    "bloom": {"n_layer": 2, "n_head": 2},  # adds inside attention and feed-forward
    "mpt": {"d_model": WIDTH, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2},  # adds inside feed-forward only
    "stablelm": {},
}
_BRANCHES = {"phi": 1}  # modules a block, where not 2


def config_of(name: str) -> Any:
    fields = _COMMON | _DROPOUTS | FAMILIES[name]
    return AutoConfig.for_model(name.partition(" ")[0], **fields)


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return load_language_model(config_of(name))


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, seed: int = 0, ids: Tensor | None = None) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    (found,) = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == 2 and "experts" not in type(m[0]).__name__
    ]
    return found


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_acts_in_training_and_not_in_eval(name: str) -> None:
    model = model_of(name)
    plain = logits(model)
    assert torch.equal(logits(model, seed=1), plain)  # no dropout of its own is left
    add_residual_dropout(model, 0.2)
    assert model.training
    trained = logits(model)
    assert not torch.allclose(trained, plain)
    assert not torch.allclose(logits(model, seed=1), trained)
    assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model.eval(), seed=1), logits(model_of(name).eval()))
    assert not torch.allclose(logits(model.train(), seed=1), plain)


def watched(model: PreTrainedModel, run: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """What each branch gave before and after the dropout, call by call: hooks before and after that of the dropout."""
    pairs: list[list[Tensor]] = []
    handles = []
    for module in dict.fromkeys(branch for block in residual_branches(model) for branch in block):

        def before(_: nn.Module, __: Any, output: Any) -> None:
            pairs.append([first(output).clone()])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            pairs[-1].append(first(output).clone())

        handles += [module.register_forward_hook(before, prepend=True), module.register_forward_hook(after)]
    run()
    for handle in handles:
        handle.remove()
    return [(before, after) for before, after in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_share_of_each_branch_is_dropped_and_the_rest_scaled(name: str) -> None:
    model = model_of(name)
    add_residual_dropout(model, 0.2)
    ids = torch.randint(3, VOCABULARY, (16, 40), generator=torch.Generator().manual_seed(1))
    pairs = watched(model, lambda: logits(model, ids=ids))
    assert len(pairs) == 2 * 2  # two blocks of two branches
    masks = []
    for before, after in pairs:
        assert before.numel() == 16 * 40 * WIDTH
        dropped = after == 0
        assert abs(float(dropped.float().mean()) - 0.2) < 0.02  # 10,240 draws: five standard deviations
        assert_close(after[~dropped], before[~dropped] / 0.8)
        masks.append(dropped.flatten())
    for number, mask in enumerate(masks):  # each draws for itself
        assert not any(torch.equal(mask, other) for other in masks[number + 1 :])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_whose_branches_are_all_dropped_passes_its_input_on(name: str) -> None:
    """With p near 1 nothing is added: what leaves a block is what entered it, or a norm of that."""
    model = model_of(name)
    add_residual_dropout(model, 1 - 1e-12)  # 2 x 10,000 draws: none survives
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        seen.append((entered.clone(), first(output).clone()))

    blocks = blocks_of(model)
    for block in blocks:
        block.register_forward_hook(note, with_kwargs=True)
    logits(model)
    norms: dict[str, list[str]] = {
        "opt norm of the sum": ["self_attn_layer_norm", "final_layer_norm"],
        "openai-gpt": ["ln_1", "ln_2"],
    }
    assert len(seen) == 2
    for block, (entered, left) in zip(blocks, seen, strict=True):
        expected = entered
        for norm in norms.get(name, []):
            expected = getattr(block, norm)(expected)
        assert_close(left, expected)


@pytest.mark.parametrize("name", ["phi", "cohere", "falcon", "gpt_neox", "gptj"])
def test_the_expectation_is_kept(name: str) -> None:
    """Of what a block adds, on average over many draws: parallel branches, of which neither reads the other's noise."""
    model = model_of(name)
    added: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        added.append(first(output) - (args[0] if args else kwargs["hidden_states"]))

    blocks_of(model)[0].register_forward_hook(note, with_kwargs=True)
    logits(model.eval(), ids=tokens(1)[:1])
    add_residual_dropout(model.train(), 0.2)
    logits(model, ids=tokens(1)[:1].expand(5_000, 1))
    expected, *_, drawn = added
    # One element of one draw is off by half its size (sqrt(p / (1 - p))), the mean of 5,000 by 0.007: six times that.
    assert float((drawn.mean(dim=0) - expected[0]).abs().max()) < 0.06 * float(expected.abs().max())


def test_names_of_the_branches() -> None:
    """By hand, for the shapes that differ; ``post_attention_layernorm`` is no branch in Llama, but is in OLMo 2."""
    expected = {
        "llama": ["self_attn", "mlp"],
        "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],
        "gemma2": ["post_attention_layernorm", "post_feedforward_layernorm"],
        "gpt_neox": ["post_attention_dropout", "post_mlp_dropout"],
        "opt": ["self_attn", "fc2"],
        "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
        "mpt": ["resid_attn_dropout", "ffn.down_proj"],
        "mixtral": ["self_attn", "mlp"],
    }
    for name, names in expected.items():
        model = model_of(name)
        for block, found in zip(blocks_of(model), residual_branches(model), strict=True):
            assert found == [block.get_submodule(part) for part in names], name


def test_it_leaves_no_trace() -> None:
    model, plain = model_of("gpt2"), model_of("gpt2")
    add_residual_dropout(model, 0.2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.to_dict() == plain.config.to_dict()
    assert pickle.loads(pickle.dumps(model)) is not None  # processes are spawned with the model


def test_it_can_be_taken_off_again() -> None:
    model = model_of("llama")
    plain = logits(model)
    handles = add_residual_dropout(model, 0.5)
    assert not torch.allclose(logits(model), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), plain)


def test_looking_for_the_branches_changes_nothing() -> None:
    model = model_of("llama")
    model.model.layers[0].eval()  # a part that was in eval mode stays there
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    residual_branches(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, weights, model.parameters()))
    assert [m.training for m in (model, model.model.layers[0], model.model.layers[1])] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputed_activations_see_the_same_mask(name: str, reentrant: bool) -> None:
    """Activation checkpointing runs a block twice; other masks in the second run would give other gradients."""

    def gradients(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(11)
        model(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, saving = model_of(name), model_of(name)
    passes = []
    for model in (plain, saving):
        add_residual_dropout(model, 0.3)
    residual_branches(saving)[0][0].register_forward_hook(lambda *_: passes.append(1))
    for block in blocks_of(saving):
        run = block.forward
        block.forward = lambda *x, run=run, **more: checkpoint(partial(run, **more), *x, use_reentrant=reentrant)
    expected, found = gradients(plain), gradients(saving)
    assert len(passes) == 2  # run and recomputed
    assert_close(found, expected)


def test_what_cannot_be_found_is_refused() -> None:
    class Odd(nn.Module):
        """Multiplies where others add."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states * self.inner(hidden_states)

    model = model_of("llama")
    model.model.layers[1] = Odd()
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*Do: set residual_dropout to 0"):
        add_residual_dropout(model, 0.2)
    assert add_residual_dropout(model, 0.0) == []
    encoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **_COMMON))
    with pytest.raises(ConfigError, match="BertLMHeadModel"):
        add_residual_dropout(encoder, 0.2)


def test_half_of_the_branches_is_not_enough() -> None:
    """A feed-forward that adds the stream itself from its only input hides its branch: refused, not half done."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(x @ self.weight)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.rest = nn.Linear(WIDTH, WIDTH), Whole()

        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return self.rest(hidden_states + self.attention(hidden_states))

    model = model_of("llama")
    model.model.layers[0] = Block()
    with pytest.raises(ConfigError, match="it cannot be seen"):
        residual_branches(model)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_the_range(p: float) -> None:
    with pytest.raises(ConfigError, match=r"residual_dropout: got .*; need at least 0 and less than 1"):
        add_residual_dropout(model_of("llama"), p)
