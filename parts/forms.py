"""Rows in the forms of others: the two that are read as they are, and those to convert first.

    OpenAI      {"input": {"messages": [...], "tools": [...]},
                 "preferred_output": [...], "non_preferred_output": [...]}
    ms-swift    {"messages": [..., the chosen answer], "rejected_response": "..."}, or with the whole
                other conversation as "rejected_messages"

extras/convert.py turns the rest into rows of ours, once.
"""

from typing import Any

READ = {  # the keys of a row that training may read
    "prompt", "conversations", "chosen", "rejected", "system", "tools", "chat_template_kwargs",
    "images", "image", "videos", "video", "messages", "input", "preferred_output",
    "non_preferred_output", "rejected_response", "rejected_messages",
    "chosen_score", "rejected_score", "score_chosen", "score_rejected", "chosen_rating",
    "rejected_rating"}

# Names of the prompt elsewhere, in the order in which extras/convert.py looks for them.
PROMPT_NAMES = ("instruction", "question", "query", "problem", "input", "context", "messages")

# Keys by which a row is known to be in a form that extras/convert.py reads.
CONVERTIBLE = [
    keys.split() for keys in (
        "chosen_response", "rejected_response", "chosen_messages", "chosen_conversations",
        "generations", "fields", "completions", "answers", "response_0 response_1",
        "response1 response2", "response_1 response_2 preference_strength",
        "human_ref_A human_ref_B", "conversation_a conversation_b",
        "candidates scores", "responses scores", "responses ranks")]
HINT = "python -m extras.convert IN OUT turns such rows into pairs"


def renamed(row: dict) -> dict:
    """Return a row of OpenAI's or ms-swift's with our keys; any other row as it is."""
    if "chosen" in row:
        return row
    if "preferred_output" in row:
        return from_openai(row)
    if isinstance(row.get("messages"), list) and row["messages"]:
        if row.get("rejected_response") or row.get("rejected_messages"):
            return from_swift(row)
    return row


def from_openai(row: dict) -> dict:
    names = ("input", "preferred_output", "non_preferred_output")
    ours = {key: value for key, value in row.items() if key not in names}
    asked = row.get("input")
    if not isinstance(asked, dict):
        asked = {"messages": asked}
    ours["prompt"] = asked.get("messages")
    ours["chosen"] = row["preferred_output"]
    ours["rejected"] = row.get("non_preferred_output")
    if asked.get("tools"):
        ours["tools"] = asked["tools"]
    return ours


def from_swift(row: dict) -> dict:
    names = ("messages", "rejected_response", "rejected_messages")
    ours = {key: value for key, value in row.items() if key not in names}
    if row.get("rejected_messages"):  # two whole conversations, which begin alike
        return {"chosen": row["messages"], "rejected": row["rejected_messages"], **ours}
    other = row["rejected_response"]
    if isinstance(other, str):
        other = {"role": "assistant", "content": other}
    ours["prompt"] = row["messages"][:-1]
    ours["chosen"] = row["messages"][-1:]
    ours["rejected"] = other
    return ours


def convert_hint(row: dict) -> str:
    """Say that the row can be converted, where its keys show a form that is known; else ""."""
    is_known = any(all(key in row for key in keys) for keys in CONVERTIBLE)
    return f"; {HINT}" if is_known else ""


def lost_prompt(row: dict) -> str | None:
    """Name a key with a prompt of which `chosen` holds no word: it would not be trained on."""
    said = "\n".join(texts_of(row.get("chosen")))
    for name in PROMPT_NAMES:
        if any(text not in said for text in texts_of(row.get(name))):
            return name
    return None


def texts_of(value: Any) -> list[str]:
    """List the texts of a string, a message, or a list of messages; [] for anything else."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict):
        return texts_of(value.get("content", value.get("value", value.get("text"))))
    if isinstance(value, list):
        return [text for one in value for text in texts_of(one)]
    return []
