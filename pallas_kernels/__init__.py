"""Kernels for LLM inference in JAX: one folder an op, usable without jaxengine.

Every op has an `api.py` to call, a `reference.py` in plain jnp, one file per backend, the shapes
that tests and benchmarks use in `arg_specs.py`, and a `bench.py`.
"""
