"""The loss with a few logits at a time, and the last step of a model by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_instruct.models.forward import demonstration_loss
from lit_instruct.models.packing import enable_packing
from lit_instruct.models.unembedding import check_unembedding, unembedding
from lit_instruct.types import ConfigError, DemonstrationBatch
from tests.helpers.numbers import assert_close
from tests.helpers.tiny import gradients
from tests.unit.models.networks import FAMILIES, VOCABULARY, ragged_rows, right_padded, tiny_model

SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 0.5},
}


def model_of(family: str) -> PreTrainedModel:
    if family not in SCALED:
        return tiny_model(family)
    torch.manual_seed(0)
    fields = FAMILIES.get(family, FAMILIES["llama"]) | SCALED[family] | {"vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32).eval()


def demonstrations() -> DemonstrationBatch:
    prompts, responses = ragged_rows()
    rows = right_padded([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    in_response = torch.arange(rows.response_ids_BR.shape[1]) >= lengths[:, None]
    return DemonstrationBatch(rows.response_ids_BR, rows.response_mask_BR, rows.response_mask_BR & in_response)


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(family: str, packed: bool, chunk: int) -> None:
    model = model_of(family)
    if packed:
        assert enable_packing(model).packs
    told: list[Any] = []
    for chunk_tokens in (None, chunk):
        model.zero_grad()
        loss, metrics = demonstration_loss(model, demonstrations(), chunk_tokens=chunk_tokens)
        loss.backward()
        told.append((loss, gradients(model), metrics["loss"], metrics["token_acc"], metrics["tokens"]))
    for got, need in zip(told[1], told[0], strict=True):
        assert_close(got, need)


def test_no_more_logits_than_a_chunk() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].flatten(0, -2).shape[0]))
    loss, metrics = demonstration_loss(model, demonstrations(), chunk_tokens=6)
    forward = len(seen)
    loss.backward()
    assert max(seen) == 6
    assert sum(seen[:forward]) == int(metrics["tokens"])
    assert seen[forward:] == seen[:forward][::-1], "each chunk once more on the way back"


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
def test_the_last_step_by_itself(family: str) -> None:
    model = model_of(family)
    ids = torch.tensor([[5, 9, 4, 30]])
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        assert_close(unembedding(model)(hidden), model(ids, use_cache=False).logits)
    model.train()
    check_unembedding(model)
    assert model.training


def test_a_step_of_another_kind_is_refused() -> None:
    model = tiny_model("llama")

    class Sharper(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **more: Any) -> Any:
            output = super().forward(*arguments, **more)
            output.logits = output.logits * 1.5
            return output

    model.__class__ = Sharper
    with pytest.raises(ConfigError, match="loss_chunk_tokens: the logits of Sharper are not its unembedding"):
        check_unembedding(model)
    lost = tiny_model("llama")
    lost.set_output_embeddings(nn.Linear(16, VOCABULARY))
    check_unembedding(lost)
