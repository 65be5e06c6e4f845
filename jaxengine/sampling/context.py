"""What a sampler may look at: one row per sequence of the step, all arrays on the device."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingContext:
    """The rows of a step. Per-request values are attributes by name: `ctx.temperature` is [B].

    Attributes:
      values: Per-request parameters by name, each with a leading axis B.
      key: One PRNG key per row, a function of (effective seed, position) only. Fold a number of
        your own in before drawing from it: the built-in draw uses it as it is.
      position: Absolute position of the token about to be drawn.
      num_generated: Tokens generated so far.
      min_new_tokens: Stop tokens are masked while fewer were generated.
      last_token: The token before the one about to be drawn.
      prompt_len: Prompt tokens.
      active: Rows that draw; the others' results are discarded.
      stop_token_ids: Ids that end the sequence, -1 padded.
      slots: Row of `slot_counts` that belongs to each row of the step.
      slot_counts: Occurrences of every token among each slot's generated tokens.
      history: i32[B, H], the last tokens of prompt and output, oldest first, -1 padded at the
        front; None unless `Needs.history` asks for it. A transform sees as many as it asked for.
      hidden: [B, D], the last layer's hidden state, after the final norm; None unless asked for.
      arrays: The transform's own `arrays`.
    """

    values: Mapping[str, Array]
    key: Key[Array, "*B"]
    position: Int[Array, "*B"]
    num_generated: Int[Array, "*B"]
    min_new_tokens: Int[Array, "*B"]
    last_token: Int[Array, "*B"]
    prompt_len: Int[Array, "*B"]
    active: Bool[Array, "*B"]
    stop_token_ids: Int[Array, "*B stop"]
    slots: Int[Array, "*B"]
    slot_counts: Int[Array, "slots V"]
    # Not `Array | None`: what asks for them has them.
    history: Any = None
    hidden: Any = None
    arrays: Any = ()

    def __getattr__(self, name: str) -> Any:
        # Dataclass fields never come here; unflattening may ask before `values` exists.
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(
            f"the sampling context has no `{name}`; request parameters here: {sorted(values)}."
        )

    @property
    def token_counts(self) -> Int[Array, "*B V"]:
        """How often each row generated each token; gathered where it is read, so cheap unread."""
        return self.slot_counts[self.slots]

    def narrowed(self, history: int, arrays: Any) -> "SamplingContext":
        """The context as one transform sees it: its own arrays, as much history as it needs."""
        seen = None if not history or self.history is None else self.history[..., -history:]
        return dataclasses.replace(self, history=seen, arrays=arrays)


def row_keys(
    seed_hi: Int[Array, " B"], seed_lo: Int[Array, " B"], position: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Keys that depend on (seed, position) only: not on batch, slot, chunking or preemption."""
    data = jax.lax.bitcast_convert_type(jnp.stack([seed_hi, seed_lo], axis=-1), jnp.uint32)
    keys = jax.random.wrap_key_data(data, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, position)
