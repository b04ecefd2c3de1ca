"""The program that renders chat templates, apart from the trainer: python template.py SECONDS

Templates are programs written by strangers. jinja's immutable sandbox keeps one from Python's
internals, but bounds neither time nor memory. So this is a program of its own, which needs jinja
alone and starts in a tenth of a second: it reads a row's conversations per line and answers with
their texts, under limits that the kernel enforces, whatever the template is doing.
parts/conversations.py starts it, asks it and restarts it.
"""

import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.debug  # otherwise imported at the first error, when no file can be opened any more
import jinja2.ext
import jinja2.sandbox

MEMORY = 2**30  # bytes of address space beyond what the program has when it starts
LONGEST = 2**26  # characters of one rendered conversation


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words; they are rendered."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class TemplateNamespace(jinja2.utils.Namespace):
    """namespace() of a template, without underscore names, which could reach Python's internals."""

    def __init__(*args, **kwargs):
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: Any, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a chat template may not set the name {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: jinja's own `tojson` escapes HTML, which a prompt must not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in jinja's immutable sandbox. Raises ValueError where it is broken.

    strftime_now is the clock: where a template prints the date (Llama 3.2's does, unless
    chat_template_kwargs give date_string), tokens depend on the day of tokenization, as in TRL.
    """
    version = jinja2.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 1, 6):
        how = "pip install -U 'jinja2>=3.1.6'"
        raise ValueError(f"jinja2 {version} has known sandbox escapes; {how}")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": TemplateNamespace,
        # a function has no attributes to climb from, a type has
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        what = f"the chat template is broken at its line {error.lineno}"
        raise ValueError(f"{what}: {error.message}") from None


def limit_memory() -> None:
    used = 0
    if sys.platform == "linux":
        pages = int(open("/proc/self/statm").read().split()[0])
        used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def close_files() -> None:
    """Let no file be opened or written to any more, even by a template that left the sandbox."""
    datetime.now().strftime("%c")  # reads the time zone's file
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def compiled(source: str) -> jinja2.Template | str:
    """Return the template, or why there is none."""
    try:
        return compile_template(source)
    except Exception as error:
        return f"{error}"


def answer(request: dict, templates: dict) -> dict:
    """Return {"texts": ...} or {"error": ...} for a row's conversations."""
    template = templates[request["name"]]
    texts = []
    if isinstance(template, str):
        return {"error": template}
    try:
        for messages, prompted in request["conversations"]:
            text = template.render(
                request["values"], messages=messages, add_generation_prompt=prompted
            )
            if len(text) > LONGEST:
                what = f"the chat template wrote {len(text):,} characters for one conversation"
                return {"error": what}
            texts.append(text)
        return {"texts": texts}
    except MemoryError:
        what = f"the chat template wants more than {MEMORY >> 20} MiB for this conversation"
        return {"error": what}
    except Exception as error:  # a program fails in every way that a program can
        why = str(error) or type(error).__name__
        return {"error": f"the chat template refused the conversation: {why}"}


def serve(requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answer each line with one: the first is the templates, each other one a row's conversations.

    SIGPROF's default action ends the process, even in the middle of one long operation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; this ends with the pipe
    limit_memory()
    templates = None
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if templates is None:
            templates = {name: compiled(source) for name, source in json.loads(line).items()}
            reply = {"texts": []}
            close_files()  # compiling may import
        else:
            reply = answer(json.loads(line), templates)
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
