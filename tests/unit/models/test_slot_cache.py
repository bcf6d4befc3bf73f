from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_instruct.models.slot_cache import SlotCache, SlotStep, cache_keyword
from tests.helpers.numbers import assert_close
from tests.unit.models.networks import tiny_model

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
CPU = torch.device("cpu")


def attended(query: Tensor, keys: Tensor, values: Tensor, length: int, head: int, options: dict) -> Tensor:
    """One query of one row against its own keys, in plain fp64 numbers."""
    window = options["window"]
    first = 0 if window is None else max(0, length - window)
    scores = []
    for column in range(first, length):
        score = float(query.double() @ keys[column].double()) * options["scale"]
        if options["softcap"] is not None:
            score = options["softcap"] * math.tanh(score / options["softcap"])
        scores.append(score)
    total = sum(math.exp(score) for score in scores)
    if options["sinks"] is not None:
        total += math.exp(float(options["sinks"][head]))
    seen = values[first:length].double()
    return sum(math.exp(score) / total * value for score, value in zip(scores, seen, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 20])
@pytest.mark.parametrize("extra", ["", "softcap", "sinks"])
def test_each_row_sees_its_own_columns(dtype, window, extra):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 7, 2]
    query = torch.randn(4, HEADS, 1, WIDTH, generator=generator).to(dtype)
    store = torch.randn(2, 4, 7, KEY_HEADS, WIDTH, generator=generator).to(dtype)
    key, value = (tensor.transpose(1, 2) for tensor in store)  # what lies behind a row's end is not zero
    options = {
        "scale": 0.4,
        "window": window,
        "softcap": 1.5 if extra == "softcap" else None,
        "sinks": torch.randn(HEADS, generator=generator).to(dtype) if extra == "sinks" else None,
    }
    step = SlotStep(torch.tensor(lengths), 7)
    for _ in range(2):  # the second layer that asks takes the mask of the first
        result = step.attend(query, key, value, **options)
        assert result.shape == (4, 1, HEADS, WIDTH)
        for row, length in enumerate(lengths):
            for head in range(HEADS):
                own = head // (HEADS // KEY_HEADS)
                need = attended(query[row, head, 0], key[row, own], value[row, own], length, head, options)
                assert_close(result[row, 0, head], need, dtype=dtype)


def test_layers_with_other_windows_do_not_share_a_mask():
    query, key = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
    value = torch.arange(4.0).view(1, 1, 4, 1)
    step = SlotStep(torch.tensor([4]), 4)
    seen = [step.attend(query, key, value, scale=1.0, window=window) for window in (None, 2, None, 1)]
    assert_close(torch.stack(seen).flatten(), [1.5, 2.5, 1.5, 3.0])


def written(slots: list[int], columns: list[int], heads: int = 2, width: int = 3) -> Tensor:
    """``[1, heads, T, width]`` in which each number says where it is going."""
    place = torch.tensor([100 * slot + column for slot, column in zip(slots, columns, strict=True)])
    return (place[:, None, None] + torch.arange(heads)[:, None] * 0.1 + torch.zeros(width)).transpose(0, 1)[None]


def write(cache: SlotCache, slots: list[int], columns: list[int], read: tuple[int, int] | None, layer: int = 0):
    new = written(slots, columns)
    keys = new if read is None else new.permute(2, 1, 0, 3)  # a step has one token a row
    cache.write_at(torch.tensor(slots), torch.tensor(columns), read=read)
    return keys, cache.update(keys, -keys, layer)


def test_tokens_go_to_their_slots_and_stay_when_the_cache_grows():
    cache = SlotCache(3, 4, CPU)
    prompts, returned = write(cache, [2, 2, 0, 0, 0], [0, 1, 0, 1, 2], None)
    assert returned[0] is prompts  # a packed row looks at itself, not at the cache
    write(cache, [1], [0], None)
    cache.make_room(9)
    assert cache.columns >= 9
    _, (keys, values) = write(cache, [0, 1, 2], [3, 1, 2], (3, 4))
    assert keys.shape == (3, 2, 4, 3)
    for slot, length in ((0, 4), (1, 2), (2, 3)):
        need = written([slot] * length, list(range(length)))[0]
        assert torch.equal(keys[slot, :, :length], need)
        assert torch.equal(values[slot, :, :length], -need)
    assert keys.isfinite().all()  # also where nothing was written
    _, (keys, _) = write(cache, [0, 1], [4, 2], (2, 5))
    assert keys.shape == (2, 2, 5, 3)


def test_a_copied_slot_is_a_row_of_its_own_in_every_layer():
    cache = SlotCache(4, 4, CPU)
    for layer in (0, 1):
        write(cache, [3, 3, 1], [0, 1, 0], None, layer)
    cache.copy_slots([3, 3], [0, 2], 2)
    for layer in (0, 1):
        _, (keys, _) = write(cache, [0, 1, 2, 3], [2, 1, 2, 2], (4, 3), layer)
        for slot, origin in ((0, 3), (2, 3), (3, 3)):
            need = torch.cat([written([origin] * 2, [0, 1]), written([slot], [2])], dim=2)[0]
            assert torch.equal(keys[slot], need)
        assert torch.equal(keys[1, :, :2], written([1, 1], [0, 1])[0])


def test_room_that_is_there_is_not_made_anew():
    cache = SlotCache(1, 4, CPU)
    cache.make_room(4)
    assert cache.columns == 4


def test_the_keyword_is_one_that_the_model_knows():
    model = tiny_model("llama")
    cache = SlotCache(1, 4, CPU)
    cache.write_at(torch.zeros(2, dtype=torch.long), torch.arange(2), read=None)
    model(torch.tensor([[5, 6]]), use_cache=True, **{cache_keyword(model): cache})
    assert cache.copy_slots([0], [0], 2) is None
    assert len(cache._stores) == 2
