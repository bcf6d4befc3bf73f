"""Models, checkpoints and where they are written."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lit_instruct.models.backbone import load_language_model
from lit_instruct.models.handover import KEY
from scripts.bad_inputs.case import Case
from scripts.bad_inputs.world import Run, after, command, ppo, rm, sft, with_file
from tests.helpers.tiny import save_model, save_tokenizer


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


def changed(run: Run, **changes: Any) -> Run:
    """With an SFT checkpoint whose handover says something else."""

    def change(folder: Path) -> None:
        checkpoint = torch.load(folder / "sft.ckpt", weights_only=True)
        checkpoint[KEY].update(changes)
        torch.save(checkpoint, folder / "sft.ckpt")

    return after(change, run)


def trained(folder: Path) -> None:
    """A checkpoint with an optimizer's state."""
    sft("--out", "once")(folder)
    (folder / "once" / "last.ckpt").rename(folder / "trained.ckpt")


_SGD = ("--model.optimizer", "torch.optim.SGD")


def cut(folder: Path) -> None:
    """Half of a checkpoint."""
    content = (folder / "sft.ckpt").read_bytes()
    (folder / "sft.ckpt").write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    """A checkpoint of somebody else."""
    torch.save({"state_dict": {}, "settings": _RunsCode()}, folder / "sft.ckpt")


def old_pickle(folder: Path) -> None:
    """No archive at all."""
    (folder / "sft.ckpt").write_bytes(pickle.dumps(_RunsCode()))


def other_archive(folder: Path) -> None:
    """A zip file of something else."""
    with zipfile.ZipFile(folder / "sft.ckpt", "w") as file:
        file.writestr("readme.txt", "hello")


def own_code(folder: Path) -> None:
    """A model that transformers does not know and that brings its code."""
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "code.py").write_text("open('it-ran', 'w')")


def pickled_weights(folder: Path) -> None:
    """A folder with a .bin file that holds more than tensors."""
    (folder / "base" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _RunsCode()}, folder / "base" / "pytorch_model.bin")


def says(**fields: Any) -> Callable[[Path], object]:
    """A folder whose config.json says something else than its weights."""

    def change(folder: Path) -> None:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def not_numbers(folder: Path) -> None:
    """What a run that diverged leaves behind."""
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def larger_vocabulary(folder: Path) -> None:
    """A tokenizer with more words than the model has embeddings."""
    save_tokenizer(folder / "larger")
    path = folder / "larger" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more{number}": 34 + number for number in range(10)}
    path.write_text(json.dumps(content))


def wider(folder: Path) -> None:
    """Another model, of the same tokenizer."""
    save_model(folder / "wider", hidden_size=32)


def other_words(folder: Path) -> None:
    """A tokenizer with the same number of other words."""
    path = Path(save_tokenizer(folder / "other")) / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"x1"'))


def a_file_in_the_way(folder: Path) -> None:
    """Where a folder should be."""
    (folder / "runs").write_text("")


CASES = [
    Case("a model that is not there", sft("--model.base", "nobody/nothing")),
    Case("a folder without a model", after(lambda folder: (folder / "empty").mkdir(), sft("--model.base", "empty"))),
    Case("a bare configuration without a type", sft("--model.base", "{hidden_size: 16}", "--model.tokenizer", "base")),
    Case("a bare configuration without a tokenizer", sft("--model.base", "{model_type: llama}")),
    Case(
        "a misspelt field of a configuration",
        sft("--model.base", "{model_type: llama, hiden_size: 3}", "--model.tokenizer", "base"),
    ),
    Case("a model that brings its own code", after(own_code, sft("--model.tokenizer", "sft.ckpt"))),
    Case("weights as a pickle that runs code", after(pickled_weights, sft())),
    Case("weights that are cut off", with_file("base/model.safetensors", b"\x10\0\0\0", sft())),
    Case("a configuration with more layers than weights", after(says(num_hidden_layers=7), sft())),
    Case("a configuration of another size than the weights", after(says(hidden_size=24), sft())),
    Case("a configuration that cannot be", after(says(num_attention_heads=3), sft())),
    Case("a tokenizer's file of another form", with_file("base/tokenizer.json", "[]", sft())),
    Case("weights that are not numbers", after(not_numbers, sft())),
    Case("a checkpoint that is not there", rm("--model.base", "runs/sft/last.ckpt")),
    Case("a checkpoint that is cut off", after(cut, rm())),
    Case("a checkpoint that runs code", after(pickled, rm())),
    Case("a bare pickle as checkpoint", after(old_pickle, rm())),
    Case("another archive as checkpoint", after(other_archive, rm())),
    Case("a text file as checkpoint", with_file("sft.ckpt", "hello", rm())),
    Case("a checkpoint of another program", after(lambda f: torch.save({"state_dict": {}}, f / "sft.ckpt"), rm())),
    Case("a checkpoint of a later version", changed(rm(), format_version=99)),
    Case("a model type that is not known", changed(rm(), config={"model_type": "of_tomorrow"})),
    Case("a folder called .ckpt", after(lambda folder: (folder / "x.ckpt").mkdir(), rm("--model.base", "x.ckpt"))),
    Case("a reward model as policy", ppo("--model.policy", "rm.ckpt")),
    Case("an SFT checkpoint as reward model", ppo(scored_by="sft.ckpt")),
    Case("a plain model as reward model", ppo(scored_by="base")),
    Case("going on from another stage", ppo("--ckpt_path", "sft.ckpt")),
    Case("going on with another network", after(wider, sft("--ckpt_path", "sft.ckpt", "--model.base", "wider"))),
    Case("going on with another optimizer", after(trained, sft("--ckpt_path", "trained.ckpt", *_SGD))),
    Case("going on from the best", sft("--ckpt_path", "best")),
    Case("going on from nothing", sft("--ckpt_path", "runs/sft/last.ckpt")),
    Case("exporting nothing", command("export", "no.ckpt", "out")),
    Case(
        "averaged weights that there are not",
        after(lambda _: None, lambda folder: load_language_model(folder / "sft.ckpt", ema=True)),
    ),
    Case("a tokenizer larger than the model", after(larger_vocabulary, sft("--model.tokenizer", "larger"))),
    Case("a tokenizer of other words than the checkpoint's", after(other_words, rm("--model.tokenizer", "other"))),
    Case("going on with another template", sft("--ckpt_path", "sft.ckpt", "--model.template", "verbatim")),
    Case(
        "going on with another tokenizer",
        after(other_words, sft("--ckpt_path", "sft.ckpt", "--model.tokenizer", "other")),
    ),
    Case("a reward model of another template", ppo("--model.template", "verbatim")),
    Case("checkpoints into a folder that is a file", after(a_file_in_the_way, sft())),
    Case("a default_root_dir that is a file", sft("--trainer.default_root_dir", "demos.jsonl")),
]
