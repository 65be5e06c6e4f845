"""The device's part of generation: prefill, and the decode window in which no host takes part.

Pure functions of (params, state, packed plan). `Steps` binds what is static; its methods are what
gets compiled, once per bucket.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.models.family import BoundModel, Params
from jaxengine.nn.attention import AttentionMetadata, ForwardContext
from jaxengine.runtime import batch
from jaxengine.runtime.slots import SlotLayout
from jaxengine.sampling.context import SamplingContext, row_keys
from jaxengine.sampling.sampler import Sample, Sampler, sample
from jaxengine.scheduler.buckets import Buckets
from jaxengine.types import NULL_PAGE

type Segments = dict[str, Int[Array, " n"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """Everything a step changes; donated to it and returned by it.

    Leaves are arrays, tracers, or shapes alone.

    Attributes:
      kv_cache: A page array [pages, 2, K, page_size, H] per layer.
      slots: The slot table, int32 [S, W]; see `SlotLayout`.
      token_counts: How often each slot generated each token, int16 [S, V].
      sampler: The sampler's state, a pytree with leading axis S.
    """

    kv_cache: list[Any]
    slots: Any
    token_counts: Any
    sampler: Any


class _Rows(NamedTuple):
    """The slots of a step, read once."""

    slot_ids: Int[Array, " B"]
    is_real: Bool[Array, " B"]
    cells: Int[Array, "B W"]


class _Window(NamedTuple):
    """Carry of the decode loop."""

    step: Int[Array, ""]
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    num_generated: Int[Array, " B"]
    is_done: Bool[Array, " B"]
    kv_cache: list[Array]
    token_counts: Int[Array, "S V"]
    sampler: Any
    token_ids: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The compiled steps of one engine: `admit`, `prefill` and `decode`.

    Attributes:
      model: The module without its arrays.
      sampler: Traced into every step.
      layout: Columns of the slot table.
      buckets: All static sizes.
      ctx: Mesh and kernels.
    """

    model: BoundModel
    sampler: Sampler
    layout: SlotLayout
    buckets: Buckets
    ctx: ForwardContext

    def admit(self, state: DeviceState, packed: Int[Array, " size"]) -> DeviceState:
        """Edits of the slot table alone, for plans whose own room is too small."""
        return self._edit(state, batch.admit_packing().unpack(packed))

    def prefill(
        self,
        params: Params,
        state: DeviceState,
        packed: Int[Array, " size"],
        *,
        num_tokens: int,
        num_pages: int,
    ) -> tuple[DeviceState, Int[Array, " result"]]:
        """Runs packed chunks of several prompts, and draws the first token of those that end.

        Args:
          params: The model's arrays.
          state: Donated.
          packed: `batch.pack_prefill`.
          num_tokens: Bucket of the packed length.
          num_pages: Bucket of pages a sequence may have.

        Returns:
          The new state, and `pack_result` of one step.
        """
        plan = batch.prefill_packing(self.buckets, num_tokens).unpack(packed)
        state = self._edit(state, plan)
        rows = self._read(state, plan["slot_ids"])
        q_starts, kv_lens = plan["q_starts"], plan["kv_lens"]
        q_lens = q_starts[1:] - q_starts[:-1]

        token = jnp.arange(num_tokens)
        row = jnp.searchsorted(q_starts[1:], token, side="right").astype(jnp.int32)
        is_token = token < q_starts[-1]
        row = jnp.where(is_token, row, 0)
        position = jnp.where(is_token, kv_lens[row] - q_lens[row] + token - q_starts[row], 0)
        page_table = self._column(rows, "page_table")[:, :num_pages]
        page = page_table[row, position // self.buckets.page_size]
        meta = AttentionMetadata(
            page_table=page_table,
            q_starts=q_starts,
            kv_lens=kv_lens,
            write_pages=jnp.where(is_token, page, NULL_PAGE),
            write_offsets=position % self.buckets.page_size,
            is_decode=False,
        )
        model = self.model.bind(params)
        hidden, kv_cache = model(plan["token_ids"], position, state.kv_cache, meta, self.ctx)

        is_generated = is_token & (position >= self._column(rows, "prompt_len")[row])
        counts = _count(
            state.token_counts, rows.slot_ids[row], plan["token_ids"], is_generated, unique=False
        )
        last = jnp.clip(q_starts[1:] - 1, 0, num_tokens - 1)
        draws = plan["draws"].astype(bool)
        with jax.named_scope("sample"):
            logits = model.logits(hidden[last], self.ctx)
            ctx = self._sampling_context(
                rows,
                position=kv_lens,
                last_token=plan["token_ids"][last],
                num_generated=jnp.zeros_like(kv_lens),
                active=draws,
                token_counts=counts,
            )
            fresh = (self.sampler.transform.init(ctx), self.sampler.draw.init(ctx))
            kept = _gather(state.sampler, rows.slot_ids)
            is_new = plan["is_new"].astype(bool)
            before = _select(is_new, fresh, kept)
            drawn, after = self._sample(rows, logits, before, ctx)
            after = _select(draws, after, before)

        num_generated = jnp.ones_like(kv_lens)
        drawing = jnp.where(draws, rows.slot_ids, batch.DROPPED)
        slots = self.layout.write(
            state.slots,
            drawing,
            {
                "token": drawn.token,
                "position": kv_lens,
                "num_generated": num_generated,
                "is_done": self._is_finished(rows, drawn.token, num_generated),
            },
        )
        state = DeviceState(
            kv_cache=kv_cache,
            slots=slots,
            token_counts=counts,
            sampler=_scatter(state.sampler, rows.slot_ids, after),
        )
        token_ids = jnp.where(draws, drawn.token, -1)
        return state, pack_result(token_ids[:, None], drawn.logprob[:, None])

    def decode(
        self,
        params: Params,
        state: DeviceState,
        packed: Int[Array, " size"],
        *,
        num_rows: int,
        num_pages: int,
    ) -> tuple[DeviceState, Int[Array, " result"]]:
        """A window: up to `num_steps` tokens for every row, until all rows are done.

        Args:
          params: The model's arrays.
          state: Donated.
          packed: `batch.pack_decode`.
          num_rows: Bucket of the batch.
          num_pages: Bucket of pages a sequence may have.

        Returns:
          The new state, and `pack_result` of the window.
        """
        plan = batch.decode_packing(self.buckets, num_rows).unpack(packed)
        num_steps = plan["num_steps"][0]
        state = self._edit(state, plan)
        rows = self._read(state, plan["slot_ids"])
        page_table = self._column(rows, "page_table")[:, :num_pages]
        prompt_len = self._column(rows, "prompt_len")
        model = self.model.bind(params)
        shape = (num_rows, self.buckets.max_window_steps)

        def step(w: _Window) -> _Window:
            active = ~w.is_done
            # A dead row reads nothing (length 0) and writes to the null page.
            index = jnp.minimum(w.position // self.buckets.page_size, num_pages - 1)
            page = jnp.take_along_axis(page_table, index[:, None], axis=1)[:, 0]
            meta = AttentionMetadata(
                page_table=page_table,
                q_starts=jnp.arange(num_rows + 1, dtype=jnp.int32),
                kv_lens=jnp.where(active, w.position + 1, 0),
                write_pages=jnp.where(active, page, NULL_PAGE),
                write_offsets=w.position % self.buckets.page_size,
                is_decode=True,
            )
            hidden, kv_cache = model(w.token, w.position, w.kv_cache, meta, self.ctx)
            counts = _count(
                w.token_counts,
                rows.slot_ids,
                w.token,
                active & (w.position >= prompt_len),
                unique=True,
            )
            with jax.named_scope("sample"):
                logits = model.logits(hidden, self.ctx)
                ctx = self._sampling_context(
                    rows,
                    position=w.position + 1,
                    last_token=w.token,
                    num_generated=w.num_generated,
                    active=active,
                    token_counts=counts,
                )
                drawn, after = self._sample(rows, logits, w.sampler, ctx)
            num_generated = w.num_generated + active
            finished = self._is_finished(rows, drawn.token, num_generated)
            column = (0, w.step)
            token_ids = jnp.where(active, drawn.token, -1)[:, None]
            return _Window(
                step=w.step + 1,
                token=jnp.where(active, drawn.token, w.token),
                position=w.position + active,
                num_generated=num_generated,
                is_done=w.is_done | finished,
                kv_cache=kv_cache,
                token_counts=counts,
                sampler=_select(active, after, w.sampler),
                token_ids=jax.lax.dynamic_update_slice(w.token_ids, token_ids, column),
                logprobs=jax.lax.dynamic_update_slice(w.logprobs, drawn.logprob[:, None], column),
            )

        end = jax.lax.while_loop(
            lambda w: (w.step < num_steps) & ~w.is_done.all(),
            step,
            _Window(
                step=jnp.int32(0),
                token=self._column(rows, "token"),
                position=self._column(rows, "position"),
                num_generated=self._column(rows, "num_generated"),
                is_done=self._column(rows, "is_done").astype(bool) | ~rows.is_real,
                kv_cache=state.kv_cache,
                token_counts=state.token_counts,
                sampler=_gather(state.sampler, rows.slot_ids),
                token_ids=jnp.full(shape, -1, jnp.int32),
                logprobs=jnp.zeros(shape, jnp.float32),
            ),
        )
        state = DeviceState(
            kv_cache=end.kv_cache,
            slots=self.layout.write(
                state.slots,
                rows.slot_ids,
                {
                    "token": end.token,
                    "position": end.position,
                    "num_generated": end.num_generated,
                    "is_done": end.is_done,
                },
            ),
            token_counts=end.token_counts,
            sampler=_scatter(state.sampler, rows.slot_ids, end.sampler),
        )
        return state, pack_result(end.token_ids, end.logprobs)

    def initial_sampler_state(self) -> Any:
        """Shapes of the sampler's state over all slots."""

        def init(slots: Int[Array, "S W"], counts: Int[Array, "S V"]) -> Any:
            ids = jnp.arange(self.buckets.num_slots, dtype=jnp.int32)
            zeros = jnp.zeros_like(ids)
            ctx = self._sampling_context(
                _Rows(ids, ids >= 0, slots),
                position=zeros,
                last_token=zeros,
                num_generated=zeros,
                active=ids >= 0,
                token_counts=counts,
            )
            return (self.sampler.transform.init(ctx), self.sampler.draw.init(ctx))

        num_slots, vocab = self.buckets.num_slots, self.model.config.vocab_size
        return jax.eval_shape(
            init,
            jax.ShapeDtypeStruct((num_slots, self.layout.width), jnp.int32),
            jax.ShapeDtypeStruct((num_slots, vocab), COUNT_DTYPE),
        )

    def _edit(self, state: DeviceState, edits: Segments) -> DeviceState:
        slots, counts = state.slots, state.token_counts
        if "resets" in edits:
            row = jnp.asarray(self.layout.default_row)
            slots = slots.at[edits["resets"]].set(row, mode="drop")
            counts = counts.at[edits["resets"]].set(jnp.zeros((), counts.dtype), mode="drop")
        flat = slots.reshape(-1).at[edits["cells"]].set(edits["cell_values"], mode="drop")
        return DeviceState(
            kv_cache=state.kv_cache,
            slots=flat.reshape(slots.shape),
            token_counts=counts,
            sampler=state.sampler,
        )

    def _read(self, state: DeviceState, slot_ids: Int[Array, " B"]) -> _Rows:
        is_real = slot_ids < self.buckets.num_slots
        cells = jnp.take(state.slots, slot_ids, axis=0, mode="clip")
        # Without the barrier XLA reads the table again where it is written, and so copies it.
        return _Rows(slot_ids, is_real, jax.lax.optimization_barrier(cells))

    def _column(self, rows: _Rows, name: str) -> Array:
        return self.layout.read(rows.cells, name)

    def _sampling_context(self, rows: _Rows, **now: Array) -> SamplingContext:
        values = {name: self._column(rows, name) for name in self.layout.param_names}
        seed_hi, seed_lo = self._column(rows, "seed_hi"), self._column(rows, "seed_lo")
        return SamplingContext(
            values=values,
            key=row_keys(seed_hi, seed_lo, now["position"]),
            position=now["position"],
            num_generated=now["num_generated"],
            min_new_tokens=self._column(rows, "min_new_tokens"),
            last_token=now["last_token"],
            prompt_len=self._column(rows, "prompt_len"),
            active=now["active"],
            stop_token_ids=self._column(rows, "stop_token_ids"),
            slots=jnp.minimum(rows.slot_ids, self.buckets.num_slots - 1),
            slot_counts=now["token_counts"],
        )

    def _sample(
        self, rows: _Rows, logits: Float[Array, "B V"], state: Any, ctx: SamplingContext
    ) -> tuple[Sample, Any]:
        wants = self._column(rows, "wants_logprobs").astype(bool)
        return sample(self.sampler, logits, state, ctx, wants)

    def _is_finished(
        self, rows: _Rows, token: Int[Array, " B"], num_generated: Int[Array, " B"]
    ) -> Bool[Array, " B"]:
        stops = (token[:, None] == self._column(rows, "stop_token_ids")).any(axis=-1)
        stops &= self._column(rows, "ignore_eos") == 0
        is_nan = token < 0
        return is_nan | stops | (num_generated >= self._column(rows, "max_new_tokens"))


COUNT_DTYPE = jnp.int16
"""Token counts are slots x vocabulary, so they are kept narrow."""


def pack_result(token_ids: Int[Array, "B k"], logprobs: Float[Array, "B k"]) -> Int[Array, " n"]:
    """Everything the host reads of a step, as one array: one copy."""
    bits = jax.lax.bitcast_convert_type(logprobs.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([token_ids.reshape(-1), bits.reshape(-1)])


def _count(
    counts: Int[Array, "S V"],
    slot_ids: Int[Array, " n"],
    tokens: Int[Array, " n"],
    is_counted: Bool[Array, " n"],
    *,
    unique: bool,
) -> Int[Array, "S V"]:
    """Counts a generated token when it is fed to the model, in decode and in re-prefill alike."""
    rows = jnp.where(is_counted, slot_ids, batch.DROPPED)
    one = jnp.ones((), counts.dtype)
    return counts.at[rows, tokens].add(one, mode="drop", unique_indices=unique)


def _gather(state: Any, slot_ids: Int[Array, " B"]) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, slot_ids, axis=0, mode="clip"), state)


def _scatter(state: Any, slot_ids: Int[Array, " B"], rows: Any) -> Any:
    return jax.tree.map(lambda leaf, new: leaf.at[slot_ids].set(new, mode="drop"), state, rows)


def _select(mask: Bool[Array, " B"], yes: Any, no: Any) -> Any:
    def pick(a: Array, b: Array) -> Array:
        return jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)
