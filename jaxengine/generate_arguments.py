"""The arguments of `generate`: their names and defaults, once for all who take them."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypedDict, get_type_hints


class RequestArguments(TypedDict, total=False):
    """What is done with prompts and reported of them; `Engine.generate` explains each.

    Any type is taken here, and checked when the call is made.
    """

    return_logprob: Any
    logprob_start_len: Any
    top_logprobs_num: Any
    token_ids_logprob: Any
    return_text_in_logprobs: bool
    return_hidden_states: Any
    hidden_states_format: str
    return_prompt_token_ids: bool
    input_embeds: Any
    sampler: Any
    custom_logit_processor: Any
    capture: Any
    companions: Any
    rid: Any
    priority: Any
    cache_salt: Any
    extra_key: Any
    timeout_s: Any


class GenerateArguments(RequestArguments, total=False):
    """And how their outputs are given."""

    stream: bool
    progress: bool
    on_error: str


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("prompt", "sampling_params", "input_ids")),
        **dict.fromkeys(get_type_hints(GenerateArguments)),
        "return_logprob": False,
        "return_text_in_logprobs": False,
        "return_hidden_states": False,
        "hidden_states_format": "numpy",
        "return_prompt_token_ids": False,
        "stream": False,
        "progress": False,
        "on_error": "raise",
    }
)
"""Every argument of `generate`, and its value where it is not given."""


def spelled_out[F: Callable[..., Any]](
    names: Mapping[str, inspect.Parameter],
) -> Callable[[F], F]:
    """Lists in a function's signature what its `**arguments` take, for `help` and notebooks.

    Args:
      names: Keyword arguments, by name.
    """

    def spell_out(function: F) -> F:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()
        listed = [names[name] for name in names if name not in signature.parameters]
        others = rest.replace(name="others", annotation=Any)
        shown = signature.replace(parameters=[*own, *listed, others])
        function.__signature__ = shown  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return spell_out


GENERATE_PARAMETERS = {
    name: inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=hint
    )
    for name, hint in get_type_hints(GenerateArguments).items()
}
"""What `spelled_out` lists of `generate`."""
