"""Writes the golden files that the tests compare with, using transformers and torch.

    python tests/golden/make_golden.py           writes the files anew
    python tests/golden/make_golden.py --check   makes them anew and compares with those on disk

Runs in an environment of its own (torch, transformers, safetensors; no jax). One safetensors file
per model holds the weights under their Hugging Face names, the prompts as `input_ids.<i>` and the
float32 logits as `logits.<i>`; its metadata holds the config and the versions. The weights are
stored as float16, which loses nothing: they were rounded to it before the logits were computed.
The demo model's own weights are not stored again, only their SHA-256, and logits for a few
positions (`positions.<i>`). `rope.safetensors` holds the rotary frequencies of published models
with scaling. `sampling.safetensors` holds what transformers' logits processors make
of rows of logits, each row with values of its own.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent
DEMO = FOLDER.parent.parent / "jaxengine" / "assets" / "demo"
TOLERANCE = 1e-5  # between two versions of torch or two processors, relative to the largest logit

# Prompt lengths around the page size (16) and far from any bucket.
LENGTHS = (1, 7, 16, 33, 67)


def config(**values: object) -> dict[str, object]:
    """A Qwen2 `config.json`, as the hub has them."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    } | values


CONFIGS = {
    "tied_gqa_h32": config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "tied_group7_h32": config(
        vocab_size=151,
        hidden_size=224,
        intermediate_size=104,
        num_attention_heads=7,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_theta=10000.0,
    ),
    "untied_gqa_h64": config(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
    "untied_mha_h32": config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=200,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    ),
    # As transformers 5 writes it: rope_parameters instead of rope_theta, dtype, layer_types.
    "untied_mha_h64": {
        name: value
        for name, value in config(
            vocab_size=113,
            hidden_size=128,
            intermediate_size=128,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            dtype="float32",
            layer_types=["full_attention", "full_attention"],
        ).items()
        if name not in ("rope_theta", "torch_dtype")
    },
}


def small(architecture: str, rope: dict[str, object], **values: object) -> dict[str, object]:
    """A `config.json` of another family, as small as shows how it differs."""
    return (
        config(
            architectures=[architecture],
            model_type=architecture.removesuffix("ForCausalLM").lower(),
            vocab_size=61,
            hidden_size=32,
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            rope_theta=10000.0,
            rope_scaling=rope or None,
        )
        | values
    )


