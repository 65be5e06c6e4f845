"""Messages from outside, in OpenAI's forms and however wrong, to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.chat import render
from jaxengine.errors import RequestError


def chat_ids(tokenizer: Any, messages: Any, *, system: str | None = None) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to speak.

    Args:
      tokenizer: A Hugging Face tokenizer.
      messages: Dicts with `role` and `content`, oldest first; checked, whatever comes. Content may
        be a list of OpenAI's text parts.
      system: Comes first where the conversation has no system message of its own.

    Raises:
      RequestError: For messages that are none, or that the template does not take.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("`messages` must be a list of messages that is not empty.")
    turns = [_message(i, message) for i, message in enumerate(messages)]
    if system is not None and turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": system}, *turns]
    return render(tokenizer, turns)


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"Message {i} must be a dict with a `role`, got {message!r}.")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if any(not isinstance(text, str) for text in texts):
            raise RequestError(f"`content` of message {i} may hold text parts only.")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise RequestError(f"`content` of message {i} must be a text, got {content!r}.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start}"
        raise RequestError(f"Message {i} holds half a surrogate pair {where}.") from None
    return {**message, "content": content}
