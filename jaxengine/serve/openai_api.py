"""OpenAI's completion objects: requests to arguments of `generate`, outputs back. No web here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.errors import RequestError
from jaxengine.serve.messages import chat_ids

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

IGNORED = frozenset(
    """
    metadata model parallel_tool_calls prompt_cache_key reasoning_effort safety_identifier
    service_tier store stream_options user verbosity
    """.split()
)
"""Fields that ask for nothing here."""

UNSUPPORTED = frozenset(
    """
    audio best_of functions function_call modalities prediction response_format suffix tool_choice
    tools web_search_options
    """.split()
)
"""Fields of OpenAI's whose feature does not exist here; a value that asks for it is refused."""

SAME_NAMES = frozenset(
    """
    frequency_penalty ignore_eos logit_bias min_p n presence_penalty repetition_penalty
    seed skip_special_tokens stop stop_token_ids temperature top_k top_p
    """.split()
)
"""Sampling parameters that are called the same here; some are not OpenAI's, but usual."""

NOTHING: tuple[Any, ...] = (None, False, [], {}, "none", "auto", ["text"], {"type": "text"}, 1)
"""Values of unsupported fields that ask for nothing."""


class Request(NamedTuple):
    """A parsed request.

    Attributes:
      url: CHAT or COMPLETION.
      model: As the client called it.
      arguments: Of `Engine.generate`, all but `stream`: `prompt` or `input_ids`, `sampling_params`.
      num_top: Logprobs of this many tokens are reported at every place; None for no logprobs.
      stream: The client wants chunks.
      wants_usage: The last chunk carries the usage.
      echo: The prompt's text comes first in the answer.
    """

    url: str
    model: str
    arguments: dict[str, Any]
    num_top: int | None = None
    stream: bool = False
    wants_usage: bool = False
    echo: str = ""


