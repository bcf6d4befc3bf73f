"""Stored cases that no function alone can show: they go through the modules and callbacks that train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_instruct import DemonstrationDataModule, PPOModule, PromptDataModule, RewardModule
from lit_instruct.callbacks import PtxMixing
from lit_instruct.data.sampling import GlobalBatchSampler
from lit_instruct.models.forward import demonstration_loss
from lit_instruct.types import DemonstrationBatch
from tests.helpers.numbers import assert_close, assert_vector
from tests.helpers.tiny import Record, prompts, quiet_trainer, sgd, texts, write_jsonl
from tests.unit.functional.vectors import VECTORS

BIAS = VECTORS["rm_bias_normalisation_on_demonstrations"]
PTX = VECTORS["ptx_sign_and_gradient_accumulation"]
RUN = VECTORS["rl_run_bookkeeping_256k_episodes"]


def one_batch(module: RewardModule, path: str, rows: int) -> DemonstrationBatch:
    data = DemonstrationDataModule(path, module.tokenizer, batch_size=rows, val=path, val_batch_size=rows)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    return batch


@torch.no_grad()
def give_scores(module: RewardModule, batch: DemonstrationBatch, wanted: list[float]) -> None:
    """Choose the head, of which there are more weights than rows, so that the rows' raw scores are those wanted."""
    model = module.reward_model
    unit = torch.eye(model.head.weight.shape[1])
    columns = []
    model.head.bias.zero_()
    for direction in unit:
        model.head.weight.copy_(direction[None])
        columns.append(model.scores(batch.input_ids_BT, batch.attention_mask_BT))
    solution = torch.linalg.lstsq(torch.stack(columns, dim=1).double(), torch.tensor(wanted).double()[:, None])
    model.head.weight.copy_(solution.solution.T)


def test_bias_vector_on_a_reward_module(base: str, folder: Path) -> None:
    demonstrations, others = BIAS["raw_demo_scores"], BIAS["raw_scores"]
    rows = [{"prompt": f"w{number}", "response": f"w{number + 1} w{number}"} for number in range(7)]
    module = RewardModule(base)
    both = one_batch(module, write_jsonl(folder / "all.jsonl", rows), 7)
    give_scores(module, both, demonstrations + others)
    demos = one_batch(module, write_jsonl(folder / "d.jsonl", rows[:4]), 4)
    halves = [DemonstrationBatch(*(part[rows] for part in demos)) for rows in (slice(0, 1), slice(1, 4))]
    need = BIAS["expected"]
    for _ in range(2):  # a second time it starts from shifted scores
        assert_close(module.set_score_bias(halves), need["bias"])
    got = module.reward_model.scores(both.input_ids_BT, both.attention_mask_BT)
    assert_close(got[:4], need["normalised_demo_scores"])
    assert_close(got[4:], need["normalised_scores"])


