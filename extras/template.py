"""Chat templates are programs of strangers: they run in a sandbox, in a process of its own that is stopped when it
takes too long or too much.

jinja's immutable sandbox keeps a template from Python's internals; it bounds neither time nor memory. So this file is
also a program, which needs jinja alone and starts in a tenth of a second: it reads a conversation per line and answers
with its text, under limits that the kernel keeps, whatever the template is doing.
"""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from datetime import datetime
from typing import BinaryIO

import jinja2
import jinja2.debug  # else imported at the first error, when no file can be opened any more
import jinja2.ext
import jinja2.sandbox

SECONDS = 10  # of processor time for one conversation
MEMORY = 2**30  # bytes of address space beyond what the program has when it starts
LONGEST = 2**26  # characters of one rendered conversation
PATIENCE = 3  # stops after which a template is not tried again


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


def limit_memory() -> None:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def close_files() -> None:
    """From here on no file is opened and none is written to, though a template got out of the sandbox."""
    datetime.now().strftime("%c")  # reads the time zone's file
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def compiled(source: str) -> jinja2.Template | str:
    """The template, or why there is none."""
    try:
        return compile_template(source)
    except Exception as error:
        return f"{error}"


def answer(request: dict, templates: dict) -> dict:
    """{"texts": ...} or {"error": ...} for the conversations of a row, [(messages, add_generation_prompt)]."""
    template, texts = templates[request["name"]], []
    if isinstance(template, str):
        return {"error": template}
    try:
        for messages, prompted in request["conversations"]:
            texts.append(template.render(request["values"], messages=messages, add_generation_prompt=prompted))
            if len(texts[-1]) > LONGEST:
                return {"error": f"the chat template wrote {len(texts[-1]):,} characters for one conversation"}
        return {"texts": texts}
    except MemoryError:
        return {"error": f"the chat template wants more than {MEMORY >> 20} MiB for this conversation"}
    except Exception as error:  # a program fails in every way that a program can
        return {"error": f"the chat template refused the conversation: {error or type(error).__name__}"}


def serve(requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """The first line is the templates, each other one a row's conversations; every line is answered by one.

    SIGPROF's default action ends the process, also in the middle of one long operation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; this ends with the pipe
    limit_memory()
    templates = None
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if templates is None:
            templates, reply = {name: compiled(source) for name, source in json.loads(line).items()}, {"texts": []}
            close_files()  # compiling may import
        else:
            reply = answer(json.loads(line), templates)
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


# The trainer's side


class Renderer:
    """The process that renders, started at the first conversation and again after one that had to be stopped."""

    def __init__(self, templates: dict[str, str]):
        self.process: subprocess.Popen | None = None
        self.templates, self.stops, self.lock = templates, 0, threading.Lock()

    def start(self) -> None:
        command = [sys.executable, "-P", __file__, str(SECONDS)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
        weakref.finalize(self, stop, self.process)
        self.ask(self.templates)

    def ask(self, request: dict) -> list[str]:
        """The answer's texts. Raises ValueError with its error, or with the reason why there is no answer."""
        try:
            self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it ended before it answered
            reply = {"error": why_stopped(self.process)}
            self.process, self.stops = None, self.stops + 1
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["texts"]

    def render(self, name: str, conversations: list[tuple[list, bool]], values: dict) -> list[str]:
        """[(messages, add_generation_prompt)] as the texts that the template of this name makes. Raises ValueError."""
        with self.lock:
            if self.stops >= PATIENCE:
                raise ValueError(f"the chat template had to be stopped {PATIENCE} times before; it is not tried again")
            if self.process is None:
                self.start()
            return self.ask({"name": name, "conversations": conversations, "values": values})


def why_stopped(process: subprocess.Popen) -> str:
    stop(process)
    if process.returncode == -signal.SIGPROF:
        return f"the chat template ran for more than {SECONDS} s on this conversation and was stopped; is it endless?"
    return f"the chat template's process died on this conversation (exit status {process.returncode})"


def stop(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
