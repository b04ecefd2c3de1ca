"""Conversations as text: which chat template a tokenizer has, and what it makes of a row's messages."""

import json
from pathlib import Path

from data import REASONING, DataError, Tokenizer, read_json, tokenizer_files

RESERVED_KWARGS = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")


def find_templates(directory: Path) -> dict[str, str]:
    """{name: source}; files beside the tokenizer win over tokenizer_config.json, which may list several by name."""
    sources = {path.stem: path.read_text("utf-8") for path in tokenizer_files(directory) if path.suffix == ".jinja"}
    if "chat_template" in sources:
        sources["default"] = sources.pop("chat_template")
    for name in ("tokenizer_config.json", "chat_template.json"):
        sources = sources or read_json(directory / name).get("chat_template") or {}
    if isinstance(sources, list):
        sources = {entry["name"]: entry["template"] for entry in sources}
    return {"default": sources} if isinstance(sources, str) else sources


def choose_templates(templates: dict[str, str], choice: str | None) -> dict[str, str]:
    """The user's --chat_template: the name of a template, a .jinja file, a model directory, or the template itself."""
    if choice is None:
        return templates
    if choice in templates or "{" in choice:
        return {"default": templates.get(choice, choice)}
    if Path(choice).is_dir():
        return find_templates(Path(choice))
    if Path(choice).is_file():
        return {"default": Path(choice).read_text("utf-8")}
    raise DataError(f"chat template {choice!r} is neither a file, nor a template, nor one of {sorted(templates)}")


def template_message(message: dict) -> dict:
    """A message as templates expect it: no null fields, and one reasoning text under the names that are in use."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def template_name(tokenizer: Tokenizer, tools: list | None) -> str:
    """The name of the template that renders: "tool_use" where there are tools and there is one, else "default"."""
    templates = tokenizer.templates
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        what = f"has only the chat templates {sorted(templates)}" if templates else "has no chat template"
        raise DataError(f"the tokenizer in {tokenizer.directory} {what}; conversations need one, give --chat_template")
    return name


def render(tokenizer: Tokenizer, conversations: list[tuple[list, bool]], tools=None, **kwargs) -> list[str]:
    """[(messages, add_generation_prompt)] as the template's texts; `kwargs` are the template's. Raises DataError."""
    values = {"documents": None, **tokenizer.special_tokens, **kwargs, "tools": tools}
    conversations = [(list(map(template_message, messages)), prompted) for messages, prompted in conversations]
    try:
        return renderer_of(tokenizer).render(template_name(tokenizer, tools), conversations, values)
    except (ValueError, RecursionError) as error:
        raise DataError(str(error)) from None


def renderer_of(tokenizer: Tokenizer):
    """The process that renders for this tokenizer."""
    if tokenizer.renderer is None:
        from extras.template import Renderer

        tokenizer.renderer = Renderer(tokenizer.templates)
    return tokenizer.renderer


def parse_template_kwargs(row: dict) -> dict:
    """The row's chat_template_kwargs, with its tools (a list or JSON of one) as "tools"."""
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or any(name in kwargs for name in RESERVED_KWARGS):
        raise DataError(f'"chat_template_kwargs" must be an object without any of {", ".join(RESERVED_KWARGS)}')
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise DataError(f'"tools" is broken JSON ({error}); give a list of tool descriptions') from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError('"tools" must be a list of objects, or JSON of such a list')
    return {"tools": tools, **kwargs}


def chat_texts(row: dict, prompt: list, completions: list[list], tokenizer: Tokenizer) -> list[str]:
    """The rendered prompt with the header of an answer, then the rendered whole conversations."""
    system = row.get("system")
    if not isinstance(system, str | None):
        raise DataError(f'"system" is a {type(system).__name__}; it must be text')
    if system and prompt[:1] != [{"role": "system", "content": system}]:
        prompt = [{"role": "system", "content": system}, *prompt]
    if not prompt:
        raise DataError("the prompt is empty: chosen and rejected share no message; give the prompt")
    if [message["role"] for message in prompt[:2]] == ["system", "system"]:
        raise DataError('"system" is set, but the prompt begins with another system message; keep one of them')
    wholes = [(prompt + completion, False) for completion in completions]
    return render(tokenizer, [(prompt, True), *wholes], **parse_template_kwargs(row))
