"""A GGUF file in the words of a Hugging Face checkpoint: config, tensors, tokenizer metadata.

Dequantises and names through the `gguf` package (`pip install 'jaxengine[gguf]'`). Knows nothing of
jax.

Source: what llama.cpp's convert_hf_to_gguf.py writes for Llama, Qwen2 and Qwen3.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.errors import ConfigError, UnsupportedModelError, WeightsError
from jaxengine.gguf_header import read_header

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral's files say so, too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`general.architecture` -> Hugging Face architecture."""

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
"""Tensor types that are read; all become the engine's dtype."""

CHUNK_VALUES = 1 << 22
"""Values a thread dequantises at once: 16 MB in float32."""


def is_gguf(path: str | Path) -> bool:
    """Whether the path names a GGUF file."""
    return Path(path).suffix == ".gguf"


class GGUFFile:
    """One GGUF file, memory-mapped.

    Attributes:
      path: Where it is.
      metadata: Numbers, strings and lists, by their keys.
      architecture: `general.architecture`.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
          ConfigError: Without the `gguf` package, for a part of a split model, or no GGUF file.
          UnsupportedModelError: For another architecture.
        """
        self._gguf = _package(path)
        self.metadata, self._tensors = read_header(path)
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self.path = path
        self.architecture = self.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"`general.architecture` of {path} is {self.architecture!r}; supported: "
                f"{', '.join(ARCHITECTURES)}."
            )
        if self.get("split.count", 1) > 1:
            raise ConfigError(
                f"{path} is one of {self.get('split.count')} parts. Merge them with "
                "`llama-gguf-split --merge` and pass the whole file."
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a string, or a list of them."""
        return self.metadata.get(key, default)

    def _own(self, key: str, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", default)

    def _must(self, key: str) -> Any:
        value = self._own(key)
        if value is None:
            raise ConfigError(f"{self.path} does not say `{self.architecture}.{key}`.")
        return value

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """What the model's `config.json` would hold."""
        num_heads = self._must("attention.head_count")
        head_dim = self._own("attention.key_length") or self._own("rope.dimension_count")
        eos = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": self._must("embedding_length"),
            "intermediate_size": self._must("feed_forward_length"),
            "num_hidden_layers": self._must("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._own("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._must("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._own("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": self._must("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": self._dtype(),
            "eos_token_id": list(dict.fromkeys(token for token in eos if token is not None)),
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise WeightsError(f"{self.path} has no tensor {name}.")
        return self._tensors[name].shape

    def _kind(self, name: str) -> Any:
        """The tensor's type; one that is not read is refused."""
        number = self._tensors[name].kind
        known = {kind.value: kind for kind in self._gguf.GGMLQuantizationType}
        kind_name = known[number].name if number in known else f"type {number}"
        if kind_name not in TENSOR_TYPES:
            raise UnsupportedModelError(
                f"{name} of {self.path} is {kind_name}; supported: {', '.join(TENSOR_TYPES)}."
            )
        return known[number]

    def _rows(self, name: str) -> np.ndarray:
        """The tensor as it is stored, bytes `[rows, row_bytes]`; a vector is one row."""
        _, shape, _, start = self._tensors[name]
        num_rows = math.prod(shape[:-1])
        block_len, block_bytes = self._gguf.GGML_QUANT_SIZES[self._kind(name)]
        row_bytes = shape[-1] // block_len * block_bytes
        return self._bytes[start : start + num_rows * row_bytes].reshape(num_rows, row_bytes)

    def _dtype(self) -> str:
        kind = self._kind("token_embd.weight").name
        return {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")

    def _rope_scaling(self) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling()
        kind = self._own("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": self._own("rope.scaling.factor")}
        if original := self._own("rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = original
        return scaling

    def _llama3_scaling(self) -> dict[str, Any]:
        """The parameters from which llama.cpp made its divisors of the frequencies.

        A file holds the divisors alone. All Llama 3 models share the other parameters, so the
        largest divisor is the factor; that they give these divisors again is checked.

        Raises:
          UnsupportedModelError: For divisors of another kind of scaling.
        """
        divisors = self.read("rope_freqs.weight", np.float64)
        factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
        theta = self._own("rope.freq_base", 10000.0)
        rates = theta ** (-np.arange(len(divisors)) / len(divisors))
        turns = original * rates / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / (kept + (1 - kept) / factor)
        if not np.allclose(divisors, expected, rtol=1e-3):
            raise UnsupportedModelError(
                f"`rope_freqs.weight` of {self.path} is not the scaling of Llama 3; supported: "
                "that one, and the linear and YaRN scaling of the metadata."
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def names(self, wanted: Iterable[str]) -> dict[str, str]:
        """Tensors of the file under their Hugging Face names: name -> name in the file.

        Args:
          wanted: Hugging Face names the model has. What the file has beside them keeps its name.
        """
        arch = {value: key for key, value in self._gguf.MODEL_ARCH_NAMES.items()}
        table = self._gguf.get_tensor_name_map(arch[self.architecture], self._must("block_count"))
        named = {name: table.get_name(name, (".weight", ".bias")) for name in wanted}
        found = {name: own for name, own in named.items() if own in self._tensors}
        others = self._tensors.keys() - set(found.values()) - {"rope_freqs.weight"}
        return found | {own: own for own in others}

    def shape(self, own_name: str) -> tuple[int, ...]:
        """Shape of a tensor, in numpy's order."""
        return self._shape(own_name)

    def read(self, own_name: str, dtype: Any) -> np.ndarray:
        """A tensor in Hugging Face's order of rows, dequantised.

        Raises:
          UnsupportedModelError: For a tensor type that is not read.
        """
        rows, kind, shape = self._rows(own_name), self._kind(own_name), self._shape(own_name)
        out = np.empty((len(rows), shape[-1]), dtype)
        step = max(1, CHUNK_VALUES // shape[-1])

        def dequantise(start: int) -> None:
            part = slice(start, start + step)
            out[part] = self._gguf.quants.dequantize(rows[part], kind)

        with ThreadPoolExecutor() as pool:
            list(pool.map(dequantise, range(0, len(rows), step)))
        return self._unpermuted(own_name, out.reshape(shape))

    def _unpermuted(self, own_name: str, rows: np.ndarray) -> np.ndarray:
        """Undoes llama.cpp's order of the query and key rows of Llama files.

        It rotates neighbouring dimensions, (2i, 2i + 1), where transformers rotates (i, i + H/2).
        """
        kind = own_name.split(".")[-2]
        if self.architecture != "llama" or kind not in ("attn_q", "attn_k"):
            return rows
        heads = "num_attention_heads" if kind == "attn_q" else "num_key_value_heads"
        shape = rows.shape
        pairs = rows.reshape(self.raw_config[heads], -1, 2, *shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the `gguf` package: pip install 'jaxengine[gguf]'."
        ) from error
    return gguf
