"""A GGUF file is converted once; what it was converted into lies in a cache folder.

Taking a GGUF file apart costs many seconds for each hundred million weights, and a stage reads the model and its
tokenizer several times. The first load writes a folder in the ``save_pretrained`` format, fp32 as the weights are
trained, and every later one maps that folder into memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import transformers
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not in its __all__
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Part = Literal["model", "tokenizer"]

_FORMAT = 1  # counts up when other files are written, so that those of an older version are left alone
_SAMPLE_BYTES = 1 << 20
_WAIT_SECONDS = 3600.0  # for another process that converts the same file


def gguf_source(path: Path, part: Part) -> tuple[str, dict[str, str]]:
    """Where ``from_pretrained`` reads a part of a GGUF file; the first call for a file converts that part.

    Several processes may ask at once: one converts, the others wait for it. A process that is killed leaves nothing
    that another would read.

    Args:
        path: a ``.gguf`` file.
        part: ``model`` (configuration and weights) or ``tokenizer``.

    Returns:
        The place, and further arguments for ``from_pretrained``: the converted folder without any, or the file's own
        folder with ``gguf_file`` where there is no such file or the cache cannot be written (which is warned of).

    Raises:
        Exception: whatever transformers raises over a file that it cannot read.
    """
    directly = str(path.parent), {"gguf_file": path.name}
    root = cache_folder()
    if root is None or not path.is_file():
        return directly
    folder = root / f"{_key(path)}-{part}"
    if folder.is_dir():
        return str(folder), {}
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(root / f"{folder.name}.lock", timeout=_WAIT_SECONDS))
            if folder.is_dir():  # another process was converting it meanwhile
                return str(folder), {}
            for left_over in root.glob(f"{folder.name}.*.part"):  # of a process that was killed: the lock is ours
                shutil.rmtree(left_over, ignore_errors=True)
            scratch = tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=root)
        except OSError as error:
            return _without_cache(path, root, error)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        log.info("converting the %s of %s, once, into %s", part, path, folder)
        converted = _load(path, part)
        try:
            whole = Path(scratch) / part
            converted.save_pretrained(whole)
            for file in whole.iterdir():  # who may read the one may read the other, where users share a cache
                file.chmod(stat.S_IMODE(path.stat().st_mode) & 0o644 | 0o600)
            os.rename(whole, folder)
        except (OSError, SafetensorError) as error:
            return _without_cache(path, root, error)
    return str(folder), {}


def cache_folder() -> Path | None:
    """Where converted files lie, or None where they are not kept.

    ``LIT_INSTRUCT_CACHE``, if it is set (empty: nothing is kept); else ``lit_instruct`` in ``HF_HOME``, if that is set,
    else in the user's cache folder (``XDG_CACHE_HOME`` or ``~/.cache``).
    """
    own = os.environ.get("LIT_INSTRUCT_CACHE")
    if own is not None:
        return Path(own).expanduser() / "gguf" if own else None
    caches = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "lit_instruct" / "gguf"


def forget_quantisation(model: PreTrainedModel) -> None:
    """Take off the mark of its file: GGUF weights arrive dequantised, but a model with the mark refuses to be saved.

    Args:
        model: as transformers loads it from a GGUF file; changed in place.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _load(path: Path, part: Part) -> PreTrainedModel | PreTrainedTokenizerBase:
    where, name = str(path.parent), path.name
    if part == "tokenizer":
        return AutoTokenizer.from_pretrained(where, gguf_file=name, trust_remote_code=False)
    from transformers import AutoModelForCausalLM  # two seconds, which whoever reads a tokenizer alone does not spend

    config = AutoConfig.from_pretrained(where, gguf_file=name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        where, config=config, dtype=torch.float32, gguf_file=name, trust_remote_code=False
    )
    forget_quantisation(model)
    return model


def _key(path: Path) -> str:
    """Another name for another content: size, time of the last change, both ends of the file, and who converts it.

    The whole of a large file would take longer to digest than the converted folder to load.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, state.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    digest.update(f"{state.st_size} {state.st_mtime_ns} {_FORMAT} {transformers.__version__}".encode())
    return f"{path.stem[:60]}-{digest.hexdigest()[:20]}"


def _without_cache(path: Path, root: Path, error: Exception) -> tuple[str, dict[str, str]]:
    log.warning(
        "%s is taken apart again at every load, because it cannot be kept converted in %s: %s. Set LIT_INSTRUCT_CACHE "
        "to a folder that can be written and has room for its weights in fp32, or to nothing to go without.",
        path,
        root,
        error,
    )
    return str(path.parent), {"gguf_file": path.name}
