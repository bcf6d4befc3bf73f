"""Operations against torch's own counter; bytes and seconds against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lit_instruct.planning.architecture import architecture
from lit_instruct.planning.cost import Rows, costs, decoding_steps, forward_flops, rows_of, training_flops
from lit_instruct.planning.hardware import parse_hardware
from lit_instruct.planning.networks import Adapter, ppo_networks, trained_network
from lit_instruct.planning.setup import Setup
from tests.helpers.numbers import assert_close
from tests.unit.planning.runs import LLAMA, ppo, text, with_networks


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_operations_are_those_that_torch_counts(name):
    fields = {"llama": LLAMA, "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}}
    config = fields[name] | {"n_positions": 64} if name == "gpt2" else fields[name]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    sizes = AutoConfig.for_model(name, **rest, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager")  # its products are all counted
    shape = architecture(config)
    ids = torch.randint(0, 50, (3, 20))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, logits_to_keep=7).logits
    # Of all pairs, not only those behind one another.
    rows = Rows(60.0, 21.0, 3 * 20.0**2)
    assert_close(forward_flops(shape, rows, unembeds=True), forward.get_total_flops())
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    network = trained_network("policy", shape, unembeds=True, adapter=Adapter(), parameter=4)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert_close(training_flops(network, rows, checkpointing=False), total)


def test_adapters_need_no_gradients_of_the_base_and_checkpointing_reads_blocks_again():
    shape = architecture(LLAMA)
    rows = Rows(100.0, 30.0, 1000.0)
    once = forward_flops(shape, rows, unembeds=True)
    head = 2.0 * 32 * 50 * 30
    whole, lora = (
        trained_network("policy", shape, unembeds=True, adapter=Adapter(rank), parameter=4) for rank in (0, 4)
    )
    assert training_flops(whole, rows, checkpointing=False) == 3 * once
    assert training_flops(whole, rows, checkpointing=True) == 3 * once + once - head
    assert training_flops(lora, rows, checkpointing=False) == 2 * once


def test_rows_count_tokens_and_pairs():
    setup = ppo(rows=4, prompt=10, response=6)
    assert rows_of(setup) == Rows(4 * 16.0, 4 * 6.0, 4 * 16**2 / 2)
    several = setup._replace(stage="rm", work=setup.work._replace(responses=3.0))
    assert rows_of(several) == Rows(4 * 28.0, 0.0, 4 * (50 + 3 * (60 + 18)))


def test_slots_are_filled_again_but_the_longest_response_comes_to_its_end():
    setup = ppo(rows=64, prompt=10, response=6)
    assert decoding_steps(setup) == 6
    few = setup._replace(work=setup.work._replace(rollout_rows=8))
    assert decoding_steps(few) == 8 * 6
    short = few._replace(work=few.work._replace(lengths=few.work.lengths._replace(response=0.5)))
    assert decoding_steps(short) == 6


def test_sharded_passes_send_weights_twice_and_gradients_once():
    hardware = parse_hardware("4xH100-80GB")
    setup = ppo(rows=16, prompt=10, response=6, devices=4, step_rows=8, micro_rows=1)
    taken = {one.phase: one for one in costs(setup, hardware)}
    policy, value, reference, reward = (network.passes_through for network in setup.networks)
    # 16 rows over 4 devices one by one are 4 passes; 3 of 4 parts come from others; 4 bytes a number.
    assert_close(taken["update"].sent, 4 * 3 * (policy + value) * 4 * 0.75)
    assert_close(taken["scoring"].sent, 4 * (policy + value + reference + reward) * 4 * 0.75)
    assert_close(taken["rollout"].sent, policy * 4 * 0.75)
    synced = setup._replace(rollout="synced")
    assert_close(costs(synced, hardware)[0].sent, 6 * policy * 4 * 0.75)
    assert_close(taken["update"].network, taken["update"].sent / 450e9)
    far = {one.phase: one for one in costs(setup, parse_hardware("2x2xH100-80GB"))}
    assert_close(far["update"].network, taken["update"].sent / 50e9)


def test_replicated_gradients_are_summed_once_a_step():
    setup = ppo(rows=16, prompt=10, response=6, devices=4, step_rows=8, micro_rows=1)._replace(strategy="replicated")
    taken = {one.phase: one for one in costs(setup, parse_hardware("4xH100-80GB"))}
    trained = sum(network.trained for network in setup.networks)
    assert_close(taken["update"].sent, 2 * 2 * trained * 4 * 0.75)
    assert taken["scoring"].sent == taken["rollout"].sent == 0


def test_the_limit_is_the_slowest_resource():
    setup, hardware = ppo(rows=16, prompt=10, response=6), parse_hardware("H100-80GB")
    rollout = costs(setup, hardware)[0]
    shape = setup.networks[0].shape
    # Six steps read all weights; response token t of 16 rows sees the prompt and t tokens: 13 on the average.
    read = 6 * shape.parameters * 4 + 16 * 6 * 13 * (2 * 2 * 16 * 4)
    assert_close(rollout.read, read)
    assert rollout.limit == "memory bandwidth"
    assert_close(rollout.seconds, read / 3.35e12)
    assert_close(rollout.compute, rollout.flops / 495e12)
    slow = hardware._replace(device=hardware.device._replace(flops_fp32=1.0))
    assert costs(setup, slow)[0].limit == "compute"


def test_text_is_read_for_each_update():
    setup = text(ppo(rows=16, prompt=10, response=6, step_rows=8), ratio=2.0, micro_rows=4, chunk_tokens=20)
    found = {one.phase: one for one in costs(setup, parse_hardware("H100-80GB"))}["text"]
    rows = Rows(20.0, 20.0, 200.0).times(32)
    assert_close(found.flops, training_flops(setup.networks[0], rows, checkpointing=False))
    # 8 passes: weights there and back, gradients read and written.
    assert_close(found.read, 8 * 4 * setup.networks[0].passes_through * 4)


def test_without_the_policys_own_pass_scoring_is_cheaper():
    setup = ppo(rows=16, prompt=10, response=6)
    hardware = parse_hardware("H100-80GB")
    rows = rows_of(setup)
    both = [costs(one, hardware)[1].flops for one in (setup, setup._replace(recompute_logprobs=False))]
    assert_close(both[0] - both[1], forward_flops(setup.networks[0].shape, rows, unembeds=True))


def test_a_shared_trunk_is_one_pass_less():
    setup = ppo(rows=16, prompt=10, response=6)
    shape = setup.networks[0].shape
    networks = ppo_networks(shape, shape, plan="shared_trunk", adapter=Adapter(), frozen_dtype="bfloat16", parameter=4)
    shared: Setup = with_networks(setup, "shared_trunk", networks)
    taken, hardware = costs(shared, parse_hardware("H100-80GB")), parse_hardware("H100-80GB")
    rows = rows_of(setup)
    assert_close(taken[2].flops, 3 * forward_flops(shape, rows, unembeds=True))
    # The frozen ones compute in bf16, twice as fast.
    with_head, without = (forward_flops(shape, rows, unembeds=unembeds) for unembeds in (True, False))
    assert_close(taken[1].compute, with_head / hardware.device.flops_fp32 + (with_head + without) / 989e12)
