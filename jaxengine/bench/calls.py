"""The requests of the workloads, as data: the same ones whenever they are made. No jax, no engine.

`scale` shrinks counts and lengths alike, so that all of them run in seconds on a CPU.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_PROMPT_ID = 10000
"""Largest id in prompts, as in the bench of nano-vllm."""


class Call(NamedTuple):
    """One `generate` call.

    Attributes:
      input_ids: Prompts.
      sampling_params: One a prompt.
      arguments: Further arguments of `generate`, for all of them.
    """

    input_ids: list[list[int]]
    sampling_params: list[dict[str, Any]]
    arguments: Mapping[str, Any] = {}

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate in all."""
        return sum(params["max_new_tokens"] for params in self.sampling_params)

    def first(self, count: int) -> "Call":
        """The same call of its first prompts alone."""
        return self._replace(
            input_ids=self.input_ids[:count], sampling_params=self.sampling_params[:count]
        )


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
    arguments: Mapping[str, Any],
) -> list[Call]:
    """Many requests of one size in a single call."""
    count = scaled(count, scale)
    ids = prompts("uniform", [scaled(prompt_len, scale)] * count, vocab_size)
    new = scaled(output_len, scale, least=2)
    return [Call(ids, [request_params(i, new, **params) for i in range(count)], arguments)]


def lockstep(
    num_rows: int, prompt_len: int, num_steps: int, scale: float, vocab_size: int
) -> list[Call]:
    """A greedy batch to its first tokens, and `num_steps` further; its number of rows is kept."""
    ids = prompts("lockstep", [scaled(prompt_len, scale)] * num_rows, vocab_size)
    return [
        Call(ids, [request_params(i, n, temperature=0.0) for i in range(num_rows)])
        for n in (1, 1 + scaled(num_steps, scale))
    ]
