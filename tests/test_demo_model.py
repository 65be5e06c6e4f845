"""The embedded demo model is whole, small and well formed, and its training script works."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import jaxengine
from jaxengine.models import MODELS
from tests.oracle import bound_model, params_from_tensors

FOLDER = Path(jaxengine.DEMO_MODEL)
SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo_model.py"
# From the held-out tenth of the text: the model was neither trained nor chosen on it.
HELD_OUT_SPEECHES = """\
BAPTISTA:
Was ever gentleman thus grieved as I?
But who comes here?

GREMIO:
Good morrow, neighbour Baptista.

BAPTISTA:
Good morrow, neighbour Gremio.
God save you, gentlemen!

PETRUCHIO:
And you, good sir! Pray, have you not a daughter
Call'd Katharina, fair and virtuous?

BAPTISTA:
I have a daughter, sir, called Katharina.
"""


def read_json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    pytest.importorskip("optax")
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_demo_folder_is_small_and_complete():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_demo_config_is_a_grouped_tied_qwen2():
    raw = read_json("config.json")
    config = MODELS[raw["architectures"][0]].parse_config(raw)
    assert config.head_dim == 64
    assert config.num_kv_heads < config.num_heads
    assert config.tie_word_embeddings
    assert 2000 <= config.vocab_size <= 4000
    assert config.dtype == "bfloat16"


def test_demo_weights_are_bfloat16_under_the_names_of_the_family():
    raw = read_json("config.json")
    family = MODELS["Qwen2ForCausalLM"]
    tensors = load_file(FOLDER / "model.safetensors")
    parts = family.weight_parts(family.parse_config(raw))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: part.shape for name, part in parts.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())


def test_demo_end_tokens_agree(tokenizer: Any):
    ids = [tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")]
    assert tokenizer.eos_token_id == ids[0]
    assert tokenizer.pad_token_id == ids[1]
    assert read_json("config.json")["eos_token_id"] == ids[0]
    assert read_json("generation_config.json")["eos_token_id"] == ids
    assert len(tokenizer) == read_json("config.json")["vocab_size"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ROMEO:\nO, she doth teach\n\n\tthe torches  to burn bright!  \r\n",
        "naïve café Ω 日本語 🦙🏽 \u200d \x00 ｶﾞ",
        "<|im_start|>user\nwho<|im_end|>\n<|endoftext|>",
    ],
)
def test_demo_tokenizer_round_trips(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_demo_tokenizer_adds_nothing_and_normalises_like_qwen2(tokenizer: Any):
    assert tokenizer("").input_ids == []
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_demo_chat_template_is_chatml(tokenizer: Any):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    closed = tokenizer.apply_chat_template(messages[1:], tokenize=False)
    assert closed == "<|im_start|>user\nWho?<|im_end|>\n"


def test_demo_model_predicts_text_it_never_saw(script: SimpleNamespace):
    config = MODELS["Qwen2ForCausalLM"].parse_config(read_json("config.json"))
    params = params_from_tensors(config, load_file(FOLDER / "model.safetensors"))
    tokenizer = script.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    recipe = script.Recipe(seq_len=256, batch=1)
    bits_per_byte = script.make_bits_per_byte(bound_model(config), tokenizer, recipe)
    assert bits_per_byte(params, HELD_OUT_SPEECHES) < 2.8


def test_training_script_learns_and_saves(script: SimpleNamespace, tmp_path: Path):
    corpus = script.Corpus(HELD_OUT_SPEECHES * 3, HELD_OUT_SPEECHES, HELD_OUT_SPEECHES)
    recipe = script.Recipe(
        vocab_size=320,
        num_layers=1,
        intermediate_size=64,
        seq_len=32,
        batch=4,
        steps=20,
        steps_per_dispatch=10,
        learning_rate=1e-2,
        copies=2,
    )
    model, params, bits = script.make_model(corpus, tmp_path, recipe)
    uniform_bits = np.log2(320)  # per token, so per byte at most
    assert bits < uniform_bits / 2
    config = MODELS["Qwen2ForCausalLM"].parse_config(
        json.loads((tmp_path / "config.json").read_text())
    )
    assert config == model.config
    loaded = params_from_tensors(config, load_file(tmp_path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FOLDER.iterdir()}
