"""Times tile choices of an op on a GPU, each checked against a wanted result in the same run.

Many calls run in one compiled program, each fed with the output of the one before, so that
launches from the host do not count.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Call = tuple[jax.Array, ...]
Carry = Any
"""Arrays."""


class Timing[Config](NamedTuple):
    """What came out of one tile choice.

    Attributes:
      config: The tile choice.
      seconds: Median time of one call; infinite where it did not compile.
      error: Largest `abs(got - want) / (1 + abs(want))`; NaN where it did not compile.
      failure: Why it did not compile; "" when it did.
    """

    config: Config
    seconds: float
    error: float
    failure: str = ""


def time_configs[Config](
    op: Callable[..., Carry],
    configs: Sequence[Config],
    carry: Carry,
    shared: Call,
    calls: Sequence[Call],
    num_rounds: int,
    want: jax.Array,
) -> Iterator[Timing[Config]]:
    """Compiles all choices in parallel and times one after another.

    Args:
      op: `op(carry, *shared, *call, config=config)` returns arrays like `carry`: what one call
        makes and the next one takes.
      configs: The tile choices.
      carry: What the first call gets.
      shared: Arguments of all calls.
      calls: Arguments of one call each; let them touch more memory than the caches hold.
      num_rounds: How often `calls` are repeated in one run.
      want: What `op` has to return first for the first call.
    """

    def compiled(config: Config) -> Any:
        try:
            return _compile_chain(op, config, carry, shared, calls, num_rounds)
        except jax.errors.JaxRuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        for config, run in zip(configs, pool.map(compiled, configs), strict=True):
            if isinstance(run, str):
                yield Timing(config, float("inf"), float("nan"), run)
                continue
            got = jax.tree.leaves(op(carry, *shared, *calls[0], config=config))[0]
            seconds = _median_seconds(lambda run=run: run(carry, shared, calls))
            yield Timing(config, seconds / (num_rounds * len(calls)), max_error(got, want))


def max_error(got: jax.Array, want: jax.Array) -> float:
    """Returns the largest error, relative to 1 or the wanted value, whichever is larger."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float((jnp.abs(got - want) / (1 + jnp.abs(want))).max())


def _compile_chain(
    op: Callable[..., Carry],
    config: Any,
    carry: Carry,
    shared: Call,
    calls: Sequence[Call],
    num_rounds: int,
) -> jax.stages.Compiled:
    def chain(carry: Carry, shared: Call, calls: Sequence[Call]) -> Carry:
        def one_round(_: Any, carry: Carry) -> Carry:
            for call in calls:
                carry = op(carry, *shared, *call, config=config)
            return carry

        return jax.lax.fori_loop(0, num_rounds, one_round, carry)

    return jax.jit(chain).lower(carry, shared, calls).compile()


def _median_seconds(run: Callable[[], Carry], repeats: int = 5) -> float:
    for _ in range(2):  # the command buffer is recorded after the first run
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
