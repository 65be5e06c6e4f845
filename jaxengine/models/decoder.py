"""The dense decoder all families here share, with flags for where they differ.

One forward serves prefill, decode and training. What a family adds is its config map: see its file.

Source: Touvron et al., LLaMA, arXiv:2302.13971; numerics follow transformers' LlamaForCausalLM,
Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.models.family import WeightPart, run_layer
from jaxengine.nn.attention import AttentionMetadata, ForwardContext, KVPages
from jaxengine.nn.layers import Embedding, Linear, RMSNorm, project_to_vocab
from jaxengine.nn.residual import Residual, add_product
from jaxengine.nn.rope import Rotation, rotation


class Attention(nnx.Module):
    """Grouped-query attention with a merged query/key/value projection.

    `qkv_bias` adds a bias to that projection; `qk_norm` normalises every query and key head before
    it is rotated.

    Source: Ainslie et al., GQA, arXiv:2305.13245; Qwen3 Technical Report, arXiv:2505.09388.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(
            config.hidden_size,
            heads,
            axes=("heads", "embed"),
            use_bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.out = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            axes=("embed", "heads"),
            dtype=dtype,
            rngs=rngs,
        )
        norm = functools.partial(
            RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=dtype, axes=("head_dim",)
        )
        self.q_norm, self.k_norm = (norm(), norm()) if config.qk_norm else (None, None)

    def __call__(
        self,
        stream: Residual,
        norm: RMSNorm,
        angles: Rotation,
        kv_pages: KVPages | None,
        meta: AttentionMetadata | None,
        ctx: ForwardContext,
    ) -> tuple[Float[Array, "T D"], KVPages | None]:
        """x + attention(norm(x))."""
        x, inner, norm_left = stream.enter(norm, ctx)
        qkv_TNH = self.qkv(inner, ctx, norm=norm_left).reshape(x.shape[0], -1, self.head_dim)
        q, k, v = jnp.split(qkv_TNH, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, kv_pages = ctx.attend(q, k, v, angles, kv_pages, meta, ctx)
        return self.out(out.reshape(x.shape[0], -1), ctx, residual=x), kv_pages


class MLP(nnx.Module):
    """SwiGLU feed-forward with merged gate and up projections.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        wide, narrow = 2 * config.intermediate_size, config.hidden_size
        self.gate_up = Linear(narrow, wide, axes=("ffn", "embed"), dtype=dtype, rngs=rngs)
        self.down = Linear(
            config.intermediate_size, narrow, axes=("embed", "ffn"), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "T D"], norm: RMSNorm, ctx: ForwardContext) -> Residual:
        """x + down(silu(gate(norm(x))) * up(norm(x)))."""
        return add_product(x, self.gate_up(x, ctx, norm=norm, glu=jax.nn.silu), self.down, ctx)


class DecoderLayer(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        stream: Residual,
        angles: Rotation,
        kv_pages: KVPages | None,
        meta: AttentionMetadata | None,
        ctx: ForwardContext,
    ) -> tuple[Residual, KVPages | None]:
        with jax.named_scope("attn"):
            x, kv_pages = self.attn(stream, self.attn_norm, angles, kv_pages, meta, ctx)
        with jax.named_scope("mlp"):
            return self.mlp(x, self.mlp_norm, ctx), kv_pages


class Decoder(nnx.Module):
    """The decoder: packed tokens in, final-norm hidden states and KV pages out."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.output = (
            None
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, " T"] | Float[Array, "T D"],
        positions: Int[Array, " T"],
        kv_cache: list[KVPages] | None,
        meta: AttentionMetadata | None,
        ctx: ForwardContext,
    ) -> tuple[Float[Array, "T D"], list[KVPages | None]]:
        """Runs the packed tokens of all rows.

        Args:
          tokens: Ids, or embeddings in their place.
          positions: Absolute position of every token in its sequence.
          kv_cache: One page array per layer; None when `ctx.attend` keeps no cache.
          meta: Rows and pages of this call.
          ctx: Static choices.

        Returns:
          Hidden states after the final norm, and the pages with this call's tokens written.
        """
        x = self.embed(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens
        angles = rotation(
            positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        stream = Residual(x)
        pages_out = []
        pages_in = kv_cache or [None] * len(self.layers)
        for i, (layer, pages) in enumerate(zip(self.layers, pages_in, strict=True)):
            ctx.see(i, stream.total())
            stream, pages = run_layer(layer, ctx, stream, angles, pages, meta)
            pages_out.append(pages)
        _, out, norm_left = stream.enter(self.norm, ctx)
        return out if norm_left is None else norm_left(out), pages_out

    def logits(self, hidden: Float[Array, "B D"], ctx: ForwardContext) -> Float[Array, "B V"]:
        """Float32 logits of hidden states."""
        output = self.embed if self.output is None else self.output
        return project_to_vocab(hidden, output.weight[...], ctx)


def weight_parts(config: ModelConfig) -> dict[str, WeightPart]:
    """Checkpoint names, and where their rows go in the merged parameters."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    parts = {
        "model.embed_tokens.weight": WeightPart("embed.weight", 0, (config.vocab_size, hidden)),
        "model.norm.weight": WeightPart("norm.weight", 0, (hidden,)),
    }
    if not config.tie_word_embeddings:
        parts["lm_head.weight"] = WeightPart("output.weight", 0, (config.vocab_size, hidden))
    for i in range(config.num_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        start = 0
        for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            parts[f"{old}.self_attn.{name}.weight"] = WeightPart(
                f"{new}.attn.qkv.weight", start, (rows, hidden)
            )
            if config.qkv_bias:
                parts[f"{old}.self_attn.{name}.bias"] = WeightPart(
                    f"{new}.attn.qkv.bias", start, (rows,)
                )
            start += rows
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            parts[f"{old}.self_attn.{name}.weight"] = WeightPart(
                f"{new}.attn.{name}.weight", 0, (config.head_dim,)
            )
        parts |= {
            f"{old}.self_attn.o_proj.weight": WeightPart(
                f"{new}.attn.out.weight", 0, (hidden, q_rows)
            ),
            f"{old}.mlp.gate_proj.weight": WeightPart(
                f"{new}.mlp.gate_up.weight", 0, (ffn, hidden)
            ),
            f"{old}.mlp.up_proj.weight": WeightPart(
                f"{new}.mlp.gate_up.weight", ffn, (ffn, hidden)
            ),
            f"{old}.mlp.down_proj.weight": WeightPart(f"{new}.mlp.down.weight", 0, (hidden, ffn)),
            f"{old}.input_layernorm.weight": WeightPart(f"{new}.attn_norm.weight", 0, (hidden,)),
            f"{old}.post_attention_layernorm.weight": WeightPart(
                f"{new}.mlp_norm.weight", 0, (hidden,)
            ),
        }
    return parts
