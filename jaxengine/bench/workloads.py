"""The workloads, as data: which requests are sent, and which number comes out. No jax, no engine.

`scale` shrinks counts and lengths alike, so that all of them run in seconds on a CPU.
"""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_PROMPT_ID = 10000
"""Largest id in prompts, as in the bench of nano-vllm."""

DEFAULT_SHAPE = "qwen2.5-0.5b"


class Call(NamedTuple):
    """One `generate` call.

    Attributes:
      input_ids: Prompts.
      sampling_params: One a prompt.
      return_logprob: For all of them.
    """

    input_ids: list[list[int]]
    sampling_params: list[dict[str, Any]]
    return_logprob: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate in all."""
        return sum(params["max_new_tokens"] for params in self.sampling_params)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is read off a pass over a workload's calls.

    Attributes:
      name: E.g. "output_tokens_per_s".
      unit: Of the value.
      seconds: Seconds of every call -> the seconds that count.
      value: (those seconds, the last call) -> value.
      has_prefill: The seconds contain the prefill.
    """

    name: str
    unit: str
    seconds: Callable[[Sequence[float]], float]
    value: Callable[[float, Call], float]
    has_prefill: bool


TIME_PER_TOKEN = Metric(
    name="time_per_token",
    unit="ms",
    seconds=lambda seconds: seconds[1] - seconds[0],
    value=lambda seconds, call: 1e3 * seconds / (call.num_output_tokens - 1),
    has_prefill=False,
)
"""Calls: the prompt to its first token, then the same prompt to the last."""

