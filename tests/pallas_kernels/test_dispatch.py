"""Which implementation of an op runs, and what is said about it."""

import logging
from typing import NoReturn

import jax
import pytest

from pallas_kernels import dispatch


def refuse() -> NoReturn:
    raise NotImplementedError("too wide")


@pytest.fixture(autouse=True)
def nothing_logged_yet(caplog: pytest.LogCaptureFixture):
    dispatch._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="pallas_kernels")


@pytest.mark.parametrize("backend, want", [("cpu", "reference"), ("gpu", "triton")])
def test_default_follows_the_backend(
    backend: str, want: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    implementations = {"reference": lambda: "reference", "triton": lambda: "triton"}
    for _ in range(2):
        assert dispatch.call("op", implementations, None) == want
    assert caplog.messages == [f"op: {want}"]


def test_default_falls_back_and_gives_the_reason_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(2):
        got = dispatch.call("op", {"reference": lambda: "reference", "triton": refuse}, None)
        assert got == "reference"
    assert caplog.messages == ["op: reference, not triton: too wide"]


def test_an_op_names_what_it_prefers_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    implementations = {"reference": lambda: "reference", "mosaic": lambda: "mosaic"}
    assert dispatch.call("op", implementations, None, on_gpu="mosaic") == "mosaic"
    assert caplog.messages == ["op: mosaic"]


def test_explicit_choice_never_falls_back():
    implementations = {"reference": lambda: "reference", "triton": refuse}
    with pytest.raises(NotImplementedError, match="too wide"):
        dispatch.call("op", implementations, "triton")
    with pytest.raises(ValueError, match=r"one of \['reference', 'triton'\] or None. Got 'cuda'"):
        dispatch.call("op", implementations, "cuda")
