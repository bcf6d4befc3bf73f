"""The tokenizer of a stage, with the one template that turns a prompt into text.

Every tokenizer that this function returns has a ``chat_template``, so that encoding has a single path and the template
travels with the tokenizer's files from stage to stage.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_instruct.models.gguf_cache import gguf_source
from lit_instruct.models.handover import UNREADABLE, first_line, is_stage_checkpoint, read_handover, why_unreadable
from lit_instruct.types import ConfigError

_TURNS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_VERBATIM = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template raises that is none, or that reaches for what is not there."""

_SPECIAL_FILES = {"auto", "plain", "verbatim"}


def load_tokenizer(
    source: str | PathLike[str] | PreTrainedTokenizerBase, *, template: str = "auto"
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and settle its template.

    Args:
        source: a hub name, a folder, a GGUF file, a checkpoint of an earlier stage, or a loaded tokenizer (which is
            changed in place: its ``chat_template`` is set).
        template: how prompts become text. ``auto``: the tokenizer's own chat template, or ``plain`` where it has
            none. ``plain``: "User:", the text, "Assistant:" on lines of their own. ``verbatim``: the prompt's text and
            nothing else. Anything else is the path of a Jinja file in the form of Hugging Face chat templates.

    Returns:
        A tokenizer whose ``chat_template`` is set and which has an end-of-text token.

    Raises:
        ConfigError: nothing can be loaded from ``source``, it has no end-of-text token, or the template is not there,
            is no template or leaves out what a message says.
    """
    tokenizer = source if isinstance(source, PreTrainedTokenizerBase) else _load(source)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {source!r} has no end-of-text token; every response must end with one, else a policy "
            "never learns to stop. Set eos_token in its tokenizer_config.json."
        )
    own = tokenizer.chat_template
    if template == "auto":
        tokenizer.chat_template = own or _with_bos(tokenizer, _TURNS)
    elif template in _SPECIAL_FILES:
        tokenizer.chat_template = _with_bos(tokenizer, _TURNS if template == "plain" else _VERBATIM)
    else:
        path = Path(template)
        if not path.is_file():
            raise ConfigError(
                f"template: got {template!r}, which is no file; need auto, plain, verbatim or the path of a Jinja file."
            )
        tokenizer.chat_template = _read_template(path)
    _try_template(tokenizer, template)
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"template: {str(path)!r} cannot be read ({error}); need a Jinja file in UTF-8. Do: check what it is."
        ) from error


def _try_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Two prompts that differ must become texts that differ. transformers runs templates in a sandbox."""
    what = "the tokenizer's own chat template" if template == "auto" else f"template {template!r}"
    try:
        texts = {
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            for content in ("one", "two")
        }
    except _TEMPLATE_ERRORS as error:
        line = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ConfigError(
            f"template: got {what}, which makes no text of a user's message ({type(error).__name__}{line}: "
            f"{first_line(error)}); need a Jinja template of `messages`. Do: mend it, or set template to plain."
        ) from error
    if len(texts) == 1:
        raise ConfigError(
            f"template: got {what}, which makes {_beginning(texts.pop())} of every prompt; need one that writes "
            "what the messages say: {{ message['content'] }}. Do: mend it, or set template to plain."
        )


def _beginning(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded places. Any id would do, since masks come from lengths; pad, else end of text."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def reads_alike(reader: PreTrainedTokenizerBase, writer: PreTrainedTokenizerBase) -> bool:
    """Whether a model of one tokenizer reads the tokens that a model of the other writes.

    Args:
        reader: may have a padding token that the writer does not have, as an exported reward model's does.
        writer: the policy's.
    """
    differences = set(reader.get_vocab().items()) ^ set(writer.get_vocab().items())
    return differences <= {(reader.pad_token, reader.pad_token_id)}


def _load(source: str | PathLike[str]) -> PreTrainedTokenizerBase:
    path = Path(source)
    if is_stage_checkpoint(path):
        with read_handover(path).tokenizer_folder() as folder:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        where, gguf = gguf_source(path, "tokenizer") if path.suffix == ".gguf" else (str(source), {})
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **gguf)
    except UNREADABLE as error:
        raise ConfigError(
            f"no tokenizer could be loaded from {str(source)!r}: {why_unreadable(error)} Give a hub name, a "
            "folder with tokenizer files, a GGUF file or the checkpoint of an earlier stage (model.tokenizer)."
        ) from error


def _with_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Put the beginning-of-text token first where the tokenizer itself would: templates carry their special tokens."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]  # may be bos itself, where that is the unknown token
    begins = tokenizer("x")["input_ids"][: len(bare) + 1] == [tokenizer.bos_token_id, *bare]
    return "{{ bos_token }}" + template if begins else template
