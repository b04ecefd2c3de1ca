"""The sandbox of chat templates: jinja without Python's internals, with what transformers offers to templates."""

import json
import re
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
import jinja2.sandbox


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says; here it only renders its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateNamespace(jinja2.utils.Namespace):
    """namespace() of a template, without underscore names, which could reach Python's internals."""

    def __init__(*args, **kwargs):
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a chat template may not set the name {name!r}")
        super().__setitem__(name, value)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja's immutable sandbox. Raises ValueError where it is broken.

    strftime_now is the clock: where a template prints the date (Llama 3.2's does, unless chat_template_kwargs give
    date_string), tokens depend on the day of tokenization, as in TRL.
    """
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError(f"jinja2 {jinja2.__version__} has known sandbox escapes; pip install -U 'jinja2>=3.1.6'")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": TemplateNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # a function has no attributes to climb from, a type has
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken at its line {error.lineno}: {error.message}") from None
