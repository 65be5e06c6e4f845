"""The slow way: the model's one forward, called by hand over a paged cache, with no engine."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.config import ModelConfig
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Params
from jaxengine.nn.attention import AttentionMetadata, ForwardContext
from jaxengine.runtime.kv_cache import kv_shape
from jaxengine.runtime.sharding import make_mesh

PAGE_SIZE = 16


def params_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Float32 params from checkpoint tensors under their Hugging Face names."""
    filled = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan, np.float32), bound_model(config).abstract
    )
    for name, part in MODELS[config.architecture].weight_parts(config).items():
        leaf: Any = filled
        for key in part.path.split("."):
            leaf = leaf[int(key) if key.isdigit() else key]
        leaf[part.start : part.start + part.shape[0]] = tensors[name]
    return jax.tree.map(jnp.asarray, filled)


@lru_cache
def bound_model(config: ModelConfig) -> BoundModel:
    return BoundModel(MODELS[config.architecture], config, jnp.dtype(jnp.float32))


@lru_cache
def compiled_step(config: ModelConfig, kernels: Any) -> Any:
    """`step(params, kv, ids, positions, meta) -> (logits of every token, kv)`."""
    ctx = ForwardContext(mesh=make_mesh(jax.devices()[:1]), kernels=kernels)

    @jax.jit
    def step(params, kv, ids, positions, meta):
        model = bound_model(config).bind(params)
        hidden, kv = model(ids, positions, kv, meta, ctx)
        return model.logits(hidden, ctx), kv

    return step


def run_prefill(
    params: Params,
    config: ModelConfig,
    prompts: list[np.ndarray],
    chunk_len: int,
    kernels: Any = None,
) -> list[np.ndarray]:
    """Float32 logits `[T, V]` of every prompt; one call takes `chunk_len` tokens of each of them.

    With a `chunk_len` of 1 every call is a decode step; all others are one program, padded to the
    size of the prompts together. The pages of a prompt are scattered over a cache that is full of
    NaN, so reading what was never written shows.
    """
    num_rows = len(prompts)
    num_tokens = num_rows if chunk_len == 1 else -(-sum(map(len, prompts)) // 64) * 64
    pages_per_row = -(-max(map(len, prompts)) // PAGE_SIZE)
    num_pages = 1 + num_rows * pages_per_row
    page_ids = np.random.default_rng(0).permutation(np.arange(1, num_pages, dtype=np.int32))
    page_table = page_ids.reshape(num_rows, pages_per_row)
    for row, prompt in enumerate(prompts):
        page_table[row, -(-len(prompt) // PAGE_SIZE) :] = 0
    shape = kv_shape(config, num_pages, PAGE_SIZE)
    kv = [jnp.full(shape, jnp.nan, jnp.float32) for _ in range(config.num_layers)]
    step = compiled_step(config, kernels)
    logits = [np.zeros((0, config.vocab_size), np.float32) for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk_len):
        rows = [prompt[start : start + chunk_len] for prompt in prompts]
        ids, positions, meta, owners = pack(rows, start, num_tokens, page_table)
        out, kv = step(params, kv, ids, positions, meta)
        logits = [np.concatenate([a, out[owners == row]]) for row, a in enumerate(logits)]
    return logits


def pack(
    rows: list[np.ndarray], start: int, num_tokens: int, page_table: np.ndarray
) -> tuple[np.ndarray, np.ndarray, AttentionMetadata, np.ndarray]:
    """Ids, positions, metadata and owning row (-1 for padding) of the packed tokens."""
    is_decode = num_tokens == len(rows)
    ids, positions, write_pages, write_offsets = np.zeros((4, num_tokens), np.int32)
    owners = np.full(num_tokens, -1)
    lens = np.asarray([len(row) for row in rows], np.int32)
    q_starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    for row, tokens in enumerate(rows):
        first = row if is_decode else q_starts[row]  # a decode step keeps a place for dead rows
        where = slice(first, first + len(tokens))
        at = np.arange(start, start + len(tokens))
        ids[where], positions[where], owners[where] = tokens, at, row
        write_pages[where] = page_table[row, at // PAGE_SIZE]
        write_offsets[where] = at % PAGE_SIZE
    meta = AttentionMetadata(
        page_table=jnp.asarray(page_table),
        q_starts=jnp.arange(len(rows) + 1, dtype=jnp.int32) if is_decode else jnp.asarray(q_starts),
        kv_lens=jnp.asarray(np.where(lens > 0, start + lens, 0), jnp.int32),
        write_pages=jnp.asarray(write_pages),
        write_offsets=jnp.asarray(write_offsets),
        is_decode=is_decode,
    )
    return ids, positions, meta, owners
