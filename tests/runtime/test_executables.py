"""What the executable cache needs of the process that loads."""

import importlib
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import serialize_executable

from jaxengine.runtime.executables import ExecutableCache, ProgramSpec
from pallas_kernels.fused_linear import mosaic, tuning
from tests import deviceless


@pytest.mark.parametrize("payload, is_imported", [("calls mosaic_gpu_v2", True), ("a dot", False)])
def test_mosaic_is_imported_before_a_program_with_its_kernels_loads(
    payload: str, is_imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imported.append)
    monkeypatch.setattr(serialize_executable, "deserialize_and_load", lambda *_: tuple(imported))
    cache = ExecutableCache(tmp_path / "cache", "fingerprint")
    spec = ProgramSpec(name="step", fn=lambda: None, args=())
    cache._path(spec).write_bytes(pickle.dumps((payload,)))
    assert cache.load(spec) == (("jax.experimental.mosaic.gpu",) if is_imported else ())


@pytest.mark.deviceless
def test_a_program_with_mosaic_kernels_names_them():
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        config = tuning.ManyRowsConfig(block_n=256)
        return mosaic.fused_linear(x, weight, config=config)

    arrays = [deviceless.arg(shape, jnp.bfloat16) for shape in ((128, 256), (512, 256))]
    compiled = deviceless.compile_for_h200(product, *arrays)
    assert b"mosaic_gpu" in pickle.dumps(serialize_executable.serialize(compiled))
