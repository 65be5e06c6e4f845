"""Writes the golden logits that the parity tests compare with, using transformers and torch.

    python tests/golden/make_golden.py           writes the files anew
    python tests/golden/make_golden.py --check   makes them anew and compares with those on disk

Runs in an environment of its own (torch, transformers, safetensors; no jax). One safetensors file
per model holds the weights under their Hugging Face names, the prompts as `input_ids.<i>` and the
float32 logits as `logits.<i>`; its metadata holds the config and the versions. The weights are
stored as float16, which loses nothing: they were rounded to it before the logits were computed.
The demo model's own weights are not stored again, only their SHA-256, and logits for a few
positions (`positions.<i>`).
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
    model_config = transformers.Qwen2Config.from_dict(values)
    model_config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(model_config).eval().float()
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


def make_all() -> dict[str, tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Every golden by its name: tensors and metadata."""
    goldens = {name: golden_random(name, seed) for seed, name in enumerate(CONFIGS)}
    if DEMO.exists():
        goldens["demo"] = golden_demo()
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
        if not key.startswith("logits."):
            if not np.array_equal(stored[key], tensors[key]):
                wrong.append(f"{name}: {key} differs")
            continue
        error = float(np.abs(stored[key] - tensors[key]).max() / np.abs(stored[key]).max())
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
