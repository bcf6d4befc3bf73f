"""What networks keep and what phases add, against numbers worked out by hand and the code that they are about."""

from __future__ import annotations

import pytest
import torch

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.slot_cache import SlotCache
from lit_instruct.modules.optimizers import make_optimizer
from lit_instruct.planning.activations import Numerics, Pass, kept
from lit_instruct.planning.architecture import GPT3, architecture
from lit_instruct.planning.memory import cache_columns, peak, peaks, standing
from lit_instruct.planning.networks import Adapter, frozen_network, ppo_networks, trained_network, weight_bytes
from lit_instruct.planning.setup import key_value_bytes
from tests.helpers.numbers import assert_close
from tests.unit.planning.runs import LLAMA, ppo, text, with_networks

SHAPE = architecture(LLAMA)
# By hand: q and o 32 x 32, k and v 32 x 16, three of 32 x 48, two norms; embedding 50 x 32.
BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
TRUNK = 50 * 32 + 2 * BLOCK + 32
SCALAR = TRUNK + 32 + 1


def test_four_models_by_hand():
    found = {one.name: one[1:] for one in standing(ppo(rows=8, prompt=4, response=4))}
    assert found == {
        "policy": (4.0 * TRUNK, 4.0 * TRUNK, 8.0 * TRUNK),
        "value model": (4.0 * SCALAR, 4.0 * SCALAR, 8.0 * SCALAR),
        "reference": (4.0 * TRUNK, 0.0, 0.0),
        "reward model": (4.0 * SCALAR, 0.0, 0.0),
    }


def test_sharding_divides_and_replicas_have_all():
    alone = standing(ppo(rows=8, prompt=4, response=4))
    spread = standing(ppo(rows=8, prompt=4, response=4, devices=4))
    copied = standing(ppo(rows=8, prompt=4, response=4, devices=4)._replace(strategy="replicated"))
    for one, part, whole in zip(alone, spread, copied, strict=True):
        assert_close([4 * number for number in part[1:]], list(one[1:]))
        assert whole == one


def test_average_and_rounded_copy_are_kept_beside():
    setup = ppo(rows=8, prompt=4, response=4)._replace(averages=True, rollout_bytes=2)
    found = {one.name: one.weights for one in standing(setup)}
    assert found["average"] == 4.0 * TRUNK
    assert found["rollout copy"] == 2.0 * TRUNK
    on_cpu = setup._replace(numerics=Numerics("32-true", on_cpu=True))
    assert {one.name: one.weights for one in standing(on_cpu)}["rollout copy"] == 2.0 * (TRUNK + 50 * 32)


def test_adapters_alone_have_gradients():
    policy = trained_network("policy", SHAPE, unembeds=True, adapter=Adapter(4), parameter=4)
    lora = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (policy.trained, policy.weights) == (lora, 4.0 * (TRUNK + lora))
    value = trained_network("value model", SHAPE, unembeds=False, adapter=Adapter(4), parameter=4)
    assert value.trained == lora + 33


def test_on_a_shared_base_only_adapters_and_heads_are_added():
    networks = ppo_networks(SHAPE, SHAPE, plan="shared_base", adapter=Adapter(4), frozen_dtype="float32", parameter=4)
    lora = SHAPE.adapter_parameters(4)
    need = {
        "policy": 4.0 * (TRUNK + lora),
        "value model": 4.0 * (lora + 33),
        "reference": 0.0,
        "reward model": 4.0 * (lora + 33),
    }
    assert {network.name: network.weights for network in networks} == need
    assert [network.name for network in networks if network.trained] == ["policy", "value model"]


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 32.0), ("bfloat16", 16.0), ("8bit", 8 + 32 / 4096), ("4bit", 4.127)]
)
def test_frozen_weights_take_the_bits_of_their_dtype(dtype, bits):
    matrices = 2 * SHAPE.block_matrices
    other = TRUNK - matrices
    need = matrices * bits / 8 + other * (2.0 if dtype == "bfloat16" else 4.0)
    found = frozen_network("reference", SHAPE, unembeds=True, dtype=dtype, parameter=4).weights
    assert_close(found, need, scale=10)  # 4.127 bits are rounded