class Valley(nn.Module):
    """A policy of one parameter, whose loss on every token of any text is ``(theta - 1)^2 / 2 + 1``."""

    def __init__(self, theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, *, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        """The right token gets the logit 0, one other the logit that makes the loss come out, the rest nothing."""
        right = input_ids[:, logits_to_keep + 1][..., None]
        loss = (self.theta - 1) ** 2 / 2 + 1
        logits = torch.full((*right.shape[:2], 40), -torch.inf).scatter(-1, right, 0.0)
        return SimpleNamespace(logits=logits.scatter(-1, (right + 1) % 40, torch.expm1(loss).log().expand(right.shape)))


def test_ptx_vector_through_an_iteration_of_ppo(
    sft_ckpt: str, rm_ckpt: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two losses are the case's; what weighs them, sends them backward and steps is the product's."""
    need, count = PTX["expected"], PTX["n_ptx_microbatches"]
    module = PPOModule(sft_ckpt, rm_ckpt, minibatch_size=4, micro_batch_size=4, max_response_tokens=3)
    mixing = PtxMixing(texts(folder / "t.jsonl", 20), coef=PTX["gamma"], micro_batch_size=4, chunk_tokens=6)
    assert mixing.ratio * 4 == count * mixing.micro_batch_size
    mixing.prepare(module)
    data = PromptDataModule(prompts(folder / "p.jsonl", 4), module.tokenizer, batch_size=4, val=0.0)
    data.setup()
    valley = Valley(PTX["theta"])

    def replace_losses(_: PPOModule, rollout: Any, experience: Any) -> None:
        """After sampling, which needs a real policy."""
        _, metrics = module.loss(experience)
        module.policy = valley
        monkeypatch.setattr(module, "loss", lambda *_, **__: ((valley.theta - 2) ** 2, metrics))

    losses: list[float] = []
    gradients: list[float] = []
    steps: list[float] = []
    nlls: list[float] = []

    def backward(loss: Tensor) -> None:
        before = 0.0 if valley.theta.grad is None else float(valley.theta.grad)
        loss.backward()
        assert valley.theta.grad is not None
        losses.append(float(loss.detach()))
        gradients.append(float(valley.theta.grad) - before)

    def step() -> None:
        assert valley.theta.grad is not None
        steps.append(float(valley.theta.grad))

    watcher = SimpleNamespace(
        on_experience=replace_losses, after_update=lambda _, metrics: nlls.append(metrics["ptx/nll"])
    )
    batch = next(iter(data.train_dataloader()))
    module.iteration(batch, hooks=[mixing, watcher], backward=backward, step=step)
    assert_close(gradients[:-1], [need["grad_per_ptx_microbatch"]] * count)
    assert_close(gradients[-1], need["grad_ppo"])
    assert_close(sum(gradients[:-1]) / PTX["gamma"], need["grad_ptx_unscaled"])
    assert_close(losses[-1], need["ppo_loss"])
    assert_close(sum(losses), need["total_loss"])
    assert_close(steps, [need["grad_total"]])  # one step for both parts
    assert_close(nlls, [need["nll"]])
    assert abs(steps[0] - need["wrong_grad_if_minus_sign"]) > 1


def test_a_run_of_the_papers_size_is_counted_as_in_the_paper(
    sft_ckpt: str, rm_ckpt: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two of its iterations, under a Trainer: how many updates and texts each takes, and where it ends."""
    need, batch_size, ends = RUN["expected"], RUN["batch"], RUN["expected"]["iterations"]
    module = PPOModule(
        sft_ckpt,
        rm_ckpt,
        episodes=RUN["episodes"],
        minibatch_size=RUN["minibatch"],
        inner_epochs=RUN["inner_epochs"],
        micro_batch_size=RUN["minibatch"],
        rollout_batch_size=batch_size,
        max_response_tokens=1,
        learning_rate=1e-4,
        optimizer=sgd,
    )
    mixing = PtxMixing(
        texts(folder / "t.jsonl", 100), coef=0.1, ratio=RUN["ptx_ratio"], micro_batch_size=256, chunk_tokens=3
    )
    chunks: list[int] = []

    def spy(policy: nn.Module, batch: DemonstrationBatch) -> Any:
        chunks.append(len(batch.input_ids_BT))
        return demonstration_loss(policy, batch)

    def chunks_since() -> int:
        seen = sum(chunks)
        chunks.clear()
        return seen

    monkeypatch.setattr("lit_instruct.callbacks.ptx_mixing.demonstration_loss", spy)
    record = Record(
        after_update=lambda *_: chunks_since(),
        after_iteration=lambda _, metrics: (metrics["iteration"], metrics["episodes"]),
    )
    module.iterations_done, module.episodes_done = ends - 2, RUN["episodes"] - 2 * batch_size
    data = PromptDataModule(prompts(folder / "p.jsonl", batch_size), module.tokenizer, batch_size=batch_size, val=0.0)
    trainer = quiet_trainer(max_epochs=-1, callbacks=[mixing, record])
    trainer.fit(module, datamodule=data)

    iterations, updates = record.seen["after_iteration"], record.seen["after_update"]
    assert iterations == [(ends - 1, RUN["episodes"] - batch_size), (ends, RUN["episodes"])]
    assert trainer.global_step == len(updates) == 2 * need["minibatches_per_iteration"]
    assert trainer.global_step * ends / 2 == need["optimiser_steps"]
    assert updates == [need["ptx_examples_per_minibatch"]] * len(updates)
    assert sum(updates) == 2 * need["ptx_examples_per_iteration"]
    assert sum(updates) * ends / 2 == need["ptx_examples_total"]


def test_a_run_of_the_papers_size_visits_its_prompts_as_often() -> None:
    need, rows = RUN["expected"], RUN["unique_prompts"]
    sampler = GlobalBatchSampler(rows, batch_size=RUN["batch"], loader_batch_size=RUN["batch"])
    drawn: list[int] = []
    epoch = 0
    while len(drawn) < RUN["episodes"]:
        assert len(sampler) % RUN["batch"] == 0
        drawn += sampler.indices(epoch)
        epoch += 1
    visits = Counter(drawn[: need["iterations"] * RUN["batch"]])
    assert_vector(sum(visits.values()) / rows, need["visits_per_prompt"])
    assert set(visits) == set(range(rows))
    assert max(visits.values()) == epoch == 9  # at most once an epoch, and an epoch leaves out less than one batch
    assert sum(count >= 8 for count in visits.values()) > 0.85 * rows
