"""The workloads, as data: which requests are sent, which number comes out. No jax, no engine."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxengine.bench.calls import Call, lockstep, mixed, single_stream, two_tokens, uniform

DEFAULT_SHAPE = "qwen2.5-0.5b"


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

TIME_PER_STEP = Metric(
    name="time_per_step",
    unit="ms",
    seconds=lambda seconds: seconds[1] - seconds[0],
    value=lambda seconds, call: 1e3 * seconds / (call.num_output_tokens / len(call.input_ids) - 1),
    has_prefill=False,
)
"""Calls: a batch to its first tokens, then the same batch to its last."""

DECODE_RATE = Metric(
    name="decode_tokens_per_s",
    unit="tok/s",
    seconds=lambda seconds: seconds[1] - seconds[0],
    value=lambda seconds, call: (call.num_output_tokens - len(call.input_ids)) / seconds,
    has_prefill=False,
)
"""The same, as tokens of all rows together."""

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


class Variant(NamedTuple):
    """A way of sampling.

    Attributes:
      params: Sampling parameters.
      arguments: Makes the further arguments of `generate`.
      note: What these are, for people.
    """

    params: Mapping[str, Any]
    arguments: Callable[[], Mapping[str, Any]] = dict
    note: str = ""


def _custom_sampler() -> Mapping[str, Any]:
    from jaxengine.bench.custom import mirostat_like

    return {"sampler": mirostat_like()}


SAMPLING_VARIANTS: dict[str, Variant] = {
    "greedy": Variant({"temperature": 0.0}),
    "temperature": Variant({"temperature": 0.8}),
    "top_p": Variant({"temperature": 1.0, "top_p": 0.95}),
    "filters": Variant({"temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.05}),
    "penalties": Variant({"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
    "custom": Variant({"temperature": 1.0}, _custom_sampler, "a user's mirostat"),
    "logprobs": Variant(
        {"temperature": 0.0}, lambda: {"return_logprob": True}, "token logprobs, left as arrays"
    ),
    "top_logprobs": Variant(
        {"temperature": 0.0},
        lambda: {"return_logprob": True, "top_logprobs_num": 20},
        "top-20 logprobs, left as arrays",
    ),
    "hidden_states": Variant(
        {"temperature": 0.0},
        lambda: {"return_hidden_states": True},
        "hidden states of every token",
    ),
}
"""Variants of W6."""

SWEPT_ROWS = (1, 4, 16, 64, 128, 256, 512)
"""Batch sizes of the sweep."""


def _stream(prompt_len: int, shape: str = DEFAULT_SHAPE) -> Workload:
    return Workload(
        title=f"one request, prompt {prompt_len:,}, 513 tokens, greedy: time per token",
        metric=TIME_PER_TOKEN,
        calls=functools.partial(single_stream, prompt_len),
        shape=shape,
        is_replayable=True,
    )


def _two_tokens(prompt_len: int) -> Workload:
    return Workload(
        title=f"one request, prompt {prompt_len:,}, greedy: time to its second token",
        metric=TIME_TO_SECOND_TOKEN,
        calls=functools.partial(two_tokens, prompt_len),
        is_replayable=True,
    )


def _uniform(
    count: int, prompt_len: int, output_len: int, variant: Variant, shape: str = DEFAULT_SHAPE
) -> Workload:
    said = ", ".join(f"{k} {v:g}" for k, v in variant.params.items())
    said += f", {variant.note}" if variant.note else ""
    sizes = (count, prompt_len, output_len)

    def calls(scale: float, vocab_size: int) -> list[Call]:
        arguments = variant.arguments()
        return uniform(*sizes, scale, vocab_size, params=variant.params, arguments=arguments)

    return Workload(
        title=f"{count:,} x ({prompt_len} in, {output_len} out), {said}",
        metric=OUTPUT_RATE,
        calls=calls,
        shape=shape,
    )


def _lockstep(num_rows: int) -> Workload:
    return Workload(
        title=f"decode at batch {num_rows}, 128 in, 128 steps, greedy: time per step",
        metric=TIME_PER_STEP,
        calls=functools.partial(lockstep, num_rows, 128, 128),
    )


def _on_cpu(shape: str, num_rows: int, num_steps: int) -> Workload:
    return Workload(
        title=f"{shape} at batch {num_rows}, 32 in, {num_steps} steps, greedy",
        metric=DECODE_RATE,
        calls=functools.partial(lockstep, num_rows, 32, num_steps),
        shape=shape,
    )


_SAMPLED = Variant({"temperature": 1.0})

WORKLOADS: dict[str, Workload] = {
    "w1": _stream(32),
    "w1b": _stream(1024),
    "w2": Workload(
        title="256 requests, prompt 100-1,024, output 100-1,024, temperature 0.6",
        metric=OUTPUT_RATE,
        calls=mixed,
    ),
    "w3": _uniform(2048, 512, 256, _SAMPLED),
    "w4_p32": _two_tokens(32),
    "w4_p1024": _two_tokens(1024),
    **{
        f"{group}_{name}": _uniform(count, 128, 256, variant)
        for group, count in (("w6", 256), ("w6b1", 1))
        for name, variant in SAMPLING_VARIANTS.items()
    },
    **{f"sweep_b{num_rows}": _lockstep(num_rows) for num_rows in SWEPT_ROWS},
    "w7": _stream(32, shape="qwen2.5-7b"),
    "w7b": _uniform(256, 512, 256, _SAMPLED, shape="qwen2.5-7b"),
    **{
        f"cpu_{shape}_b{num_rows}": _on_cpu(shape, num_rows, num_steps)
        for shape, num_steps in (("demo", 256), (DEFAULT_SHAPE, 32))
        for num_rows in (1, 8)
    },
}
"""Every workload but W5, which runs in processes of its own."""

STARTUP = "w5"
"""The workload that measures how long a process takes to answer."""

GROUPS: dict[str, list[str]] = {
    group: [name for name in WORKLOADS if name.startswith(f"{group}_")]
    for group in ("w4", "w6", "w6b1", "sweep", "cpu")
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
