"""A stage's checkpoint as a plain Hugging Face folder, which loads without this package.

A policy becomes a causal language model, or its adapter a folder of PEFT's, a reward model a sequence classifier with
one output. Beside the weights
(safetensors) the folder holds the tokenizer with its chat template, and ``lit_instruct_export.json``, which says where
it came from and which files are its own: these, and no others, the next export into the same folder replaces.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_instruct.models.adapter_checkpoints import save_adapter
from lit_instruct.models.backbone import load_language_model, load_weights
from lit_instruct.models.handover import first_line, is_stage_checkpoint, read_handover
from lit_instruct.models.reward_folder import SCORE_BIAS
from lit_instruct.models.scalar_head import ScalarModel
from lit_instruct.models.tokenizer import load_tokenizer, padding_id
from lit_instruct.types import ConfigError

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]

MARK = "lit_instruct_export.json"
"""The file that makes a folder an export."""

_PAD = "<|pad|>"
_ROUNDING = 1e-4


def export_checkpoint(
    checkpoint: str, out: str, *, adapter: bool = False, ema: bool = False, dtype: Dtype = "float32"
) -> Path:
    """Write a stage's model as a Hugging Face folder.

    Args:
        checkpoint: .ckpt of a stage: sft and ppo give their policy, rm its reward model; an adapter is merged.
        out: the folder to write; new, empty, or an earlier export, which is replaced.
        adapter: write the adapter of a policy alone, in the format of PEFT.
        ema: take the averaged weights that the callback WeightEMA keeps instead of the last ones.
        dtype: of the written weights: float32 or bfloat16.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no such checkpoint or average, transformers has no classifier on that decoder, or the
            folder holds something else.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype: got {dtype!r}; need one of {', '.join(get_args(Dtype))}.")
    if not is_stage_checkpoint(checkpoint):
        raise ConfigError(f"checkpoint: got {checkpoint!r}; need the .ckpt of a stage. Do: give what fit has printed.")
    folder = Path(out)
    replaced = _earlier_files(folder)
    stage = read_handover(checkpoint).stage
    if ema and stage == "rm":
        raise ConfigError(
            f"ema: got true for the reward model {checkpoint!r}; only policies are averaged. Leave it out."
        )
    tokenizer = load_tokenizer(checkpoint)
    about = {"stage": stage, "weights": "average" if ema else "last", "dtype": dtype}
    if adapter:
        if dtype != "float32":
            raise ConfigError(f"dtype: got {dtype} for an adapter, which is kept in float32. Leave it out.")
        _settle(tokenizer, padding_side="left")
        _write(folder, partial(save_adapter, checkpoint, ema=ema), tokenizer, about, replaced)
        return folder
    model = _classifier(checkpoint, tokenizer) if stage == "rm" else _policy(checkpoint, tokenizer, ema=ema)
    model.to(getattr(torch, dtype))
    _write(folder, model.save_pretrained, tokenizer, about, replaced)
    return folder


def _policy(checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, ema: bool) -> PreTrainedModel:
    """The policy; it ends where it was trained to end, whatever its base model said."""
    model = load_language_model(checkpoint, ema=ema)
    pad = padding_id(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _settle(tokenizer, padding_side="left")  # as generation wants its prompts
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad
    )
    return model


