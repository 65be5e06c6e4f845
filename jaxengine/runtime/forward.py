"""The model's part of a step: tokens in, hidden states and logits out, whatever the sampler.

Pure functions of (params, state, packed plan). `Forward` binds what is static.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.models.family import BoundModel, Params
from jaxengine.nn.attention import AttentionMetadata, ForwardContext
from jaxengine.runtime import batch
from jaxengine.runtime.slots import TableLayout
from jaxengine.runtime.state import (
    Cursor,
    DeviceState,
    Rows,
    Segments,
    count_tokens,
    edit_table,
    read_rows,
)
from jaxengine.sampling.logprobs import Wants, scores
from jaxengine.scheduler.buckets import Buckets
from jaxengine.types import MAX_LOGPROB_IDS, NULL_PAGE

SCORED_TOKENS = 256
"""Prompt tokens whose logits exist at once while their logprobs are computed."""


class Embeds(NamedTuple):
    """Embeddings that stand for ids; arrays, tracers, or shapes alone.

    Attributes:
      is_given: bool [T], of which tokens.
      values: [T, D], what they are.
    """

    is_given: Any
    values: Any


class Hidden(NamedTuple):
    """Hidden states of a step's tokens.

    Attributes:
      final: After the final norm.
      layers: Of the layers asked for; None when these are all that can be.
    """

    final: Float[Array, "T D"]
    layers: Float[Array, "T layers D"] | None

    @property
    def reported(self) -> Any:
        """What `return_hidden_states` gives."""
        return self.final if self.layers is None else self.layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """The compiled steps that draw nothing.

    Attributes:
      model: The module without its arrays.
      layout: Columns of the engine's own table.
      buckets: All static sizes.
      ctx: Mesh and kernels.
      num_top: Most likely tokens that can be listed.
      layers: Which hidden states are reported, as transformers counts them: 0 is the embeddings,
        i what comes out of layer i, the number of layers that after the final norm. () is the
        last of these alone, with no axis for it.
    """

    model: BoundModel
    layout: TableLayout
    buckets: Buckets
    ctx: ForwardContext
    num_top: int
    layers: tuple[int, ...] = ()

    @property
    def reported_shape(self) -> tuple[int, ...]:
        """Shape of a token's hidden states."""
        size = self.model.config.hidden_size
        return (len(self.layers), size) if self.layers else (size,)

    def admit(self, state: DeviceState, packed: Int[Array, " size"]) -> DeviceState:
        """Edits of the slot table alone, for plans whose own room is too small."""
        return self.edit(state, batch.edit_packing().unpack(packed))

    def prefill(
        self,
        params: Params,
        state: DeviceState,
        packed: Int[Array, " size"],
        *,
        num_tokens: int,
        embeds: Embeds | None = None,
    ) -> tuple[DeviceState, Float[Array, "B V"], Float[Array, "B D"], Hidden]:
        """Runs packed chunks of several prompts.

        Args:
          params: The model's arrays.
          state: Donated.
          packed: `batch.pack_prefill`.
          embeds: In place of the embeddings of some ids.
          num_tokens: Bucket of the packed length.

        Returns:
          The new state, in which rows that draw stand before their first token; logits and
          hidden state of every row's last token, padded to `Buckets.split_rows`; hidden states of
          all tokens.
        """
        plan = batch.prefill_packing(self.buckets, num_tokens).unpack(packed)
        state = self.edit(state, plan)
        rows = read_rows(self.layout, state.slots, plan["slot_ids"])
        hidden, last, cursor, state = self.run_prefill(params, state, rows, plan, embeds)
        drawing = jnp.where(cursor.is_done, batch.DROPPED, rows.slot_ids)
        state = dataclasses.replace(
            state, slots=self.layout.write(state.slots, drawing, cursor._asdict())
        )
        last = jnp.pad(last, (0, self.buckets.split_size(len(last)) - len(last)))
        drawn_from = hidden.final[last]
        return state, self.model.bind(params).logits(drawn_from, self.ctx), drawn_from, hidden

    def decode(
        self,
        params: Params,
        state: DeviceState,
        packed: Int[Array, " size"],
        *,
        num_rows: int,
    ) -> tuple[DeviceState, Float[Array, "B V"], Hidden]:
        """One step of every row: the new state, logits and hidden states; nothing is drawn."""
        plan = batch.decode_packing(self.buckets, num_rows).unpack(packed)
        state = self.edit(state, plan)
        rows = read_rows(self.layout, state.slots, plan["slot_ids"])
        cursor = self.cursor(rows)
        hidden, kv_cache, counts = self.run_decode(
            params, state.kv_cache, state.token_counts, rows, cursor
        )
        fed = {"num_counted": cursor.position + 1}
        state = DeviceState(
            kv_cache=kv_cache,
            slots=self.layout.write(state.slots, rows.slot_ids, fed),
            token_counts=counts,
        )
        return state, self.model.bind(params).logits(hidden.final, self.ctx), hidden

    def score(
        self,
        params: Params,
        hidden: Float[Array, "T D"],
        packed: Int[Array, " size"],
        *,
        num_tokens: int,
    ) -> dict[str, Array]:
        """Logprobs of prompt tokens, from the hidden states of the tokens before them.

        Computed a few tokens at a time: logits of all of them would not fit.

        Args:
          params: The model's arrays.
          hidden: Of a prefill.
          packed: `batch.pack_score`.
          num_tokens: Bucket of the packed length.

        Returns:
          "logprob" [T], "top_ids" and "top_logprobs" [T, num_top], "id_logprobs" [T, ids], all of
          the model's own distribution; garbage where there is no target.
        """
        plan = batch.score_packing(self.buckets, num_tokens).unpack(packed)
        model = self.model.bind(params)
        ids = plan["logprob_ids"].reshape(-1, MAX_LOGPROB_IDS)

        def some(part: tuple[Array, Array, Array]) -> dict[str, Array]:
            hidden, target, row = part
            logits = model.logits(hidden, self.ctx)
            all_rows = jnp.ones(target.shape, bool)
            return scores(logits, target, Wants(all_rows, all_rows, ids[row], self.num_top))

        size = min(SCORED_TOKENS, num_tokens)
        padded = -(-num_tokens // size) * size

        def split(x: Array) -> Array:
            missing = [(0, padded - num_tokens), *[(0, 0)] * (x.ndim - 1)]
            return jnp.pad(x, missing).reshape(-1, size, *x.shape[1:])

        parts = (split(hidden), split(jnp.maximum(plan["targets"], 0)), split(plan["rows"]))
        scored = jax.lax.map(some, parts)
        return jax.tree.map(lambda x: x.reshape(padded, *x.shape[2:])[:num_tokens], scored)

    # -- parts of a step, traced into it

    def edit(self, state: DeviceState, edits: Segments) -> DeviceState:
        """Changes the slot table; a reset also forgets the slot's token counts."""
        counts = state.token_counts
        if "resets" in edits:
            counts = counts.at[edits["resets"]].set(jnp.zeros((), counts.dtype), mode="drop")
        slots = edit_table(self.layout, state.slots, edits)
        return dataclasses.replace(state, slots=slots, token_counts=counts)

    def cursor(self, rows: Rows) -> Cursor:
        """Where the rows stand; those that are not real are done."""
        return Cursor(
            token=rows.columns["token"],
            position=rows.columns["position"],
            num_generated=rows.columns["num_generated"],
            is_done=rows.columns["is_done"].astype(bool) | ~rows.is_real,
        )

    def run_prefill(
        self,
        params: Params,
        state: DeviceState,
        rows: Rows,
        plan: Segments,
        embeds: Embeds | None = None,
    ) -> tuple[Hidden, Int[Array, " R"], Cursor, DeviceState]:
        """Hidden states of all tokens, the place of each row's last, and where the rows stand.

        Rows that draw nothing now are done in the cursor.
        """
        token_ids, q_starts, kv_lens = plan["token_ids"], plan["q_starts"], plan["kv_lens"]
        num_tokens = token_ids.shape[0]
        q_lens = q_starts[1:] - q_starts[:-1]
        token = jnp.arange(num_tokens)
        row = jnp.searchsorted(q_starts[1:], token, side="right").astype(jnp.int32)
        is_token = token < q_starts[-1]
        row = jnp.where(is_token, row, 0)
        position = jnp.where(is_token, kv_lens[row] - q_lens[row] + token - q_starts[row], 0)
        page_table = rows.columns["page_table"]
        page = page_table[row, position // self.buckets.page_size]
        meta = AttentionMetadata(
            page_table=page_table,
            q_starts=q_starts,
            kv_lens=kv_lens,
            write_pages=jnp.where(is_token, page, NULL_PAGE),
            write_offsets=position % self.buckets.page_size,
            is_decode=False,
        )
        hidden, kv_cache = self._run(params, token_ids, position, state.kv_cache, meta, embeds)

        # After a preemption outputs are fed again, but have been counted.
        num_counted = rows.columns["num_counted"]
        uncounted = jnp.maximum(rows.columns["prompt_len"], num_counted)
        counts = count_tokens(
            state.token_counts,
            rows.slot_ids[row],
            token_ids,
            is_token & (position >= uncounted[row]),
            unique=False,
        )
        fed = {"num_counted": jnp.maximum(num_counted, kv_lens)}
        state = DeviceState(
            kv_cache=kv_cache,
            slots=self.layout.write(state.slots, rows.slot_ids, fed),
            token_counts=counts,
        )
        last = jnp.clip(q_starts[1:] - 1, 0, num_tokens - 1)
        cursor = Cursor(
            token=token_ids[last],
            position=kv_lens - 1,
            num_generated=jnp.zeros_like(kv_lens),
            is_done=plan["draws"] == 0,
        )
        return hidden, last, cursor, state

    def run_decode(
        self,
        params: Params,
        kv_cache: list[Any],
        counts: Int[Array, "S V"],
        rows: Rows,
        cursor: Cursor,
    ) -> tuple[Hidden, list[Any], Int[Array, "S V"]]:
        """Feeds every row's last token: hidden states, KV cache, token counts."""
        num_rows = cursor.token.shape[0]
        page_table = rows.columns["page_table"]
        active = ~cursor.is_done
        meta = AttentionMetadata(
            page_table=page_table,
            q_starts=jnp.arange(num_rows + 1, dtype=jnp.int32),
            # A dead row reads nothing and writes nothing that is read.
            kv_lens=jnp.where(active, cursor.position + 1, 0),
            is_decode=True,
        )
        hidden, kv_cache = self._run(params, cursor.token, cursor.position, kv_cache, meta)
        is_output = cursor.position >= rows.columns["prompt_len"]
        counts = count_tokens(counts, rows.slot_ids, cursor.token, active & is_output, unique=True)
        return hidden, kv_cache, counts

    def _run(
        self,
        params: Params,
        token_ids: Int[Array, " T"],
        position: Int[Array, " T"],
        kv_cache: list[Any],
        meta: AttentionMetadata,
        embeds: Embeds | None = None,
    ) -> tuple[Hidden, list[Any]]:
        """The model, and the hidden states that are reported of it."""
        model, ctx = self.model.bind(params), self.ctx
        tokens = token_ids
        if embeds is not None:
            embedded = model.embed(token_ids)
            tokens = jnp.where(embeds.is_given[:, None], embeds.values, embedded)
        seen: dict[int, Array] = {}
        if self.layers:
            ctx = dataclasses.replace(ctx, see=seen.__setitem__)
        final, kv_cache = model(tokens, position, kv_cache, meta, ctx)
        if not self.layers:
            return Hidden(final, None), kv_cache
        seen[self.model.config.num_layers] = final
        return Hidden(final, jnp.stack([seen[i] for i in self.layers], axis=1)), kv_cache

    def is_finished(
        self, rows: Rows, token: Int[Array, " B"], num_generated: Int[Array, " B"]
    ) -> Bool[Array, " B"]:
        """Whether a drawn token is a row's last."""
        stops = (token[:, None] == rows.columns["stop_token_ids"]).any(axis=-1)
        stops &= rows.columns["ignore_eos"] == 0
        is_failed = token < 0
        return is_failed | stops | (num_generated >= rows.columns["max_new_tokens"])
