"""Trains the embedded demo model, a small Qwen2, and samples from the parameters it just trained.

    python examples/train_demo_model.py --data shakespeare.txt --out demo

One process does it all: a byte-level BPE tokenizer, training of jaxengine's own Qwen2 with
a dense attention in place of the paged one, the held-out loss, a Hugging Face folder, and text from
`jaxengine.Engine` over the parameters in memory. The last tenth of the text is never seen: not by
the tokenizer, not in training, not in the choice of the checkpoint. On a GPU this takes a minute or
two; for a look at it on a CPU add `--steps 60 --batch 4 --seq-len 256 --copies 4`.

One million bytes are few, so the work is in not learning them by heart: BPE dropout gives every
copy of the text other tokens, units are dropped in each layer, and the checkpoint with the lowest
loss on a validation slice is kept.

Sources: BPE dropout, Provilkov et al., arXiv:1910.13267. Dropout, Srivastava et al., JMLR 15, 2014.
AdamW, Loshchilov and Hutter, arXiv:1711.05101. Tokenizer and ChatML, Qwen2.5, arXiv:2412.15115.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Params
from jaxengine.nn.attention import ForwardContext, dense_attention
from jaxengine.nn.layers import Linear

CONTEXT_LENGTH = 1024
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = ["ROMEO:\n", "First Citizen:\nBefore we proceed", "Hello, my name is"]
CHAT_PROMPT = [{"role": "user", "content": "What news, my lord?"}]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of a training run; each one is a flag.

    Attributes:
      vocab_size: Tokens, the 256 bytes and the special ones included.
      num_layers: Decoder layers.
      intermediate_size: Width of the feed-forward layer.
      seq_len: Tokens per training sequence.
      batch: Sequences per step.
      steps: Optimiser steps.
      steps_per_dispatch: Steps in one jitted scan; the validation loss is taken between two.
      learning_rate: Peak of a cosine schedule with warm-up.
      weight_decay: Of the matrices, not of norms and biases.
      dropout: Share of units dropped before and after the last product of each block.
      copies: Tokenizations of the text; the first is the usual one, others use BPE dropout.
      bpe_dropout: Share of merges skipped.
      copies_per_chat: One in so many copies comes again as ChatML dialogues.
      seed: Of parameters, batches and dropout. BPE dropout has no seed in `tokenizers`, so two
        runs differ slightly.
    """

    vocab_size: int = 2560
    num_layers: int = 4
    intermediate_size: int = 704
    seq_len: int = CONTEXT_LENGTH
    batch: int = 16
    steps: int = 2400
    steps_per_dispatch: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.2
    dropout: float = 0.3
    copies: int = 24
    bpe_dropout: float = 0.1
    copies_per_chat: int = 4
    seed: int = 0


class Corpus(NamedTuple):
    """The text, split in file order."""

    train: str
    validation: str
    held_out: str


class TrainState(NamedTuple):
    """What a step takes and gives: float32 parameters and the optimiser's state."""

    params: Any
    opt_state: optax.OptState


def read_corpus(path: Path) -> Corpus:
    """Nine tenths to train on, of which the last twentieth chooses the checkpoint."""
    raw = path.read_bytes()
    cut = len(raw) * 9 // 10
    validation_cut = cut * 19 // 20
    parts = raw[:validation_cut], raw[validation_cut:cut], raw[cut:]
    return Corpus(*(part.decode() for part in parts))


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE that normalises and splits as Qwen2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def to_dialogues(text: str, rng: random.Random) -> str:
    """The speeches of the plays as ChatML dialogues of two to eight turns, without names."""
    speeches = [part.split(":\n", 1)[1].strip() for part in text.split("\n\n") if ":\n" in part]
    dialogues, start = [], 0
    while start < len(speeches):
        end = start + rng.choice([2, 2, 4, 4, 6, 8])
        dialogues.append(
            "".join(
                f"{TURN_START}{role}\n{speech}{TURN_END}\n"
                for role, speech in zip(
                    cycle(["user", "assistant"]), speeches[start:end], strict=False
                )
            )
        )
        start = end
    return END_OF_TEXT.join(dialogues)


