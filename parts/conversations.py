"""Turn a row into text: as it stands, or as the tokenizer's chat template renders its
conversations.

Templates are programs written by strangers. They run in a process of their own (parts/template.py),
which is stopped when it takes too long or too much memory.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from parts.rows import DataError
from parts.tokenizer_files import read_json, tokenizer_files
from parts.turns import REASONING, is_empty, parse_ratings, split_row
from parts.vision_configs import READS_IMAGES

RESERVED_KWARGS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
PROGRAM = Path(__file__).with_name("template.py")
SECONDS = 10  # of processor time for one row's conversations
MAX_STOPS = 3  # stops after which a template is not tried again


# Which templates a tokenizer has


def find_templates(directory: Path) -> dict[str, str]:
    """Return {name: source}; files of their own win over tokenizer_config.json's one or several.

    Raises DataError for what is neither text nor a list of named texts.
    """
    files = [path for path in tokenizer_files(directory) if path.suffix == ".jinja"]
    sources: Any = {path.stem: path.read_text("utf-8") for path in files}
    if "chat_template" in sources:
        sources["default"] = sources.pop("chat_template")
    for name in ("tokenizer_config.json", "chat_template.json"):
        sources = sources or read_json(directory / name).get("chat_template") or {}
    if isinstance(sources, list) and all(isinstance(entry, dict) for entry in sources):
        sources = {entry.get("name"): entry.get("template") for entry in sources}
    sources = {"default": sources} if isinstance(sources, str) else sources
    is_named = isinstance(sources, dict) and all(isinstance(name, str) for name in sources)
    if not is_named or not all(isinstance(text, str) for text in sources.values()):
        what = f"{directory}: its chat_template is {json.dumps(sources)[:60]}"
        raise DataError(f'{what}; expected text, or a list of {{"name": ..., "template": ...}}')
    return sources


def load_templates(directory: Path, choice: str | None) -> dict[str, str]:
    """Return {name: source} of the templates; "default" is the one that is used.

    `choice` is --chat_template: a template's name, a .jinja file, a model directory, or the
    template itself.
    """
    templates = find_templates(directory)
    if choice is None:
        return templates
    if choice in templates or "{" in choice:
        return {"default": templates.get(choice, choice)}
    if Path(choice).is_dir():
        return find_templates(Path(choice))
    if Path(choice).is_file():
        return {"default": Path(choice).read_text("utf-8")}
    names = sorted(templates)
    what = f"chat template {choice!r} is neither a file, nor a template"
    raise DataError(f"{what}, nor one of {names}")


# Rendering


def template_message(message: dict) -> dict:
    """Return a message as templates expect it: no nulls, reasoning under each of its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class Renderer:
    """The process that renders; started at the first conversation, restarted after a stop."""

    def __init__(self, templates: dict[str, str], directory: Path):
        self.templates = templates
        self.directory = directory  # of the tokenizer, for messages
        self.process: subprocess.Popen | None = None
        self.stops = 0
        self.lock = threading.Lock()

    def template_name(self, tools: list | None) -> str:
        """Name the template: "tool_use" where there are tools and such a one, else "default"."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            has = f"has only the chat templates {sorted(self.templates)}"
            what = has if self.templates else "has no chat template"
            how = "conversations need one, give --chat_template"
            raise DataError(f"the tokenizer in {self.directory} {what}; {how}")
        return name

    def render(self, conversations: list[tuple[list, bool]], values: dict) -> list[str]:
        """Render [(messages, add_generation_prompt)]; templates see `values`. Raises DataError."""
        name = self.template_name(values["tools"])
        cleaned = [
            ([template_message(message) for message in messages], prompted)
            for messages, prompted in conversations
        ]
        with self.lock:
            if self.stops >= MAX_STOPS:
                what = f"the chat template had to be stopped {MAX_STOPS} times before"
                raise DataError(f"{what}; it is not tried again")
            if self.process is None:
                self.start()
            return self.ask({"name": name, "conversations": cleaned, "values": values})

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, stop, self.process)
        self.ask(self.templates)

    def ask(self, request: dict) -> list[str]:
        """Return the answer's texts. Raises DataError with its error, or why there is no answer."""
        try:
            line = json.dumps(request, default=str).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            raise DataError(str(error)) from None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):  # it ended before it answered
            reply = {"error": why_stopped(self.process)}
            self.process = None
            self.stops += 1
        if "error" in reply:
            raise DataError(reply["error"])
        return reply["texts"]


def why_stopped(process: subprocess.Popen) -> str:
    """Stop the process, and say what it died of."""
    stop(process)
    if process.returncode == -signal.SIGPROF:
        what = f"the chat template ran for more than {SECONDS} s on this conversation"
        return f"{what} and was stopped; is it endless?"
    status = f"exit status {process.returncode}"
    return f"the chat template's process died on this conversation ({status})"


