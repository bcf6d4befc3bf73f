"""What jsonargparse says in terms of its own machinery, in the words of who wrote the configuration."""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Collection, Sequence

_MOST_LINES = 12
_MOST_WORDS = 200

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "Iterable": "a list",
}


def plainly(message: str, options: Collection[str], given: Sequence[str], *, of_class: bool = False) -> str:
    """Put a parser's error into the user's words.

    Args:
        message: as the parser has it.
        options: every option of the command, as ``--model.learning_rate``.
        given: what the user wrote behind the stage.
        of_class: the parser is one for the arguments of a class that the configuration names; ``options`` are these.

    Returns:
        A few lines: what was got, what is needed, and where there is something to advise, what to do.
    """
    message = message.strip()
    unrecognized = re.match(r"unrecognized arguments: (\S+)", message, flags=re.IGNORECASE)
    if unrecognized:
        return _unknown(unrecognized[1].partition("=")[0], options)
    foreign = re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message)
    if foreign:
        return f"{_unknown(f'--{foreign[1]}', options)} Is a file of --config for another stage?"
    argument = re.match(r"Option '([^']+)' is not accepted", message)
    if argument:
        return _unknown_argument(argument[1], options if of_class else (), given)
    absent = re.search(r'key "([\w.]+)":.*(?:No module named .|import of )bitsandbytes', message, flags=re.DOTALL)
    if absent:
        return f"--{absent[1]}: bitsandbytes is not installed. Do: pip install 'lit-instruct[quant]'."
    follows = re.match(r"argument \w+\(([\w.]+), ([\w.]+)\) --> ([\w.]+):", message)
    if follows:
        return (
            f"--{follows[3]} cannot be set: it follows --{follows[2]}, or else --{follows[1]}. Do: give one of those."
        )
    computed = re.match(r"Call to compute_fn of link .*? failed: (.*)", message, flags=re.DOTALL)
    if computed:
        return computed[1]
    value = re.match(r'Parser key "([^"]+)":(.*)', message, flags=re.DOTALL)
    if value is None:
        return _cut(message)
    return _cut(_wrong_value(f"init_args: {value[1]}" if of_class else f"--{value[1]}", value[2]))


def why_not_made(message: str) -> str:
    """Why a class of the configuration could not be made, without the types that were then tried in vain.

    Args:
        message: of the parser's error over all of them.

    Returns:
        A few lines.
    """
    return _cut(_problem_of_class(message) or message)


def _unknown(option: str, options: Collection[str]) -> str:
    if not option.startswith("-"):
        return f"got {_shown(option)}, which belongs to no option. Do: write --section.option VALUE, or leave it out."
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.75)
    name = option.rpartition(".")[2].lstrip("-")
    near = near or [known for known in sorted(options) if known.rpartition(".")[2] == name][:1]
    hint = f"did you mean {near[0]}?" if near else "check the name."
    return f"there is no option {option}. Do: {hint}"


def _unknown_argument(name: str, options: Collection[str], given: Sequence[str]) -> str:
    """Of a class that the configuration names; its arguments are known where it came from a file."""
    found = [word.partition("=")[0] for word in given if re.match(rf"--[\w.]+\.{re.escape(name)}(=|$)", word)]
    if found and found[0].startswith("--trainer.callbacks."):
        return (
            f"Option {name!r} is not accepted: {found[0]} reaches the last callback named so far, so it belongs right "
            "behind the --config or class that names the callback; other classes' options behind theirs. Do: check "
            "the name and the order."
        )
    where = found[0] if found else f"init_args: {name!r}"
    near = difflib.get_close_matches(name, [option.lstrip("-") for option in options], n=1)
    hint = f"did you mean {near[0]}?" if near else "check the name, and that it stands where its class is named."
    return f"{where} is not accepted: the class that it is given to has no such argument. Do: {hint}"


def _wrong_value(name: str, text: str) -> str:
    text = text.strip()
    value = re.search(r"(?:Got value|Given value): ?(.*)\Z", text, flags=re.DOTALL)
    got = value[1].strip() if value else ""
    if got == "None":
        return f"{name} is missing; it has no default. Do: give it."
    if problem := _problem_of_class(text):
        return f"{name}: {problem}"
    needs = _needs(text)
    if value is None or not needs:
        return f"{name}: {' '.join(text.split())}"
    return f"{name}: got {_shown(got)}; need {needs}."


def _problem_of_class(text: str) -> str | None:
    """What is wrong with a class path, if that is what is wrong."""
    problem = re.search(
        r"Problem with given class_path '([^']*)':\s*(.*?)(?=\n\s*- |\n\s*Given value|\Z)", text, re.DOTALL
    )
    if problem is not None:
        path, reason = problem[1], " ".join(problem[2].split())
        missing = re.search(r"has no attribute '(\w+)'|No module named", reason)
        told = _short(reason).replace("HINT: Try running", "Do: run")
        return _no_class(path) if missing and told == reason else f"{path}: {told}"
    callable_ = re.search(r"expects a function or a callable class: (.*?)\.? Got value: (\S+)", text, re.DOTALL)
    if callable_ is not None:
        path = callable_[2]
        if "has no attribute" in callable_[1] or "No module named" in callable_[1]:
            return _no_class(path)
        return f"got {_shown(path)} ({_short(callable_[1]).rstrip('.')}). Do: check the name."
    if re.search(r"Import path does not correspond to a subclass of (\w+)|Not a valid subclass of (\w+)", text):
        kind = re.search(r"subclass of (\w+)", text)
        got = re.search(r"Given value: ?(.*)\Z", text, flags=re.DOTALL)
        assert kind is not None
        shown = _shown(got[1].strip()) if got else "something else"
        return (
            f"got {shown}; need a {kind[1]}: class_path with the class, init_args with its arguments. Do: check both."
        )
    return None


def _no_class(path: str) -> str:
    """A class path that leads nowhere, with the name that was perhaps meant."""
    place, _, name = path.rpartition(".")
    try:
        module = pkgutil.resolve_name(f"{place}:") if place else None
    except (ImportError, ValueError):
        return f"there is no class {path!r}, for there is no module {place!r}. Do: check the class_path."
    near = difflib.get_close_matches(name, getattr(module, "__all__", dir(module)), n=1)
    hint = f"did you mean {place}.{near[0]}?" if near else "check the class_path."
    return f"there is no class {path!r}. Do: {hint}"


def _needs(text: str) -> str:
    """The types that would do, in words."""
    listed = re.search(r"Subtypes: \[(.*?)\]\n", f"{text}\n") or re.search(r"Expected an? (.*?)\. Got value", text)
    if listed is None:
        return ""
    literals = [word.strip("' ") for group in re.findall(r"Literal\[(.*?)\]", listed[1]) for word in group.split(",")]
    classes = re.sub(r"typing\.Literal\[.*?\]", "", listed[1])
    kinds = [name.rpartition(".")[2] for name in re.findall(r"<class '([\w.]+)'>", classes)]
    kinds += [
        re.sub(r"\[.*", "", name).rpartition(".")[2] for name in re.findall(r"(?<!\w)([a-z]\w*(?:\.\w+)*\[)", classes)
    ]
    words = [_TYPES.get(kind, f"a {kind}") for kind in kinds]
    if literals:
        words.insert(0, "one of " + ", ".join(dict.fromkeys(literals)))
    return " or ".join(dict.fromkeys(words))


def _shown(value: str) -> str:
    value = " ".join(value.split())
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_WORDS * 3 else text[: _MOST_WORDS * 3] + " ..."


def _cut(message: str) -> str:
    """One screen at most."""
    lines = [line[:600] for line in message.splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."])
