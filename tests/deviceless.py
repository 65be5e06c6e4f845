"""Compiles jitted functions for GPUs that this machine does not have, to look at the result.

What XLA made of a step can be asserted anywhere: copies, aliasing, temporary memory, whether the
kernels compile. Autotuned choices and times cannot. Needs the CUDA plugin of jax, without the
run-time wheels: tests that use this carry the marker `deviceless`.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_DEVICE = """
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{feature}"
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock_ghz}
  memory_bandwidth: {bandwidth} device_memory_size: {memory_bytes} l2_cache_size: {l2_bytes}
  shared_memory_per_core: {core_smem} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block_smem}
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_address_bits: 64 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""

_TARGETS = {
    "h200": dict(
        name="NVIDIA H200",
        major=9,
        minor=0,
        feature="a",
        extension="feature_extension: ACCELERATED_FEATURES",
        cores=132,
        fpus=128,
        clock_ghz=1.98,
        bandwidth=4_800_000_000_000,
        memory_bytes=150_000_000_000,
        l2_bytes=60 << 20,
        core_smem=228 << 10,
        block_smem=227 << 10,
    ),
    "a100": dict(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        feature="",
        extension="",
        cores=108,
        fpus=64,
        clock_ghz=1.41,
        bandwidth=2_039_000_000_000,
        memory_bytes=85_000_000_000,
        l2_bytes=40 << 20,
        core_smem=164 << 10,
        block_smem=163 << 10,
    ),
}


@functools.cache
def mesh(target: str = "h200") -> Mesh:
    """A mesh of one absent GPU: "h200" (sm_90a) or "a100" (sm_80)."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_DEVICE.format(**_TARGETS[target]), topology="1x1x1"
    )
    return topologies.make_mesh(topology, (1,), ("x",))


def arg(shape: Sequence[int], dtype: Any, target: str = "h200") -> jax.ShapeDtypeStruct:
    """An abstract argument that lies on the absent GPU."""
    sharding = NamedSharding(mesh(target), PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_for(
    target: str,
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: Sequence[int] = (),
    compiler_options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles `fn`, jitted or not, for abstract arguments from `arg` of the same target.

    The result can be looked at (`as_text`, `memory_analysis`), not run.
    """
    if not hasattr(fn, "lower"):
        fn = jax.jit(fn, donate_argnums=donate_argnums)
    elif donate_argnums:
        raise ValueError("`fn` is jitted already. Give `donate_argnums` to its `jax.jit`.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
        # Kernels ask the abstract mesh which GPU they are lowered for.
        with jax.sharding.use_abstract_mesh(mesh(target).abstract_mesh):
            lowered = fn.lower(*args)
            return lowered.compile(compiler_options)


compile_for_h200 = functools.partial(compile_for, "h200")


class Copy(NamedTuple):
    """A copy that XLA inserted.

    Attributes:
      name: Of the instruction.
      dtype: As XLA writes it ("bf16").
      shape: Of the result.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


def large_copies(compiled: jax.stages.Compiled, min_elements: int = 1 << 20) -> list[Copy]:
    """The copies in a compiled program whose result has at least `min_elements` elements."""
    found = re.findall(
        r"([\w.-]+) = \(?(\w+)\[([\d,]*)\][^=]*? copy(?:-start)?\(", compiled.as_text() or ""
    )
    copies = [
        Copy(name, dtype, tuple(int(size) for size in shape.split(",") if size))
        for name, dtype, shape in found
    ]
    return [copy for copy in copies if math.prod(copy.shape) >= min_elements]