def is_batch_line(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of OpenAI's batch lines."""
    has_body = isinstance(record.get("body"), Mapping) and isinstance(record.get("url"), str)
    return has_body and record.get("custom_id") is not None


def parse(url: str, body: Any, tokenizer: Any) -> Request:
    """Checks a request's body and translates it.

    Args:
      url: CHAT or COMPLETION.
      body: As it came.
      tokenizer: For the chat template.

    Raises:
      RequestError: Says which field, and what about it.
    """
    if url not in (CHAT, COMPLETION):
        raise RequestError(f"`url` must be {CHAT} or {COMPLETION}, got {url!r}.")
    if not isinstance(body, Mapping):
        raise RequestError(f"The body must be an object, got {type(body).__name__}.")
    for name in UNSUPPORTED & body.keys():
        if body[name] not in NOTHING:
            raise RequestError(f"`{name}` is not supported by jaxengine; leave it out.")
    is_chat = url == CHAT
    own = {"messages", "max_completion_tokens", "top_logprobs"} if is_chat else {"prompt", "echo"}
    own |= {"max_tokens", "logprobs", "stream", "min_tokens"}
    if unknown := body.keys() - own - SAME_NAMES - IGNORED - UNSUPPORTED:
        raise RequestError(f"Unknown field `{min(unknown)}` for {url}.")
    params = {name: body[name] for name in SAME_NAMES & body.keys() if body[name] is not None}
    if body.get("min_tokens") is not None:
        params["min_new_tokens"] = body["min_tokens"]
    num_top = _chat_logprobs(body) if is_chat else _completion_logprobs(body)
    if is_chat:
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        # OpenAI's chat goes on to the end of the context, its completion for 16 tokens.
        params["max_new_tokens"] = limit
        prompt: dict[str, Any] = {"input_ids": chat_ids(tokenizer, body.get("messages"))}
    else:
        limit = body.get("max_tokens")
        params["max_new_tokens"] = 16 if limit is None else limit
        prompt = _prompt(body.get("prompt"))
    arguments: dict[str, Any] = {**prompt, "sampling_params": params}
    if num_top is not None:
        more = {"return_text_in_logprobs": True, "top_logprobs_num": num_top}
        arguments |= {"return_logprob": True, **more}
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise RequestError(f"`stream_options` must be an object, got {options!r:.80}.")
    return Request(
        url=url,
        model=str(body.get("model", "")),
        arguments=arguments,
        num_top=num_top,
        stream=bool(body.get("stream")),
        wants_usage=bool(options.get("include_usage")),
        echo=prompt.get("prompt", "") if body.get("echo") else "",
    )


def answer(
    request: Request, outputs: Sequence[Mapping[str, Any]], *, id: str, created: int, model: str
) -> dict[str, Any]:
    """The whole answer to a request, from its samples' outputs."""
    is_chat = request.url == CHAT
    choices = []
    for index, output in enumerate(outputs):
        choice: dict[str, Any] = {"index": index}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": output["text"], "refusal": None}
        else:
            choice["text"] = request.echo + output["text"]
        choice["logprobs"] = logprobs(request, output["meta_info"], 0)
        choice["finish_reason"] = finish_reason(output)
        choices.append(choice)
    kind = "chat.completion" if is_chat else "text_completion"
    head = {"id": id, "object": kind, "created": created, "model": model}
    return {**head, "choices": choices, "usage": usage(outputs)}


def chunk(
    request: Request,
    output: Mapping[str, Any] | None,
    *,
    id: str,
    created: int,
    model: str,
    index: int = 0,
    text: str = "",
    num_before: int = 0,
    is_first: bool = False,
) -> dict[str, Any]:
    """One streamed piece; without an output, the frame that carries the usage.

    Args:
      request: What is answered.
      output: A chunk of `generate(stream=True)`.
      id: Of the answer.
      created: Of the answer, seconds since 1970.
      model: Name of the model.
      index: Which sample.
      text: What is new.
      num_before: Tokens reported in earlier chunks of this sample.
      is_first: The role is told in the first one.
    """
    is_chat = request.url == CHAT
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    head = {"id": id, "object": kind, "created": created, "model": model}
    if output is None:
        return {**head, "choices": []}
    choice: dict[str, Any] = {"index": index}
    if is_chat:
        choice["delta"] = {"role": "assistant"} if is_first else {}
        choice["delta"]["content"] = text
    else:
        choice["text"] = text
    choice["logprobs"] = logprobs(request, output["meta_info"], num_before)
    choice["finish_reason"] = finish_reason(output)
    return {**head, "choices": [choice]}


def usage(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens of a request; its prompt counts once, whatever the number of samples."""
    metas = [output["meta_info"] for output in outputs]
    prompt = metas[0]["prompt_tokens"] if metas else 0
    completion = sum(meta["completion_tokens"] for meta in metas)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def finish_reason(output: Mapping[str, Any]) -> str | None:
    """OpenAI's word: "stop", "length", or None while it goes on."""
    reason = output["meta_info"]["finish_reason"]
    return None if reason is None else {"abort": "stop"}.get(reason["type"], reason["type"])


def logprobs(request: Request, meta: Mapping[str, Any], num_before: int) -> dict[str, Any] | None:
    """OpenAI's logprobs of the output tokens from `num_before` on."""
    if request.num_top is None:
        return None
    tokens = meta["output_token_logprobs"][num_before:]
    tops = meta.get("output_top_logprobs", [])[num_before:] or [[]] * len(tokens)
    if request.url == CHAT:
        return {
            "content": [
                {**_entry(token), "top_logprobs": [_entry(t) for t in top]}
                for token, top in zip(tokens, tops, strict=True)
            ]
        }
    texts = [text for _, _, text in tokens]
    offsets = [len(request.echo)]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [logprob for logprob, _, _ in tokens],
        "top_logprobs": [{text: logprob for logprob, _, text in top} for top in tops],
        "text_offset": offsets[: len(texts)],
    }


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _entry(token: tuple[float, int, str]) -> dict[str, Any]:
    logprob, _, text = token
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _prompt(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
        return {"input_ids": prompt}
    raise RequestError("`prompt` must be a text or a list of token ids, one prompt a request.")


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    if not body.get("logprobs"):
        return None
    return body.get("top_logprobs") or 0


def _completion_logprobs(body: Mapping[str, Any]) -> int | None:
    value = body.get("logprobs")
    if value is True:
        raise RequestError("`logprobs` must be a number of tokens, got True.")
    return None if value is False else value
