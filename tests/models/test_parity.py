"""Logits equal transformers' in float32: whole prefill, chunked prefill, token by token."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors import safe_open

import jaxengine
from jaxengine.config import ModelConfig
from jaxengine.models import MODELS
from jaxengine.models.family import Params
from tests.oracle import params_from_tensors, run_prefill

GOLDEN = Path(__file__).parent.parent / "golden"
DEMO = Path(jaxengine.DEMO_MODEL)
# The other golden files are about sampling and rotary frequencies.
NAMES = sorted({path.stem for path in GOLDEN.glob("*.safetensors")} - {"rope", "sampling"})
RELATIVE_ERROR = 1e-4

WHOLE, CHUNKED, TOKEN_BY_TOKEN = 128, 5, 1
CHUNK_LENS = pytest.mark.parametrize("chunk_len", [WHOLE, CHUNKED, TOKEN_BY_TOKEN])
# Whole prompts are a program more and run the same layers: Qwen2 and the demo model will do.
FLAGS = ("llama_llama3", "mistral_linear", "qwen2_yarn", "qwen3")
CASES = [(name, length) for name in NAMES for length in (WHOLE, CHUNKED, TOKEN_BY_TOKEN)]
CASES = [(name, length) for name, length in CASES if length != WHOLE or name not in FLAGS]


class Golden(NamedTuple):
    config: ModelConfig
    params: Params
    prompts: list[np.ndarray]
    positions: list[np.ndarray]
    logits: list[np.ndarray]


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "flax") as file:  # numpy has no bfloat16
        tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
        return tensors, file.metadata() or {}


def parse_config(values: dict) -> ModelConfig:
    return MODELS[values["architectures"][0]].parse_config(values)


def golden_from(tensors: dict[str, np.ndarray], config: ModelConfig, params: Params) -> Golden:
    prompts = [tensors[f"input_ids.{i}"] for i in range(100) if f"input_ids.{i}" in tensors]
    positions = [tensors.get(f"positions.{i}", np.arange(len(p))) for i, p in enumerate(prompts)]
    logits = [tensors[f"logits.{i}"] for i in range(len(prompts))]
    return Golden(config, params, prompts, positions, logits)


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    tensors, metadata = read_tensors(GOLDEN / f"{request.param}.safetensors")
    if request.param != "demo":
        config = parse_config(json.loads(metadata["config"]))
        return golden_from(tensors, config, params_from_tensors(config, tensors))
    weights_path = DEMO / "model.safetensors"
    assert hashlib.sha256(weights_path.read_bytes()).hexdigest() == metadata["weights_sha256"], (
        "the demo model was trained anew: run tests/golden/make_golden.py"
    )
    config = parse_config(json.loads((DEMO / "config.json").read_text()))
    return golden_from(tensors, config, params_from_tensors(config, read_tensors(weights_path)[0]))


def assert_logits_match(golden: Golden, chunk_len: int):
    got = run_prefill(golden.params, golden.config, golden.prompts, chunk_len)
    for mine, where, theirs in zip(got, golden.positions, golden.logits, strict=True):
        assert np.isfinite(mine).all()
        error = np.abs(mine[where] - theirs).max() / np.abs(theirs).max()
        assert error <= RELATIVE_ERROR


@pytest.mark.parametrize(("golden", "chunk_len"), CASES, indirect=["golden"])
def test_logits_match_golden_files(golden: Golden, chunk_len: int):
    assert_logits_match(golden, chunk_len)


@pytest.mark.gpu
@CHUNK_LENS
@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_logits_match_transformers_live(name: str, chunk_len: int):
    pytest.importorskip("torch")
    assert jax.default_backend() == "gpu"
    from tests.golden.make_golden import golden_random

    tensors, metadata = golden_random(name, seed=1234)
    config = parse_config(json.loads(metadata["config"]))
    params = params_from_tensors(config, tensors)
    assert_logits_match(golden_from(tensors, config, params), chunk_len)


@pytest.mark.gpu
@CHUNK_LENS
def test_logits_match_golden_files_on_gpu(golden: Golden, chunk_len: int):
    assert jax.default_backend() == "gpu"
    assert_logits_match(golden, chunk_len)