TIME_TO_SECOND_TOKEN = Metric(
    name="time_to_second_token",
    unit="ms",
    seconds=lambda seconds: sorted(seconds)[len(seconds) // 2],
    value=lambda seconds, call: 1e3 * seconds,
    has_prefill=True,
)
"""Calls: the same request again and again; the median counts."""

OUTPUT_RATE = Metric(
    name="output_tokens_per_s",
    unit="tok/s",
    seconds=lambda seconds: seconds[0],
    value=lambda seconds, call: call.num_output_tokens / seconds,
    has_prefill=True,
)
"""Calls: one with all requests."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload.

    Attributes:
      title: One line for people.
      metric: What is reported.
      calls: (scale, vocabulary size) -> calls made one after another in a pass.
      shape: Model shape unless the command names one.
      is_replayable: Greedy and alone, so every pass must give the same tokens.
    """

    title: str
    metric: Metric
    calls: Callable[[float, int], list[Call]]
    shape: str = DEFAULT_SHAPE
    is_replayable: bool = False


def scaled(count: int, scale: float, least: int = 1) -> int:
    """A count or length of a workload made smaller.

    >>> scaled(1024, 0.02)
    20
    """
    return max(least, round(count * scale))


def prompts(name: str, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random prompts, the same ones whenever the name is the same."""
    rng = random.Random(name)
    largest = min(MAX_PROMPT_ID, vocab_size - 1)
    return [[rng.randint(0, largest) for _ in range(length)] for length in lengths]


def request_params(index: int, max_new_tokens: int, **params: Any) -> dict[str, Any]:
    """Sampling parameters of a request: a fixed length and a seed of its own."""
    return {"max_new_tokens": max_new_tokens, "ignore_eos": True, "seed": index, **params}


def single_stream(prompt_len: int, scale: float, vocab_size: int) -> list[Call]:
    """One greedy request to its first token, and to its 513th."""
    ids = prompts("single", [scaled(prompt_len, scale)], vocab_size)
    lengths = (1, scaled(513, scale, least=2))
    return [Call(ids, [request_params(0, n, temperature=0.0)]) for n in lengths]


def two_tokens(prompt_len: int, scale: float, vocab_size: int) -> list[Call]:
    """Twenty times one greedy request to its second token."""
    ids = prompts("first", [scaled(prompt_len, scale)], vocab_size)
    call = Call(ids, [request_params(0, 2, temperature=0.0)])
    return [call] * scaled(20, scale, least=3)


def mixed(scale: float, vocab_size: int) -> list[Call]:
    """256 requests of 100 to 1,024 prompt and output tokens, drawn as nano-vllm draws them."""
    rng = random.Random(0)
    count = scaled(256, scale)
    shortest, longest = scaled(100, scale), scaled(1024, scale)
    largest = min(MAX_PROMPT_ID, vocab_size - 1)
    ids = [
        [rng.randint(0, largest) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    params = [request_params(i, n, temperature=0.6) for i, n in enumerate(lengths)]
    return [Call(ids, params)]


def uniform(
    count: int,
    prompt_len: int,
    output_len: int,
    scale: float,
    vocab_size: int,
    *,
    params: Mapping[str, Any],
    return_logprob: bool = False,
) -> list[Call]:
    """Many requests of one size in a single call."""
    count = scaled(count, scale)
    ids = prompts("uniform", [scaled(prompt_len, scale)] * count, vocab_size)
    new = scaled(output_len, scale, least=2)
    rows = [request_params(i, new, **params) for i in range(count)]
    return [Call(ids, rows, return_logprob)]


SAMPLING_VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({"temperature": 0.0}, False),
    "temperature": ({"temperature": 0.8}, False),
    "top_p": ({"temperature": 1.0, "top_p": 0.95}, False),
    "filters": ({"temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.05}, False),
    "penalties": (
        {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        False,
    ),
    "logprobs": ({"temperature": 0.0}, True),
}
"""Variant of W6 -> sampling parameters, and whether every token's logprob is asked for."""


def _stream(prompt_len: int, shape: str = DEFAULT_SHAPE) -> Workload:
    return Workload(
        title=f"single stream, prompt {prompt_len:,}, greedy, 513 tokens",
        metric=TIME_PER_TOKEN,
        calls=functools.partial(single_stream, prompt_len),
        shape=shape,
        is_replayable=True,
    )


def _two_tokens(prompt_len: int) -> Workload:
    return Workload(
        title=f"single request, prompt {prompt_len:,}, greedy, median of 20",
        metric=TIME_TO_SECOND_TOKEN,
        calls=functools.partial(two_tokens, prompt_len),
        is_replayable=True,
    )


def _uniform(
    count: int,
    prompt_len: int,
    output_len: int,
    params: Mapping[str, Any],
    *,
    return_logprob: bool = False,
    shape: str = DEFAULT_SHAPE,
) -> Workload:
    said = ", ".join(f"{k} {v:g}" for k, v in params.items())
    return Workload(
        title=f"{count:,} x ({prompt_len} in, {output_len} out), {said}"
        + ", token logprobs" * return_logprob,
        metric=OUTPUT_RATE,
        calls=functools.partial(
            uniform, count, prompt_len, output_len, params=params, return_logprob=return_logprob
        ),
        shape=shape,
    )


WORKLOADS: dict[str, Workload] = {
    "w1": _stream(32),
    "w1b": _stream(1024),
    "w2": Workload(
        title="256 requests, prompt 100-1,024, output 100-1,024, temperature 0.6",
        metric=OUTPUT_RATE,
        calls=mixed,
    ),
    "w3": _uniform(2048, 512, 256, {"temperature": 1.0}),
    "w4_p32": _two_tokens(32),
    "w4_p1024": _two_tokens(1024),
    **{
        f"{group}_{variant}": _uniform(count, 128, 256, params, return_logprob=return_logprob)
        for group, count in (("w6", 256), ("w6b1", 1))
        for variant, (params, return_logprob) in SAMPLING_VARIANTS.items()
    },
    "w7": _stream(32, shape="qwen2.5-7b"),
    "w7b": _uniform(256, 512, 256, {"temperature": 1.0}, shape="qwen2.5-7b"),
}
"""Every workload but W5, which runs in processes of its own."""

STARTUP = "w5"
"""The workload that measures how long a process takes to answer."""

GROUPS: dict[str, list[str]] = {
    group: [name for name in WORKLOADS if name.startswith(f"{group}_")]
    for group in ("w4", "w6", "w6b1")
}
"""Names that stand for several workloads."""


def expand(names: Sequence[str]) -> list[str]:
    """Workloads for the names of a command, groups replaced by their members, in the order given.

    Raises:
      KeyError: The first name that is unknown.
    """
    expanded = [one for name in names for one in GROUPS.get(name, [name])]
    for name in expanded:
        if name not in WORKLOADS and name != STARTUP:
            raise KeyError(name)
    return expanded


def check_outputs(
    call: Call, outputs: Sequence[Mapping[str, Any]], vocab_size: int
) -> dict[str, bool]:
    """Checks of a call's outputs, by name; all must be True."""
    ids = [output["output_ids"] for output in outputs]
    metas = [output["meta_info"] for output in outputs]
    wanted = [params["max_new_tokens"] for params in call.sampling_params]
    checks = {
        "lengths": [len(row) for row in ids] == wanted
        and all(meta["finish_reason"]["type"] == "length" for meta in metas),
        "ids_in_vocabulary": all(0 <= i < vocab_size for row in ids for i in row),
        "nothing_cached": not any(meta["cached_tokens"] for meta in metas),
    }
    if call.return_logprob:
        rows = [[entry[0] for entry in meta["output_token_logprobs"]] for meta in metas]
        checks["logprobs"] = [len(row) for row in rows] == wanted and all(
            math.isfinite(x) and x < 1e-3 for row in rows for x in row
        )
    return checks
