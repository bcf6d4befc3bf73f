"""Configurations and options."""

from __future__ import annotations

from typing import Any

from scripts.bad_inputs.case import Case
from scripts.bad_inputs.world import Run, command, ppo, rm, sft, with_file


def mine(content: str | bytes, *more: Any, run: Any = sft, **settings: Any) -> Run:
    """The stage with a file of the user's own."""
    return with_file("mine.yaml", content, run("--config", "mine.yaml", *more, **settings))


_CALLBACK = "trainer:\n  callbacks+:\n    - class_path: lit_instruct.callbacks."

CASES = [
    Case("no such stage", command("sfft", "fit")),
    Case("no command", command("sft")),
    Case("a config file that is not there", sft("--config", "sft/defualt.yaml")),
    Case("data given as the config file", sft("--config", "demos.jsonl")),
    Case("an empty config file", mine("")),
    Case("a config file that is a list", mine("- model\n- data\n")),
    Case("a config file that is a word", mine("model\n")),
    Case("a config file that does not parse", mine("model:\n\tbase: x\n")),
    Case("a key twice", mine("model: {learning_rate: 0.1}\ndata: {val: 0.1}\nmodel: {template: plain}\n")),
    Case("a config file in Latin-1", mine("model: {template: café}\n".encode("latin-1"))),
    Case("a binary config file", mine(bytes(range(256)))),
    Case("a config file that would run code", mine("model: !!python/object/apply:os.system ['date']\n")),
    Case(
        "aliases that stand for billions of values",
        mine(
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        ),
    ),
    Case("a config file nested too deeply", mine("[" * 5000)),
    Case("a section that is a number", mine("trainer: 5\n")),
    Case("a misspelt section", mine("trainr: {max_epochs: 1}\n")),
    Case("a misspelt key", mine("model: {learningrate: 0.1}\n")),
    Case("a misspelt option", sft("--trainer.max_epoch", 3)),
    Case("a word too many", sft("demos.jsonl")),
    Case("a config of another stage", sft("--config", "ppo/default.yaml")),
    Case("text for a number", sft("--model.learning_rate", "fast")),
    Case("a list for a number", mine("model: {learning_rate: [1, 2]}\n")),
    Case("nothing for a number", mine("model: {residual_dropout: null}\n")),
    Case("nothing for a number of the Trainer", mine("trainer: {accumulate_grad_batches: null}\n")),
    Case("a number with a fraction for a whole one", sft("--data.batch_size", 1.5)),
    Case("a word that is none of the choices", ppo("--model.missing_eos", "punish")),
    Case("a precision that there is not", sft("--trainer.precision", "half")),
    Case("what has no default left out", command("sft", "fit", "--config", "sft/default.yaml")),
    Case("a misspelt class of a callback", mine(f"{_CALLBACK}WeightEMAA\n")),
    Case(
        "a module that there is not",
        mine("trainer:\n  callbacks+:\n    - class_path: lit_instrct.callbacks.WeightEMA\n"),
    ),
    Case("a callback without a class_path", mine("trainer:\n  callbacks:\n    - decay: 0.9\n", "--print_config")),
    Case("a class that is no callback", sft("--trainer.callbacks+=torch.nn.Linear")),
    Case("a misspelt argument of a callback", mine(f"{_CALLBACK}WeightEMA\n      init_args: {{dekay: 0.9}}\n")),
    Case("a wrong type in a callback", mine(f"{_CALLBACK}WeightEMA\n      init_args: {{decay: slow}}\n")),
    Case("a value out of range in a callback", mine(f"{_CALLBACK}WeightEMA\n      init_args: {{decay: 5}}\n")),
    Case("a callback of another stage", sft("--trainer.callbacks+=lit_instruct.callbacks.SampleTable")),
    Case("an option of the wrong callback", ppo("--trainer.callbacks.text", "text.jsonl")),
    Case("a misspelt optimizer", sft("--model.optimizer", "torch.optim.Addam")),
    Case("a function that makes no optimizer", sft("--model.optimizer", "json.loads")),
    Case("a negative learning rate", sft("--model.learning_rate", -1)),
    Case("a fraction of validation data above 1", sft("--data.val", 1.5)),
    Case("more warm-up than steps", sft("--model.warmup_steps", 50)),
    Case("a training without an end", sft("--trainer.max_epochs", -1)),
    Case("no steps", sft("--trainer.max_steps", 0)),
    Case("no accumulation", sft("--trainer.accumulate_grad_batches", 0)),
    Case("a negative norm to clip to", sft("--trainer.gradient_clip_val", -1)),
    Case("validation every 0 epochs", sft("--trainer.check_val_every_n_epoch", 0)),
    Case("a validation interval longer than an epoch", sft("--trainer.val_check_interval", 1000)),
    Case("a batch larger than the data", sft("--data.batch_size", 100)),
    Case("too little text for PPO-ptx", ppo("--config", "ppo/ptx.yaml", "--trainer.callbacks.text", "text.jsonl")),
    Case("a batch that three devices cannot share", sft("--trainer.devices", 3)),
    Case("PPO minibatches that do not divide the batch", ppo("--model.minibatch_size", 3)),
    Case("gradient clipping by the Trainer in PPO", ppo("--trainer.gradient_clip_val", 1)),
    Case("a GPU where there is none", sft("--trainer.accelerator", "cuda")),
    Case("a strategy that there is not", sft("--trainer.strategy", "nonsense")),
    Case(
        "a misspelt class of a strategy",
        mine("trainer: {strategy: {class_path: lit_instruct.modules.fsdp2.Fsdp2Strategi}}\n"),
    ),
    Case("two nodes, and no word where they are", sft("--trainer.num_nodes", 2)),
    Case("a quantised base without an adapter", sft("--model.quantization", "4bit")),
    Case("a shared base without an adapter", ppo("--model.memory", "shared_base")),
    Case("a seed below 0", sft("--seed_everything", -3)),
    Case("lines of the log every -5 steps", sft("--trainer.log_every_n_steps", -5)),
    Case("averaged weights of a reward model", rm("--trainer.callbacks+=lit_instruct.callbacks.WeightEMA")),
    Case("a quickstart into a file", command("quickstart", "--out", "demos.jsonl")),
    Case("no threads", sft("--machine.threads", 0)),
    Case("a tokenizer set twice", sft("--data.tokenizer", "base")),
    Case(
        "two sources of scores",
        ppo("--model.reward", "lit_instruct.rewards.FunctionScorer", "--model.reward.function", "math:hypot"),
    ),
    Case("no source of scores", ppo(scored_by=None)),
    Case("responses longer than the context", ppo("--model.max_response_tokens", 1024)),
    Case(
        "cross-validation without labelers",
        command(
            "rm",
            "cross-validate",
            "--config",
            "rm/default.yaml",
            "--model.base",
            "sft.ckpt",
            "--data.comparisons",
            "rankings.jsonl",
        ),
    ),
    Case(
        "cross-validation over one prompt",
        with_file(
            "one.jsonl",
            "".join(f'{{"prompt": "w1", "chosen": "w2", "rejected": "w3", "labeler": {n}}}\n' for n in range(8)),
            command("rm", "cross-validate", "--model.base", "sft.ckpt", "--data.comparisons", "one.jsonl"),
        ),
    ),
    Case(
        "a validation without data",
        command("sft", "validate", "--model.base", "base", "--data.demonstrations", "demos.jsonl", "--data.val", 0),
    ),
    Case(
        "a test without test data",
        command(
            "sft",
            "test",
            "--config",
            "sft/default.yaml",
            "--model.base",
            "base",
            "--data.demonstrations",
            "demos.jsonl",
        ),
    ),
    Case("demonstrations given as rankings", rm("--data.comparisons", "demos.jsonl")),
]