def _classifier(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The reward model as a sequence classifier with one output."""
    scalar = ScalarModel.from_base(checkpoint).eval()
    config = read_handover(checkpoint).config
    config.num_labels = 1
    config.eos_token_id = tokenizer.eos_token_id
    setattr(config, SCORE_BIAS, float(scalar.head.bias.detach().double() - scalar.score_bias.double()))
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    except ValueError as error:
        raise ConfigError(
            f"export: got a reward model of type {config.model_type!r}, for which transformers has no sequence "
            "classifier; need one that has. Do: use the .ckpt itself as reward_model."
        ) from error
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.weight.shape != scalar.head.weight.shape:
        raise _other_scores(model, "its head is not one linear map without a bias")
    load_weights(model.base_model.state_dict(), scalar.trunk.state_dict(), Path(checkpoint))
    with torch.no_grad():
        head.weight.copy_(scalar.head.weight)
    _give_padding(model, tokenizer)
    _check_scores(model, scalar, tokenizer)
    return model


@torch.no_grad()
def _give_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The head of a classifier reads the last token that is no padding: for us the end of text, so they must differ."""
    _settle(tokenizer, padding_side="right")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": _PAD})
    pad = tokenizer.pad_token_id
    if pad >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
        model.get_input_embeddings().weight[pad] = 0.0  # never seen
    model.config.get_text_config().pad_token_id = pad


def _settle(tokenizer: PreTrainedTokenizerBase, *, padding_side: str) -> None:
    # Token types mean nothing to a decoder, and a GPT-2 that is given some adds the embedding of token 0 to each place.
    for name, value in (("padding_side", padding_side), ("model_input_names", ["input_ids", "attention_mask"])):
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what is saved


@torch.no_grad()
def _check_scores(model: PreTrainedModel, scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the classifier is the reward model in another form can be seen in numbers."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = [token for token in range(len(tokenizer)) if token not in (pad, end)]
    rows = [[*tokens[:length], end] for length in (5, 2, 3)]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask_BT = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    got_B: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits.squeeze(1)
    got_B = got_B + getattr(model.config, SCORE_BIAS)
    need_B = scalar.scores(ids_BT.where(mask_BT, end), mask_BT)
    if not torch.allclose(got_B, need_B, rtol=_ROUNDING, atol=_ROUNDING):
        raise _other_scores(model, "it gives other scores to the rows of a test")


def _other_scores(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"export: got a reward model that {type(model).__name__} of transformers does not stand for: {reason}. Need a "
        "decoder whose classifier reads the last token by one linear map. Do: use the .ckpt itself as reward_model."
    )


def _earlier_files(folder: Path) -> list[str]:
    """What an earlier export left there."""
    if is_stage_checkpoint(folder) or folder.is_file():
        raise ConfigError(f"out: got {str(folder)!r}; need a folder whose name does not end in .ckpt. Choose another.")
    if (folder / MARK).is_file():
        try:
            files = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
            return [Path(str(name)).name for name in files]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"out: {MARK} in {str(folder)!r} cannot be read: {first_line(error)} Do: choose another folder."
            ) from error
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"out: got {str(folder)!r}, which holds files that no export has written; need a new or empty folder, or "
            "an earlier export. Choose another."
        )
    return []


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """For some types of model transformers takes the tokenizer class of the type, whatever the folder says."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = f"{tokenizer.chat_template} {' '.join(list(tokenizer.get_vocab())[:50])}"
    if again.get_vocab() != tokenizer.get_vocab() or again(text)["input_ids"] != tokenizer(text)["input_ids"]:
        log.warning(
            "AutoTokenizer makes a %s of the exported tokenizer, because of the model's type, and that reads other "
            "tokens: load it as transformers.PreTrainedTokenizerFast, and start further stages from the .ckpt",
            type(again).__name__,
        )


def _write(
    folder: Path,
    save: Callable[[Path], Any],
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    replaced: list[str],
) -> None:
    """Everything is written beside the folder first: an export that breaks off leaves what was there."""
    parent = folder.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    try:
        save(scratch)
        tokenizer.save_pretrained(scratch)
        _check_tokenizer(scratch, tokenizer)
        names = sorted(path.name for path in scratch.iterdir())
        folder.mkdir(exist_ok=True)
        for name in [MARK, *replaced]:
            (folder / name).unlink(missing_ok=True)
        for name in names:
            os.replace(scratch / name, folder / name)
        (folder / MARK).write_text(json.dumps({**about, "files": names}, indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