# Scaling as in the models' own configs, but of a context so short that every rule shows.
CONFIGS |= {
    "llama_llama3": small(
        "LlamaForCausalLM",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
            "rope_type": "llama3",
        },
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "mistral_linear": small(
        "MistralForCausalLM",
        {"factor": 4.0, "type": "linear"},
        head_dim=8,
        tie_word_embeddings=False,
        sliding_window=None,
    ),
    "qwen2_yarn": small(
        "Qwen2ForCausalLM",
        {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
        tie_word_embeddings=True,
        max_position_embeddings=32,
    ),
    "qwen3": small("Qwen3ForCausalLM", {}, head_dim=24, tie_word_embeddings=True),
}


def random_weights(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Float16 weights at a scale that keeps activations near 1, biases and norms not trivial."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        noise = rng.standard_normal(tuple(value.shape))
        if name.endswith("bias"):
            weight = 0.5 * noise
        elif value.ndim == 1:
            weight = 1 + 0.2 * noise
        elif "embed_tokens" in name:
            weight = 0.5 * noise
        else:
            weight = 1.5 * noise / np.sqrt(value.shape[1])
        weights[name] = weight.astype(np.float16)
    return weights


@torch.no_grad()
def logits_of(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Float32 logits `[T, V]` of one prompt, from one whole forward."""
    return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def golden_random(name: str, seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of one random model."""
    values = CONFIGS[name]
    architecture = getattr(transformers, values["architectures"][0])
    model_config = architecture.config_class.from_dict(json.loads(json.dumps(values)))
    model_config._attn_implementation = "eager"
    model = architecture(model_config).eval().float()
    weights = random_weights(model, seed)
    if values["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in weights.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if values["tie_word_embeddings"] else []), missing
    rng = np.random.default_rng(1000 + seed)
    tensors = dict(weights)
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(0, values["vocab_size"], length, dtype=np.int32)
        tensors |= {f"input_ids.{i}": ids, f"logits.{i}": logits_of(model, ids)}
    return tensors, {"config": json.dumps(values)}


DEMO_PROMPTS = (
    "To be, or not to be",
    "KING HENRY:\nOnce more unto the breach, dear friends, once more;\nOr close the wall up",
    "naïve café, 東京, 🙂 \t\n\n  odd   spaces",
)


def golden_demo() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of the embedded demo model."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    tensors = {}
    for i, prompt in enumerate(DEMO_PROMPTS):
        ids = np.asarray(tokenizer.encode(prompt), np.int32)
        positions = np.unique([0, len(ids) // 2, len(ids) - 1]).astype(np.int32)
        tensors |= {
            f"input_ids.{i}": ids,
            f"positions.{i}": positions,
            f"logits.{i}": logits_of(model, ids)[positions],
        }
    return tensors, {"weights_sha256": weights_sha256(DEMO)}


def weights_sha256(folder: Path) -> str:
    """Hash of the safetensors files of a checkpoint folder, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Model -> head size, theta, context length and `rope_scaling` of its published config.
ROPES = {
    "llama-3.1-8b": (
        128,
        500000.0,
        131072,
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    ),
    "llama-3.2-1b": (
        64,
        500000.0,
        131072,
        {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    ),
    "qwen2.5-7b": (
        128,
        1000000.0,
        32768,
        {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "mscale": (  # as DeepSeek's configs have it
        64,
        10000.0,
        163840,
        {
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
        },
    ),
    "not_truncated": (  # as gpt-oss has it
        64,
        150000.0,
        131072,
        {
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
    ),
    "attention_factor": (
        128,
        10000.0,
        8192,
        {
            "factor": 2.0,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
        },
    ),
    "vicuna-7b-16k": (128, 10000.0, 4096, {"factor": 4.0, "type": "linear"}),
    "plain": (128, 1000000.0, 32768, {"rope_type": "default"}),
}


def golden_rope() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """For every model its frequencies, and last its attention factor."""
    tensors = {}
    for name, (head_dim, theta, most, scaling) in ROPES.items():
        model_config = transformers.LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=most,
            rope_theta=theta,
            rope_scaling=dict(scaling),
        )
        module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model_config)
        rates = module.inv_freq.numpy()
        tensors[f"rope.{name}"] = np.append(rates, np.float32(module.attention_scaling))
    return tensors, {"ropes": json.dumps(ROPES)}


V, ROWS = 48, 6
# Case -> a processor and its values, one a row, by the name of the sampling parameter.
PROCESSORS = {
    "temperature": (
        lambda temperature: transformers.TemperatureLogitsWarper(temperature),
        {"temperature": [0.3, 0.7, 1.0, 1.3, 2.0, 5.0]},
    ),
    "top_k": (
        lambda top_k: transformers.TopKLogitsWarper(top_k),
        {"top_k": [1, 2, 5, 17, 47, 48]},
    ),
    "top_p": (
        lambda top_p: transformers.TopPLogitsWarper(top_p),
        {"top_p": [0.05, 0.3, 0.6, 0.9, 0.97, 1.0]},
    ),
    "min_p": (
        lambda min_p: transformers.MinPLogitsWarper(min_p),
        {"min_p": [0.0, 0.01, 0.1, 0.3, 0.7, 1.0]},
    ),
    "typical": (
        lambda typical_p: transformers.TypicalLogitsWarper(typical_p),
        {"typical_p": [0.05, 0.2, 0.5, 0.8, 0.95, 0.99]},
    ),
    "epsilon": (
        lambda epsilon_cutoff: transformers.EpsilonLogitsWarper(epsilon_cutoff),
        {"epsilon_cutoff": [3e-4, 0.003, 0.01, 0.05, 0.2, 0.9]},
    ),
    "eta": (
        lambda eta_cutoff: transformers.EtaLogitsWarper(eta_cutoff),
        {"eta_cutoff": [3e-4, 0.004, 0.02, 0.1, 0.4, 0.9]},
    ),
    "top_h": (
        lambda top_h: transformers.TopHLogitsWarper(top_h),
        {"top_h": [0.05, 0.2, 0.4, 0.6, 0.8, 0.95]},
    ),
    "repetition_penalty": (
        lambda repetition_penalty: transformers.RepetitionPenaltyLogitsProcessor(
            repetition_penalty
        ),
        {"repetition_penalty": [0.5, 0.9, 1.0, 1.1, 1.5, 2.0]},
    ),
    "no_repeat_ngram": (
        lambda no_repeat_ngram_size: transformers.NoRepeatNGramLogitsProcessor(
            no_repeat_ngram_size
        ),
        {"no_repeat_ngram_size": [1, 2, 2, 3, 3, 4]},
    ),
    "bad_words": (
        lambda bad_words: transformers.NoBadWordsLogitsProcessor(bad_words),
        # The texts are of tokens 0 to 4, so that some of these are about to be completed.
        {
            "bad_words": [
                [[7]],
                [[a, 20 + a] for a in range(5)],
                [[a, b, 20 + a + b] for a in range(3) for b in range(5)],
                [[a, b, 3 * a + b] for a in range(5) for b in range(5)],
                [[7], [1, 8], [0, 1, 9], [3, 3, 3, 3], [4, 5]],
                [[a, a] for a in range(5)],
            ]
        },
    ),
    "allowed_tokens": (
        lambda allowed_token_ids: transformers.PrefixConstrainedLogitsProcessor(
            lambda batch, text: allowed_token_ids, 1
        ),
        {"allowed_token_ids": [[3], [0, 47], [*range(10)], [5, 5, 6], [*range(48)], [11, 2]]},
    ),
    "guidance": (
        lambda guidance_scale: Guidance(guidance_scale),
        {"guidance_scale": [0.0, 0.5, 1.0, 1.5, 3.0, 7.5]},
    ),
}


class Guidance(transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """Classifier-free guidance with given logits in place of the second forward."""

    def __init__(self, guidance_scale: float) -> None:
        super().__init__(guidance_scale, model=None)
        self.companion: torch.Tensor | None = None

    def get_unconditional_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.companion[:, None]


@torch.no_grad()
def golden_sampling() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Logits, texts, and for every case what its processor makes of each row."""
    rng = np.random.default_rng(7)
    logits = (2 * rng.standard_normal((ROWS, V))).astype(np.float32)
    companion = (2 * rng.standard_normal((ROWS, V))).astype(np.float32)
    texts = rng.integers(0, 5, (ROWS, 24), dtype=np.int64)
    tensors = {"logits": logits, "companion": companion, "texts": texts.astype(np.int32)}
    for case, (make, values) in PROCESSORS.items():
        rows = []
        for row in range(ROWS):
            processor = make(**{name: per_row[row] for name, per_row in values.items()})
            if case == "guidance":
                processor.companion = torch.from_numpy(companion[row : row + 1])
            text, scores = (torch.from_numpy(x[row : row + 1]) for x in (texts, logits))
            rows.append(processor(text, scores.clone())[0].numpy())
        tensors[f"scores.{case}"] = np.stack(rows)
    values = {case: values for case, (_, values) in PROCESSORS.items()}
    detector = object.__new__(transformers.WatermarkDetector)
    detector.greenlist_ratio = 0.25
    green, scored = np.array([5, 30, 60, 100]), np.array([40, 80, 120, 399])
    z = detector._compute_z_score(green, scored)
    p = detector._compute_pval(z)
    tensors |= {"scores.watermark": np.stack([green, scored, z, p]).astype(np.float64)}
    return tensors, {"values": json.dumps(values)}


def make_all() -> dict[str, tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Every golden by its name: tensors and metadata."""
    goldens = {name: golden_random(name, seed) for seed, name in enumerate(CONFIGS)}
    if DEMO.exists():
        goldens["demo"] = golden_demo()
    goldens["rope"] = golden_rope()
    goldens["sampling"] = golden_sampling()
    return goldens


def check(name: str, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> list[str]:
    """What differs between a golden made anew and the file: one line each."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        return [f"{name}: {path.name} is missing"]
    stored = load_file(path)
    with safe_open(path, "np") as file:
        stored_metadata = file.metadata()
    wrong = [f"{name}: {key} differs" for key in metadata if metadata[key] != stored_metadata[key]]
    wrong += [f"{name}: {key} is in one only" for key in sorted(stored.keys() ^ tensors.keys())]
    worst = 0.0
    for key in sorted(stored.keys() & tensors.keys()):
        finite = np.isfinite(stored[key])
        if not key.startswith(("logits.", "rope.", "scores.")):
            if not np.array_equal(stored[key], tensors[key]):
                wrong.append(f"{name}: {key} differs")
            continue
        if not np.array_equal(finite, np.isfinite(tensors[key])):
            wrong.append(f"{name}: {key} has other removed tokens")
            continue
        old, new = stored[key][finite], tensors[key][finite]
        error = float(np.abs(old - new).max() / np.abs(old).max())
        worst = max(worst, error)
        if not error <= TOLERANCE:
            wrong.append(f"{name}: {key} is off by {error:.1e} of the largest, > {TOLERANCE:.0e}")
    print(f"{name}: {'differs' if wrong else 'equal'}, logits within {worst:.1e}")
    return wrong


def main() -> None:
    """Writes the goldens, or with `--check` compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    goldens = make_all()
    if args.check:
        wrong = [line for name, golden in goldens.items() for line in check(name, *golden)]
        if wrong:
            raise SystemExit("\n".join(wrong))
        return
    for name, (tensors, metadata) in goldens.items():
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata={**metadata, **versions})
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
