"""PPO-ptx without a Trainer: the same modules in a plain Fabric loop.

Leaves out checkpoints, validation and logging; the Trainer does these. Run it on what the quickstart left behind:

    cd runs/quickstart && python ../../scripts/custom_loop.py --policy sft/last.ckpt --reward_model rm/last.ckpt \
        --prompts data/prompts.jsonl --text data/pretraining.jsonl

Under one seed it ends with the same weights as `lit-instruct ppo fit` with the same settings.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from lightning.fabric import Fabric, seed_everything

from lit_instruct import PPOModule, PromptDataModule
from lit_instruct.callbacks import PtxMixing


def train(module: PPOModule, data: PromptDataModule, hooks: list[Any], fabric: Fabric, *, iterations: int) -> None:
    """Train for some iterations.

    Args:
        module: the four networks and the arithmetic of an iteration.
        data: prompts.
        hooks: callbacks of PPO's protocol, such as PtxMixing.
        fabric: the device.
        iterations: how many.
    """
    data.setup("fit")
    configured: Any = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    module.to(fabric.device)

    def step() -> None:
        module.clip_each_network()
        optimizer.step()
        optimizer.zero_grad()

    prompts = data.train_dataloader()
    for epoch in itertools.count():
        prompts.sampler.set_epoch(epoch)  # a new order each time
        for batch in prompts:
            metrics = module.iteration(fabric.to_device(batch), hooks=hooks, backward=fabric.backward, step=step)
            schedule.step()
            fabric.print(
                f"iteration {module.iterations_done}: score {float(metrics['objective/score']):.3f}, "
                f"KL {float(metrics['objective/kl']):.3f}, text loss {float(metrics.get('ptx/nll', 0.0)):.3f}"
            )
            if module.iterations_done == iterations:
                return


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward_model", "prompts", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    seed_everything(options.seed)
    fabric = Fabric(devices=1)
    module = PPOModule(
        policy=options.policy,
        reward_model=options.reward_model,
        minibatch_size=32,
        max_response_tokens=40,
        kl_coef=0.2,
        learning_rate=1e-4,
        value_learning_rate=2e-4,
        seed=options.seed,
    )
    data = PromptDataModule(options.prompts, module.tokenizer, batch_size=128, seed=options.seed)
    ptx = PtxMixing(options.text, coef=0.3, ratio=1, micro_batch_size=32, chunk_tokens=64, seed=options.seed)
    train(module, data, [ptx], fabric, iterations=options.iterations)


if __name__ == "__main__":
    main()
