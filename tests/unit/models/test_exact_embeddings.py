"""Which parameters an 8-bit optimizer leaves in 32 bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_instruct.models.exact_embeddings import embedding_parameters, is_bitsandbytes
from lit_instruct.models.scalar_head import ScalarModel
from tests.unit.models.networks import tiny_model

UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("llama", UNTIED, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama", {"tie_word_embeddings": True}, {"model.embed_tokens.weight"}),
        ("gpt2", {}, {"transformer.wte.weight", "transformer.wpe.weight"}),
        (
            "gpt2",
            UNTIED,
            {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"},
        ),
        ("opt", {}, {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"}),
        ("gpt_neox", {}, {"gpt_neox.embed_in.weight", "lm_head.weight"}),
    ],
)
def test_embeddings_and_unembedding(family: str, changes: dict[str, Any], names: set[str]) -> None:
    model = tiny_model(family, **changes)
    parameters = dict(model.named_parameters())
    found = embedding_parameters(model)
    assert {id(parameter) for parameter in found} == {id(parameters[name]) for name in names}
    assert len(found) == len(names)


def test_a_scalar_model_has_no_unembedding() -> None:
    model = ScalarModel(tiny_model("llama", tie_word_embeddings=False).base_model)
    assert [id(p) for p in embedding_parameters(model)] == [id(model.trunk.embed_tokens.weight)]


def test_optimizers_of_torch_are_none_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(3))
    assert not is_bitsandbytes(torch.optim.AdamW([weight]))
    assert is_bitsandbytes(bitsandbytes.optim.AdamW8bit([weight]))
    assert is_bitsandbytes(bitsandbytes.optim.Lion([weight]))