def test_4_bit_is_what_bitsandbytes_stores():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(512, 512, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": torch.randn(512, 512)})
    layer = layer.to("cpu")
    layer(torch.randn(1, 512))
    state = layer.weight.quant_state
    stored = layer.weight.untyped_storage().nbytes() + state.absmax.nbytes + state.state2.absmax.nbytes
    wide = SHAPE._replace(hidden=512, heads=4, key_heads=4, head_width=128, intermediate=512)
    plain = [weight_bytes(wide, True, dtype) for dtype in ("float32", "4bit")]
    saved_a_weight = (plain[0] - plain[1]) / (wide.layers * wide.block_matrices)
    assert_close(4.0 - saved_a_weight, stored / 512**2)


@pytest.mark.parametrize(("name", "number"), [("AdamW8bit", 2.03125), ("AdamW", 8.0)])
def test_optimizer_state_is_what_bitsandbytes_keeps(name, number):
    """Of matrices 8 bit with their scales; of embeddings, and of all that has under 4096 numbers, 32 bit."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    fields = {**LLAMA, "hidden_size": 64, "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 100}
    shape, model = architecture(fields), load_language_model(fields)
    optimizer = make_optimizer(getattr(bitsandbytes.optim, name), [(model, 1e-3)], None)
    model(torch.randint(0, 100, (1, 8))).logits.sum().backward()
    optimizer.step()
    kept = [
        optimizer.state[parameter].get(part)
        for parameter in model.parameters()
        for part in ("state1", "state2", "absmax1", "absmax2")
    ]
    policy = trained_network("policy", shape, unembeds=True, adapter=Adapter(), parameter=4)
    setup = with_networks(ppo(rows=8, prompt=4, response=4), "separate", (policy,))._replace(optimizer_bytes=number)
    assert_close(standing(setup)[0].optimizer, sum(tensor.nbytes for tensor in kept if tensor is not None))


@pytest.mark.parametrize(("prompt", "response"), [(5, 30), (5, 64), (5, 65), (20, 200), (100, 1024), (1, 1)])
def test_the_cache_is_as_wide_as_slots_make_it(prompt, response):
    cache = SlotCache(1, prompt + min(response, 64), torch.device("cpu"))
    before = 0
    for longest in range(prompt + 1, prompt + response):
        columns = cache.columns
        cache.make_room(longest)
        before = columns if cache.columns != columns else before
    assert cache_columns(prompt, response) == (cache.columns, before)


def test_keys_and_values_by_hand():
    assert key_value_bytes(SHAPE, 4) == 2 * 2 * 16 * 4
    rollout = peaks(ppo(rows=8, prompt=20, response=30))[0]
    assert rollout.phase == "rollout"
    assert rollout.cache == 8 * 50 * 256  # room for all 30 from the beginning
    slots = ppo(rows=8, prompt=20, response=30)
    slots = slots._replace(work=slots.work._replace(rollout_rows=2))
    assert peaks(slots)[0].cache == 2 * 50 * 256
    assert peaks(slots._replace(rollout_bytes=2))[0].cache == 50 * 256


def test_the_three_moments_of_an_update_by_hand():
    setup = ppo(rows=8, prompt=20, response=30)
    update = peaks(setup)[-1]
    one = Pass(8 * 50.0, 8.0, 8 * 30.0)
    # These rows are many for so small a model: the graphs of both networks are the most.
    graphs = kept(SHAPE, setup.numerics, one) + kept(SHAPE, setup.numerics, one._replace(logits=0.0))
    gradients_of_a_block = 400 * (32 + 3 * 48) * 4
    assert_close(update.activations, graphs + gradients_of_a_block)
    assert (update.logits, update.gradients) == (240 * 50 * 4, 0.0)


def test_over_a_large_vocabulary_the_end_of_an_update_is_the_most():
    wide = SHAPE._replace(vocabulary=5000)
    networks = ppo_networks(wide, wide, plan="separate", adapter=Adapter(), frozen_dtype="float32", parameter=4)
    end = peaks(with_networks(ppo(rows=8, prompt=1, response=1, micro_rows=1), "separate", networks))[-1]
    # All gradients are there, that of the unembedding waits for the embedding's, which has just been worked out.
    assert_close(end.gradients, 4 * sum(network.trained for network in networks) + 2 * 4 * 5000 * 32)
    assert end.logits == 0


def test_the_gradient_of_the_logits_counts_where_they_are_wide():
    wide = SHAPE._replace(vocabulary=5000)
    networks = ppo_networks(wide, wide, plan="separate", adapter=Adapter(), frozen_dtype="float32", parameter=4)
    setup = with_networks(ppo(rows=64, prompt=1, response=60), "separate", networks)
    middle = peaks(setup)[-1]
    # The value model has been left behind: its gradients instead of its graph; the policy's graph stands.
    assert middle.logits == 2 * 64 * 60 * 5000 * 4
    assert middle.gradients == 4.0 * networks[1].trained
    assert_close(middle.activations, kept(wide, setup.numerics, Pass(64 * 61.0, 64.0, 64 * 60.0)))


def test_gathered_for_sampling_whole_or_block_by_block():
    setup = ppo(rows=8, prompt=4, response=4, devices=4)
    assert peaks(setup)[0].gathered == 4.0 * TRUNK
    assert peaks(setup._replace(rollout="synced"))[0].gathered == 4.0 * (50 * 32 + 2 * BLOCK)
    assert peaks(ppo(rows=8, prompt=4, response=4))[0].gathered == 0.0


def test_text_has_a_phase_and_leaves_gradients_behind():
    plain = ppo(rows=8, prompt=4, response=4)
    mixed = text(plain, ratio=1.0, micro_rows=2, chunk_tokens=60)
    assert [moment.phase for moment in peaks(mixed)] == ["rollout", "scoring", "text", "update"]
    measured = text(plain, ratio=1.0, micro_rows=2, chunk_tokens=60, measured=True)
    assert_close(peaks(measured)[-1].gradients - peaks(mixed)[-1].gradients, 4 * TRUNK)
    longer = text(plain, ratio=1.0, micro_rows=4, chunk_tokens=60)
    assert peaks(longer)[2].activations > 1.9 * peaks(mixed)[2].activations


def test_replicas_send_gradients_out_of_buckets():
    setup = ppo(rows=8, prompt=4, response=4, devices=4)._replace(strategy="replicated")
    both = [
        peaks(one)[-1].gradients for one in (setup, setup._replace(devices=1, work=setup.work._replace(step_rows=2)))
    ]
    assert_close(both[0] - both[1], 4 * (TRUNK + SCALAR))


def test_offloaded_networks_make_room_for_the_update():
    setup = ppo(rows=8, prompt=4, response=4)
    before, after = peaks(setup), peaks(setup._replace(offload_frozen=True))
    assert after[:2] == before[:2]
    assert_close(before[-1].weights - after[-1].weights, 4 * (TRUNK + SCALAR))
    on_cpu = setup._replace(numerics=Numerics("32-true", on_cpu=True), offload_frozen=True)
    assert peaks(on_cpu)[-1].weights == before[-1].weights


def test_plans_need_less_in_their_order():
    found = []
    for plan, rank in (("separate", 0), ("shared_trunk", 0), ("shared_base", 16)):
        networks = ppo_networks(
            GPT3["1.3b"], GPT3["1.3b"], plan=plan, adapter=Adapter(rank), frozen_dtype="bfloat16", parameter=4
        )
        found.append(peak(with_networks(ppo(rows=8, prompt=4, response=4), plan, networks)).total)
    assert found == sorted(found, reverse=True)