def training_stream(tokenizer: Tokenizer, text: str, recipe: Recipe) -> Int[np.ndarray, " S"]:
    """All copies of the text in one row of ids, parted by the end-of-text token."""
    rng = random.Random(recipe.seed)
    num_chats = -(-recipe.copies // recipe.copies_per_chat)
    dropped = [text] * (recipe.copies - 1) + [to_dialogues(text, rng) for _ in range(num_chats)]
    encodings = [tokenizer.encode(text)]
    tokenizer.model.dropout = recipe.bpe_dropout or None
    encodings += tokenizer.encode_batch(dropped)
    tokenizer.model.dropout = None
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    return np.concatenate([np.array(encoding.ids + end, np.int32) for encoding in encodings])


def hf_config(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, object]:
    """`config.json` of the model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": recipe.intermediate_size,
        "max_position_embeddings": CONTEXT_LENGTH,
        "max_window_layers": recipe.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": recipe.num_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": recipe.vocab_size,
    }


class LinearWithDropout(nnx.Module):
    """Stands in for a `Linear` while training; drops units before and after the product."""

    def __init__(self, inner: Linear, key: PRNGKeyArray, rate: float) -> None:
        self.inner, self.rate = inner, rate
        self.keys = nnx.Rngs(key)

    def __call__(
        self, x: Float[Array, "T I"], ctx: ForwardContext, *, residual: Float[Array, "T O"]
    ) -> Float[Array, "T O"]:
        x = drop(x, self.keys(), self.rate)
        return residual + drop(self.inner(x, ctx), self.keys(), self.rate)


def drop(x: Float[Array, "..."], key: PRNGKeyArray, rate: float) -> Float[Array, "..."]:
    """Zeroes a share `rate` of the values and scales the others to keep the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def token_losses(
    model: BoundModel,
    params: Params,
    rows: Int[Array, "B S_plus_1"],
    key: PRNGKeyArray | None = None,
    dropout: float = 0.0,
) -> Float[Array, "B S"]:
    """Negative log-likelihood in nats of every next token; with a key, units are dropped."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    module = model.bind(params)
    tokens = inputs.reshape(-1)
    if key is not None:
        keys = iter(jax.random.split(key, 1 + 2 * len(module.layers)))
        tokens = drop(module.embed(tokens), next(keys), dropout)
        for layer in module.layers:
            layer.attn.out = LinearWithDropout(layer.attn.out, next(keys), dropout)
            layer.mlp.down = LinearWithDropout(layer.mlp.down, next(keys), dropout)
    positions = jnp.tile(jnp.arange(inputs.shape[1]), len(inputs))
    ctx = ForwardContext(attend=dense_attention(len(inputs)))
    hidden, _ = module(tokens, positions, None, None, ctx)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        module.logits(hidden, ctx), targets.reshape(-1)
    )
    return losses.reshape(targets.shape)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW under a warm-up and a cosine decay, with clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=min(100, recipe.steps // 10),
        decay_steps=recipe.steps,
        end_value=recipe.learning_rate / 50,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def make_train(
    model: BoundModel, optimizer: optax.GradientTransformation, recipe: Recipe, dtype: jnp.dtype
) -> Callable[[TrainState, Int[Array, " S"], PRNGKeyArray], tuple[TrainState, Float[Array, ""]]]:
    """Jitted `train(state, stream, key) -> (state, mean loss)` over one dispatch of steps.

    Args:
      model: The module without its arrays.
      optimizer: From `make_optimizer`.
      recipe: Sizes of a step.
      dtype: Of the products; the parameters themselves stay float32.
    """

    def loss(params: Params, rows: Array, key: Array) -> Array:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        return token_losses(model, params, rows, key, recipe.dropout).mean()

    def step(stream: Array, state: TrainState, key: Array) -> tuple[TrainState, Float[Array, ""]]:
        batch_key, drop_key = jax.random.split(key)
        window = recipe.seq_len + 1
        starts = jax.random.randint(batch_key, (recipe.batch, 1), 0, len(stream) - window)
        rows = stream[starts + jnp.arange(window)]
        value, grads = jax.value_and_grad(loss)(state.params, rows, drop_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    @partial(jax.jit, donate_argnames="state")
    def train(state: TrainState, stream: Array, key: Array) -> tuple[TrainState, Array]:
        keys = jax.random.split(key, recipe.steps_per_dispatch)
        state, losses = jax.lax.scan(partial(step, stream), state, keys)
        return state, losses.mean()

    return train


def make_bits_per_byte(
    model: BoundModel, tokenizer: Tokenizer, recipe: Recipe
) -> Callable[[Params, str], float]:
    """`bits_per_byte(params, text)`: float32 loss over windows of `seq_len`, none overlapping."""

    @jax.jit
    def sum_of_losses(params: Params, rows: Array, weights: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return (token_losses(model, params, rows) * weights).sum()

    def bits_per_byte(params: Params, text: str) -> float:
        ids = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids]
        num_windows = -(-(len(ids) - 1) // recipe.seq_len)
        num_windows += -num_windows % recipe.batch
        places = np.arange(num_windows * recipe.seq_len).reshape(-1, recipe.seq_len)
        places = np.concatenate([places, places[:, -1:] + 1], axis=1)
        rows = np.pad(ids, (0, int(places.max()) + 1 - len(ids)))[places]
        weights = (places[:, 1:] < len(ids)).astype(np.float32)
        nats = sum(
            float(sum_of_losses(params, rows[i : i + recipe.batch], weights[i : i + recipe.batch]))
            for i in range(0, num_windows, recipe.batch)
        )
        return nats / len(text.encode()) / math.log(2)

    return bits_per_byte


def save_checkpoint(folder: Path, params: Params, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Writes the Hugging Face layout: configs, tokenizer, bfloat16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(recipe, tokenizer)
    family = MODELS["Qwen2ForCausalLM"]
    tensors = {}
    for name, part in family.weight_parts(family.parse_config(config)).items():
        array: Any = params
        for key in part.path.split("."):
            array = array[int(key) if key.isdigit() else key]
        rows = np.asarray(array)[part.start : part.start + part.shape[0]]
        tensors[name] = np.ascontiguousarray(rows.astype(jnp.bfloat16))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    end_ids = [tokenizer.token_to_id(token) for token in (TURN_END, END_OF_TEXT)]
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_ids[1],
            "do_sample": True,
            "eos_token_id": end_ids,
            "pad_token_id": end_ids[1],
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "additional_special_tokens": [TURN_START, TURN_END],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "model_max_length": CONTEXT_LENGTH,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def write_json(path: Path, value: dict[str, object]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def train(
    model: BoundModel,
    params: Params,
    stream: Int[np.ndarray, " S"],
    validate: Callable[[Params], float],
    recipe: Recipe,
) -> Params:
    """Runs all steps and returns the parameters with the lowest validation loss, on the host."""
    optimizer = make_optimizer(recipe)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    run_steps = make_train(model, optimizer, recipe, dtype)
    state, key = TrainState(params, optimizer.init(params)), jax.random.key(recipe.seed)
    best_loss, best_params = math.inf, params
    tokens, start = jnp.asarray(stream), time.perf_counter()
    for first in range(0, recipe.steps, recipe.steps_per_dispatch):
        state, loss = run_steps(state, tokens, jax.random.fold_in(key, first))
        validation = validate(state.params)
        if validation < best_loss:
            best_loss, best_params = validation, jax.device_get(state.params)
        print(
            f"step {first + recipe.steps_per_dispatch:5d}  loss {float(loss):.3f} nats per token"
            f"  validation {validation:.3f} bits per byte  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    print(f"kept the parameters with validation loss {best_loss:.4f} bits per byte")
    return best_params


def model_card(recipe: Recipe, num_params: int, held_out: float) -> str:
    """README of the output folder."""
    return f"""# jaxengine demo model

A Qwen2 of {num_params / 1e6:.1f} million parameters: {recipe.num_layers} layers, 4 query and 2 \
key/value heads of 64, tied embeddings,
{recipe.vocab_size} byte-level BPE tokens. Small enough to travel with the package and to run \
anywhere. It writes
something that looks like a play; it knows nothing.

- Text: the first nine tenths of tiny-shakespeare (Shakespeare's plays, public domain, collected in
  github.com/karpathy/char-rnn), as it stands and as ChatML dialogues.
- Held-out loss on the last tenth: {held_out:.3f} bits per byte, with these bfloat16 weights.
- Made by `examples/train_demo_model.py`: {recipe.steps} steps of {recipe.batch} sequences of \
{recipe.seq_len} tokens,
  dropout {recipe.dropout}, BPE dropout {recipe.bpe_dropout}, weight decay {recipe.weight_decay}.
"""


def sample(params: Params, model: BoundModel, folder: Path) -> None:
    """Text from the engine over parameters that never left this process."""
    from transformers import AutoTokenizer

    from jaxengine import Engine

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(CHAT_PROMPT, tokenize=False, add_generation_prompt=True)
    prompts = [*PROMPTS, chat]
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 60, "seed": 0}
    with Engine(params=params, model_config=model.config, tokenizer=tokenizer) as engine:
        outputs = engine.generate(prompts, sampling)
    assert isinstance(outputs, list)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"--- {prompt}{output['text']}")


def parse_args() -> tuple[argparse.Namespace, Recipe]:
    """The paths, and the recipe with one flag for each of its fields."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the text (shakespeare.txt)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--no-sample", action="store_true", help="start no engine at the end")
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args = parser.parse_args()
    return args, Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def make_model(corpus: Corpus, folder: Path, recipe: Recipe) -> tuple[BoundModel, Params, float]:
    """Tokenizer, training, held-out loss and checkpoint.

    Returns:
      The module without arrays, its bfloat16 parameters, and their held-out bits per byte.
    """
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    stream = training_stream(tokenizer, corpus.train, recipe)
    family = MODELS["Qwen2ForCausalLM"]
    config = family.parse_config(hf_config(recipe, tokenizer))
    model = BoundModel(family, config, jnp.dtype("float32"))
    module = family.module(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(recipe.seed))
    params = nnx.to_pure_dict(nnx.state(module))
    num_params = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"{num_params:,} parameters, {len(stream):,} tokens in {recipe.copies} copies of the text"
    )

    bits_per_byte = make_bits_per_byte(model, tokenizer, recipe)
    params = train(model, params, stream, lambda p: bits_per_byte(p, corpus.validation), recipe)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    held_out = bits_per_byte(jax.tree.map(lambda p: p.astype(jnp.float32), params), corpus.held_out)
    print(f"held-out loss: {held_out:.4f} bits per byte (bfloat16 weights)", flush=True)
    save_checkpoint(folder, params, tokenizer, recipe)
    (folder / "README.md").write_text(model_card(recipe, num_params, held_out))
    return model, params, held_out


def main() -> None:
    """Trains, measures, saves, samples."""
    args, recipe = parse_args()
    model, params, _ = make_model(read_corpus(args.data), args.out, recipe)
    if not args.no_sample:
        sample(params, model, args.out)


if __name__ == "__main__":
    main()
