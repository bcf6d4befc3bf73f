"""Templates."""

from __future__ import annotations

from scripts.bad_inputs.case import Case
from scripts.bad_inputs.world import Run, rm, sft, with_file


def template(content: str | bytes) -> Run:
    """The first stage with that template."""
    return with_file("mine.jinja", content, sft("--model.template", "mine.jinja"))


_LOOP = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

CASES = [
    Case("a template that is not there", sft("--model.template", "no.jinja")),
    Case("a template with a mistake", template("{% for message in messages %}{{ message['content'] }}")),
    Case("a template of another language", template("<|user|>%s<|assistant|>")),
    Case("a misspelt variable", template(_LOOP.replace("in messages", "in mesages"))),
    Case("a template that leaves out the prompt", template("{% for message in messages %}User: {% endfor %}")),
    Case("a binary template", template(bytes(range(128, 256)))),
    Case("a template that reaches for Python", template("{{ messages.__class__.__mro__ }}" + _LOOP)),
    Case("a template that counts for ever", template("{% for i in range(10**9) %}{% endfor %}" + _LOOP)),
    Case("a template that refuses users", template("{{ raise_exception('no users here') }}")),
    Case("another template than the stage before", rm("--model.template", "verbatim")),
]
