"""What one stage hands to the next, and which files are refused."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from lit_instruct.models.handover import FORMAT_VERSION, KEY, is_stage_checkpoint, read_handover, write_handover
from lit_instruct.models.tokenizer import load_tokenizer
from lit_instruct.types import ConfigError
from tests.helpers.tiny import tiny_tokenizer
from tests.unit.models.networks import tiny_model


@pytest.fixture
def checkpoint():
    model = tiny_model("llama")
    made = {
        "state_dict": {f"policy.{name}": tensor for name, tensor in model.state_dict().items()}
        | {"reference.model.norm.weight": torch.zeros(1)},
        "ema_state_dict": {f"policy.{name}": tensor + 1 for name, tensor in model.named_parameters()},
        "epoch": 3,
    }
    write_handover(made, stage="ppo", network="policy.", config=model.config, tokenizer=tiny_tokenizer())
    return made


def test_written_and_read(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    model = tiny_model("llama")
    handed = read_handover(str(tmp_path / "x.ckpt"))
    assert handed.stage == "ppo"
    assert handed.config.to_dict() == model.config.to_dict()
    assert handed.weights.keys() == model.state_dict().keys()  # of its network alone
    for name, tensor in model.state_dict().items():
        assert torch.equal(handed.weights[name], tensor)
    for name, parameter in model.named_parameters():
        assert torch.equal(handed.ema_weights[name], parameter + 1)


def test_weights_that_were_read_do_not_stay_in_memory(tmp_path, checkpoint):
    """The mapping of the file that is kept for the next reader is another one, of which no weight was touched."""
    torch.save(checkpoint, tmp_path / "x.ckpt")
    first, second = (read_handover(tmp_path / "x.ckpt").weights for _ in range(2))
    assert not {x.data_ptr() for x in first.values()} & {x.data_ptr() for x in second.values()}


def test_the_handover_is_plain_data(checkpoint):
    handed = checkpoint[KEY]
    assert handed["format_version"] == FORMAT_VERSION
    assert handed["network"] == "policy."

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(name, str | int) and plain(item) for name, item in value.items())
        if isinstance(value, list | tuple):
            return all(plain(item) for item in value)
        return value is None or isinstance(value, str | int | float | bool)

    assert plain(handed)


def test_the_tokenizer_travels_with_its_template(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    tokenizer, original = load_tokenizer(tmp_path / "x.ckpt"), tiny_tokenizer()
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer("w1 w2 w29")["input_ids"] == original("w1 w2 w29")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    with read_handover(tmp_path / "x.ckpt").tokenizer_folder() as folder:
        assert os.listdir(folder)
    assert not os.path.exists(folder)


def test_a_tokenizer_file_cannot_be_written_elsewhere(tmp_path, checkpoint):
    checkpoint[KEY]["tokenizer"] = {"../../escaped.txt": "x", "/escaped2.txt": "y"}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with read_handover(tmp_path / "x.ckpt").tokenizer_folder() as folder:
        assert sorted(os.listdir(folder)) == ["escaped.txt", "escaped2.txt"]


def test_a_file_written_anew_is_read_anew(tmp_path, checkpoint):
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint, path)
    os.utime(path, ns=(1, 1))
    assert read_handover(path).stage == "ppo"
    checkpoint[KEY]["stage"] = "sft"
    torch.save(checkpoint, tmp_path / "new.ckpt")
    os.replace(tmp_path / "new.ckpt", path)  # as Lightning's atomic save does
    assert read_handover(path).stage == "sft"


def test_only_ckpt_files_are_stage_checkpoints():
    assert is_stage_checkpoint("a/b.ckpt")
    assert not any(is_stage_checkpoint(path) for path in ("a/b", "b.gguf", "b.ckpt/model", "ckpt"))


RAN = []


class Evil:
    def __reduce__(self):
        return (run, ())


def run():
    RAN.append(1)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("missing", "does not exist; give the file that the earlier stage printed"),
        ("folder", "is a folder, but not of a sharded checkpoint: meta.pt is missing"),
        ("foreign", "was not written by a stage of lit_instruct (key 'lit_instruct' is missing)"),
        ("tensor", "was not written by a stage of lit_instruct (key 'lit_instruct' is missing)"),
        ("truncated", "It may be cut off or from another program"),
        ("no bytes", "It may be cut off or from another program"),
        ("text", "It may be cut off or from another program"),
        ("newer", f"has format version {FORMAT_VERSION + 1}, this lit_instruct reads up to {FORMAT_VERSION}"),
        ("object", "it holds Python objects"),
        ("plain pickle", "cannot be read"),
        ("unknown model", "holds a model of type 'tomorrow', which the installed transformers does not know"),
    ],
)
def test_refused_files(tmp_path, checkpoint, case, text):
    path = tmp_path / "x.ckpt"
    if case == "folder":
        path.mkdir()
    elif case == "foreign":
        torch.save({"state_dict": {}, "epoch": 1}, path)
    elif case == "tensor":
        torch.save(torch.zeros(3), path)
    elif case in ("truncated", "no bytes"):
        torch.save(checkpoint, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 if case == "truncated" else 0])
    elif case == "text":
        path.write_text("no checkpoint")
    elif case == "newer":
        checkpoint[KEY]["format_version"] = FORMAT_VERSION + 1
        torch.save(checkpoint, path)
    elif case == "object":
        torch.save({**checkpoint, "extra": Evil()}, path)
    elif case == "plain pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif case == "unknown model":
        checkpoint[KEY]["config"]["model_type"] = "tomorrow"
        torch.save(checkpoint, path)
    with pytest.raises(ConfigError) as error:
        read_handover(path)
    message = str(error.value)
    assert text in message
    assert str(path) in message
    assert len(message) < 900
    assert "\033" not in message
    assert "weights_only" not in message  # no advice to load it the unsafe way


def test_a_pickled_object_is_not_run(tmp_path, checkpoint):
    torch.save({**checkpoint, "extra": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError):
        read_handover(tmp_path / "x.ckpt")
    assert not RAN
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # it would have run
    assert RAN.pop() == 1
