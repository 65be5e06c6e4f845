"""Adapters around the public API: command line, and later batch files and servers."""
