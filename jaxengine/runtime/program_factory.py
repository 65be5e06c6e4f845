"""Describes every program of an engine: what is traced, for which shapes, under which name."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxengine.models.family import Params
from jaxengine.runtime import batch
from jaxengine.runtime.decode_loop import SamplerSteps
from jaxengine.runtime.executables import GPU_WINDOW_OPTIONS, ProgramSpec
from jaxengine.runtime.forward import Embeds, Forward
from jaxengine.runtime.kv_cache import abstract_kv_cache
from jaxengine.runtime.programs import ProgramKey
from jaxengine.runtime.sharding import kv_sharding, replicated
from jaxengine.runtime.state import COUNT_DTYPE, DeviceState, Seats

type Specs = dict[ProgramKey, ProgramSpec]

DRAW, DRAW_LISTS = "draw", "draw_lists"
"""Kinds of draws in split form: without lists of logprobs, and with them."""

HIDDEN_DECODE = "decode_hidden"
"""Kind of the windows that report hidden states; the others know nothing of them."""


class ProgramFactory:
    """Describes every program of an engine; arguments are abstract, so no device is needed."""

    def __init__(
        self, forward: Forward, params: Params, mesh: Mesh, num_pages: int, kv_dtype: jnp.dtype
    ) -> None:
        """Args:
        forward: The model's part of the steps.
        params: Abstract parameters, placed on the mesh.
        mesh: Where everything is.
        num_pages: KV pages.
        kv_dtype: Of the KV cache.
        """
        self.forward = forward
        self.params = params
        leaves, self._tree = jax.tree.flatten(params)
        self._leaves = tuple(leaves)
        self._mesh = mesh
        buckets, config = forward.buckets, forward.model.config
        self.state = DeviceState(
            kv_cache=abstract_kv_cache(
                config, num_pages, buckets.page_size, kv_dtype, kv_sharding(mesh)
            ),
            slots=self._array((buckets.num_slots, forward.layout.width), jnp.int32),
            token_counts=self._array((buckets.num_slots, config.vocab_size), COUNT_DTYPE),
        )
        is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
        self._options = GPU_WINDOW_OPTIONS if is_gpu else {}

    def seats(self, steps: SamplerSteps) -> Seats:
        """Shapes and places of what a sampler keeps."""
        return jax.tree.map(lambda s: self._array(s.shape, s.dtype), steps.initial_seats)

    def first(self) -> tuple[ProgramKey, ...]:
        """Programs that a short first request runs."""
        buckets = self.forward.buckets
        return (
            ProgramKey("prefill", buckets.prefill_tokens[0]),
            ProgramKey("decode", buckets.decode_rows[0]),
        )

    def first_forwards(self) -> tuple[ProgramKey, ...]:
        """The same for the split form."""
        buckets = self.forward.buckets
        return (
            ProgramKey("forward_prefill", buckets.prefill_tokens[0]),
            ProgramKey("forward_decode", buckets.split_rows[0]),
        )

    def fused(self, steps: SamplerSteps, *, is_cached: bool) -> dict[ProgramKey, ProgramSpec]:
        """Prefills and windows with a sampler traced into them, and its edits."""
        buckets, owner = self.forward.buckets, steps.owner
        common = (self._leaves, self.state, self.seats(steps), self._shapes(steps.sampler.arrays))
        specs = self.edits(steps, is_cached=is_cached)
        for tokens in buckets.prefill_tokens:
            specs[ProgramKey("prefill", tokens, owner)] = ProgramSpec(
                name=f"prefill_t{tokens}",
                fn=self._of_leaves(functools.partial(steps.prefill, num_tokens=tokens)),
                args=(*common, self._packed(batch.prefill_packing(buckets, tokens))),
                donate=(1, 2),
                options=self._options,
                cost=tokens,
                is_cached=is_cached,
            )
        for rows in buckets.decode_rows:
            key = ProgramKey("decode", rows, owner)
            specs[key] = self._window(steps, key, common, is_cached=is_cached)
        return specs

    def hidden_windows(self, steps: SamplerSteps, *, is_cached: bool) -> Specs:
        """Windows that report hidden states."""
        buckets = self.forward.buckets
        common = (self._leaves, self.state, self.seats(steps), self._shapes(steps.sampler.arrays))
        keys = [ProgramKey(HIDDEN_DECODE, rows, steps.owner) for rows in buckets.decode_rows]
        return {key: self._window(steps, key, common, is_cached=is_cached) for key in keys}

    def _window(
        self, steps: SamplerSteps, key: ProgramKey, common: tuple[Any, ...], *, is_cached: bool
    ) -> ProgramSpec:
        return ProgramSpec(
            name=f"{key.kind}_b{key.size}",
            fn=self._of_leaves(
                functools.partial(
                    steps.decode,
                    num_rows=key.size,
                    has_hidden=key.kind == HIDDEN_DECODE,
                )
            ),
            args=(*common, self._packed(batch.decode_packing(self.forward.buckets, key.size))),
            donate=(1, 2),
            options=self._options,
            cost=key.size,
            is_cached=is_cached,
        )

    def edits(self, steps: SamplerSteps, *, is_cached: bool) -> dict[ProgramKey, ProgramSpec]:
        """The program that takes edits of a sampler's table."""
        seat = ProgramSpec(
            name="seat",
            fn=steps.seat,
            args=(self.seats(steps), self._packed(batch.edit_packing())),
            donate=(0,),
            is_cached=is_cached,
        )
        return {ProgramKey("seat", owner=steps.owner): seat}

    def split(self, steps: SamplerSteps, *, is_cached: bool = False) -> Specs:
        """Draws over the logits of a forward step, and the sampler's edits."""
        specs = self.edits(steps, is_cached=is_cached)
        seats, arrays = self.seats(steps), self._shapes(steps.sampler.arrays)
        model = self.forward.model
        for rows, kind in itertools.product(self.forward.buckets.split_rows, (DRAW, DRAW_LISTS)):
            specs[ProgramKey(kind, rows, owner=steps.owner)] = ProgramSpec(
                name=f"{kind}_b{rows}",
                fn=functools.partial(steps.draw, has_lists=kind == DRAW_LISTS),
                args=(
                    self.state.slots,
                    seats,
                    self.state.token_counts,
                    arrays,
                    self._array((rows, model.config.vocab_size), jnp.float32),
                    self._array((rows, model.config.hidden_size), model.dtype),
                    self._packed(batch.draw_packing(rows)),
                ),
                donate=(0, 1),
                options=self._options,
                is_cached=is_cached,
            )
        return specs

    def admit(self) -> dict[ProgramKey, ProgramSpec]:
        """The program that takes edits of the engine's own table."""
        args = (self.state, self._packed(batch.edit_packing()))
        spec = ProgramSpec(name="admit", fn=self.forward.admit, args=args, donate=(0,))
        return {ProgramKey("admit"): spec}

    def forwards(self) -> dict[ProgramKey, ProgramSpec]:
        """Steps without a sampler, for the split form."""
        specs, forward, buckets = {}, self.forward, self.forward.buckets
        common = (self._leaves, self.state)
        for tokens in buckets.prefill_tokens:
            specs[ProgramKey("forward_prefill", tokens)] = ProgramSpec(
                name=f"forward_prefill_t{tokens}",
                fn=self._of_leaves(functools.partial(forward.prefill, num_tokens=tokens)),
                args=(*common, self._packed(batch.prefill_packing(buckets, tokens))),
                donate=(1,),
                options=self._options,
                cost=tokens,
            )
        for rows in buckets.split_rows:
            specs[ProgramKey("forward_decode", rows)] = ProgramSpec(
                name=f"forward_decode_b{rows}",
                fn=self._of_leaves(functools.partial(forward.decode, num_rows=rows)),
                args=(*common, self._packed(batch.decode_packing(buckets, rows))),
                donate=(1,),
                options=self._options,
                cost=rows,
            )
        return specs

    def embeds(self) -> Specs:
        """Prefills in which embeddings stand for some of the ids, for the split form."""
        specs, forward, model = {}, self.forward, self.forward.model
        for key, spec in self.forwards().items():
            if key.kind != "forward_prefill":
                continue
            values = self._array((key.size, model.config.hidden_size), model.dtype)
            embeds = Embeds(self._array((key.size,), jnp.bool_), values)
            specs[key._replace(kind="embeds_prefill")] = dataclasses.replace(
                spec,
                name=f"embeds_prefill_t{key.size}",
                fn=self._of_leaves(
                    lambda *args, k=key: forward.prefill(
                        *args[:3], num_tokens=k.size, embeds=args[3]
                    )
                ),
                args=(*spec.args, embeds),
            )
        return specs

    def scores(self) -> dict[ProgramKey, ProgramSpec]:
        """Logprobs of prompt tokens."""
        specs, model, buckets = {}, self.forward.model, self.forward.buckets
        for tokens in buckets.prefill_tokens:
            specs[ProgramKey("score", tokens)] = ProgramSpec(
                name=f"score_t{tokens}",
                fn=self._of_leaves(functools.partial(self.forward.score, num_tokens=tokens)),
                args=(
                    self._leaves,
                    self._array((tokens, model.config.hidden_size), model.dtype),
                    self._packed(batch.score_packing(buckets, tokens)),
                ),
                cost=tokens,
            )
        return specs

    def _of_leaves(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A step that takes the parameters as a tuple: every call would take a tree apart anew."""
        return lambda leaves, *args: fn(jax.tree.unflatten(self._tree, leaves), *args)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self._mesh))

    def _shapes(self, arrays: Any) -> Any:
        return jax.tree.map(lambda x: self._array(x.shape, x.dtype), arrays)

    def _packed(self, packing: batch.Packing) -> jax.ShapeDtypeStruct:
        return self._array((packing.size,), jnp.int32)
