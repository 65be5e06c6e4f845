"""Conversations: made token ids by the tokenizer's chat template, and continued.

`chat` and `async_chat` are methods of `Engine`; they ask it for nothing but `generate`.
"""

from collections.abc import Mapping
from typing import Any, Unpack

from jaxengine.errors import RequestError
from jaxengine.generate_arguments import GenerateArguments


def chat(
    engine: Any,
    messages: Any,
    sampling_params: Any = None,
    *,
    tools: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    **others: Unpack[GenerateArguments],
) -> Any:
    """Continues a conversation, or a list of them, by the tokenizer's chat template.

    Args:
      messages: `[{"role": "user", "content": ...}, ...]`, or a list of such lists.
      sampling_params: As for `generate`.
      tools: JSON schemas, or functions with docstrings, for templates that show them.
      chat_template: A Jinja template, or the name of one the tokenizer has, instead of its own.
      add_generation_prompt: End with the beginning of an answer.
      continue_final_message: Go on with the last message instead of answering it.
      template_kwargs: Further variables of the template, such as `enable_thinking`.
      **others: Of `generate`, such as `stream`.

    Returns:
      What `generate` gives.

    Raises:
      RequestError: Where there is no tokenizer or template, or it refuses the messages.
    """
    ids = render(
        engine.tokenizer,
        messages,
        tools=tools,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
    )
    return engine.generate(None, sampling_params, ids, **others)


async def async_chat(
    engine: Any,
    messages: Any,
    sampling_params: Any = None,
    *,
    tools: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    **others: Unpack[GenerateArguments],
) -> Any:
    """`chat` for coroutines."""
    ids = render(
        engine.tokenizer,
        messages,
        tools=tools,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
    )
    return await engine.async_generate(None, sampling_params, ids, **others)


def render(
    tokenizer: Any,
    messages: Any,
    *,
    tools: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Token ids of one conversation, or a list of them.

    The template writes the special tokens itself, so tokenizing adds none: there is one at the
    beginning, not two.

    Args:
      tokenizer: A Hugging Face tokenizer.
      messages: A list of `{"role", "content"}` dicts, or a list of such lists.
      tools: JSON schemas, or functions with docstrings, as transformers takes them.
      chat_template: A Jinja template, or the name of one of the tokenizer's, instead of its own.
      add_generation_prompt: Ends with the beginning of an answer.
      continue_final_message: Leaves the last message open, to be continued; then there is no
        generation prompt.
      template_kwargs: Further variables of the template, such as `enable_thinking`.

    Raises:
      RequestError: Where there is no tokenizer or template, or it refuses the messages.
    """
    if tokenizer is None:
        raise RequestError("`messages` need a tokenizer, and this engine has none.")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise RequestError("The tokenizer has no chat template; pass one as `chat_template`.")
    conversations, is_list = _conversations(messages)
    rows = []
    for i, conversation in enumerate(conversations):
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except Exception as error:  # Jinja's, transformers', or what the template itself raises
            place = f"`messages` {i}" if is_list else "`messages`"
            cause = f"{type(error).__name__}: {error}"
            raise RequestError(f"The chat template does not take {place}: {cause}") from error
        rows.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return rows if is_list else rows[0]


def _conversations(messages: Any) -> tuple[list[Any], bool]:
    """The conversations, and whether there is a list of them."""
    is_list = isinstance(messages, list | tuple) and any(
        isinstance(item, list | tuple) for item in messages
    )
    rows = list(messages) if is_list else [messages]
    for row in rows:
        if not isinstance(row, list | tuple) or not row or not all(map(_is_message, row)):
            raise RequestError(
                '`messages` must be a list of {"role": ..., "content": ...} dicts, or a list of '
                f"such lists; got {row!r:.80}."
            )
    return rows, is_list


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message