def stop(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


# A row's texts


class RowTexts(NamedTuple):
    """The texts of a row that are tokenized."""

    texts: list[str]  # the prompt alone, then the prompt with each completion
    add_special_tokens: bool  # to text; a chat template writes its own
    ratings: tuple[float, float]  # of chosen and rejected, nan where absent


def row_texts(row: dict, tokenizer: Any, need_rejected: bool = True) -> RowTexts:
    """Check a row and render it. Raises DataError saying what was found and what to do.

    Of the tokenizer (data.Tokenizer) it reads eos_token and render_all.
    """
    refuse_media(row, reads_images=getattr(tokenizer, "pictures", None) is not None)
    prompt, chosen, rejected = split_row(row, need_rejected)
    completions = [chosen] if rejected is None else [chosen, rejected]
    for name, completion in zip(("chosen", "rejected"), completions, strict=False):
        if is_empty(completion):
            what = f'the completion of "{name}" is empty'
            raise DataError(f"{what}; give an answer, or remove the row")
    is_plain = isinstance(prompt, str)
    render = plain_texts if is_plain else chat_texts
    texts = render(row, prompt, completions, tokenizer)
    if re.search("[\ud800-\udfff]", "".join(texts)):
        what = "the text has half of a surrogate pair (\\ud83d alone, say)"
        raise DataError(f"{what}; write whole characters")
    return RowTexts(texts, add_special_tokens=is_plain, ratings=parse_ratings(row))


def refuse_media(row: dict, reads_images: bool) -> None:
    """Raise DataError for video and audio, which no model here reads, and images in a text run."""
    turns = [row.get(key) for key in ("prompt", "conversations", "chosen", "rejected")]
    messages = [one for value in turns if isinstance(value, list) for one in value]
    contents = [one.get("content") for one in messages if isinstance(one, dict)]
    parts = [part for one in contents if isinstance(one, list) for part in one]
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    named = lambda *names: any(row.get(name) for name in names)
    if kinds & {"video", "video_url"} or named("videos", "video"):
        raise DataError("the row has videos, which no model here reads; remove the row")
    if kinds & {"audio", "audio_url", "input_audio"} or named("audios"):
        raise DataError("the row has audio, which no model here reads; remove the row")
    if not reads_images and (kinds & {"image", "image_url"} or named("images", "image")):
        what = "the row has images, but this is a text run"
        how = ("remove them, or train a model whose images are read, with its "
               f"preprocessor_config.json: {', '.join(READS_IMAGES)}")
        raise DataError(f"{what}; {how}")


def plain_texts(row: dict, prompt: str, completions: list[str], tokenizer: Any) -> list[str]:
    """Return the prompt, then prompt + completion, each ending with EOS."""
    for key in ("system", "tools"):
        if row.get(key):
            how = "write it into the prompt, or give conversations"
            raise DataError(f'"{key}" is set, but the prompt is text; {how}')
    eos = tokenizer.eos_token
    if not eos:
        what = "the tokenizer has no eos_token, so an answer has no end"
        raise DataError(f"{what}; set it in tokenizer_config.json")
    ended = [text if text.endswith(eos) else text + eos for text in completions]
    return [prompt, *(prompt + text for text in ended)]


def chat_texts(row: dict, prompt: list, completions: list[list], tokenizer: Any) -> list[str]:
    """Render the prompt with the header of an answer, then each whole conversation."""
    system = row.get("system")
    if not isinstance(system, str | None):
        raise DataError(f'"system" is a {type(system).__name__}; it must be text')
    # in parts where the prompt is, as templates of models that read images may want it
    in_parts = bool(prompt) and isinstance(prompt[0].get("content"), list)
    content = [{"type": "text", "text": system}] if in_parts else system
    if system and prompt[:1] != [{"role": "system", "content": content}]:
        prompt = [{"role": "system", "content": content}, *prompt]
    if not prompt:
        what = "the prompt is empty: chosen and rejected share no message"
        raise DataError(f"{what}; give the prompt")
    if [message["role"] for message in prompt[:2]] == ["system", "system"]:
        what = '"system" is set, but the prompt begins with another system message'
        raise DataError(f"{what}; keep one of them")
    conversations = [(prompt, True)]
    conversations += [(prompt + completion, False) for completion in completions]
    return tokenizer.render_all(conversations, **parse_template_kwargs(row))


def parse_template_kwargs(row: dict) -> dict:
    """Return the row's chat_template_kwargs, with its tools (a list or JSON of one) as "tools"."""
    tools = row.get("tools")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or any(name in kwargs for name in RESERVED_KWARGS):
        names = ", ".join(RESERVED_KWARGS)
        raise DataError(f'"chat_template_kwargs" must be an object without any of {names}')
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        what = f'"tools" is broken JSON ({error})'
        raise DataError(f"{what}; give a list of tool descriptions") from None
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not is_list:
        raise DataError('"tools" must be a list of objects, or JSON of such a list')
    return {"tools": tools, **kwargs}
