"""Measures the engine: `python -m jaxengine.bench --help`."""
