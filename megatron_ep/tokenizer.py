"""Tokenizers: from text to token ids and back, in the form that Megatron's data sets expect.

ByteTokenizer         built in: one token per byte
HuggingFaceTokenizer  a tokenizer.json, a directory or a name of the hub
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ep.config import ConfigError
from megatron_ep.config.schema import TokenizerSection


class Tokenizer(Protocol):
    """What data sets, preprocessing and generation use.

    Attributes:
        vocab_size: number of token ids.
        eod: token that ends documents.
        pad: token without loss; -1 is none.
        unique_identifiers: part of the key of cached index files.
    """

    vocab_size: int
    eod: int
    pad: int
    unique_identifiers: dict[str, Any]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids; what is not text becomes a replacement character."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0-255, and 256 for the end of a document.

    Example:
        >>> ByteTokenizer().tokenize("hé")
        [104, 195, 169]
    """

    vocab_size = 257
    eod = 256
    pad = -1

    def __init__(self) -> None:
        self.unique_identifiers: dict[str, Any] = {"class": "ByteTokenizer"}

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the package transformers or, for a tokenizer.json, of tokenizers.

    Args:
        model: path of a tokenizer.json, directory, or name of the hub.
        eod_token: token that ends documents; None takes the tokenizer's own.

    Raises:
        ImportError: neither package can read it; the message says which to install.
        ValueError: no such end-of-document token.
    """

    pad = -1

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        path = Path(model)
        json_file = path / "tokenizer.json" if path.is_dir() else path
        self.unique_identifiers: dict[str, Any] = {"class": type(self).__name__, "model": model}
        if importlib.util.find_spec("transformers") is not None:
            self._open_transformers(model, eod_token)
        elif json_file.is_file() and importlib.util.find_spec("tokenizers") is not None:
            self._open_tokenizers(json_file, eod_token)
        else:
            wanted = "tokenizers (or transformers)" if json_file.is_file() else "transformers"
            raise ImportError(
                f"tokenizer_type 'huggingface' with {model!r} needs the package {wanted}: "
                f"pip install {wanted.split()[0]}; tokenizer_type 'byte' needs none"
            )

    def _open_transformers(self, model: str, eod_token: str | None) -> None:
        transformers = importlib.import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        eod = tokenizer.eos_token_id
        if eod_token is not None:
            eod = tokenizer.get_vocab().get(eod_token)
        self.eod = self._check_eod(eod, model, eod_token)
        self.vocab_size = len(tokenizer)
        self._tokenizer: Any = tokenizer

    def _open_tokenizers(self, json_file: Path, eod_token: str | None) -> None:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(json_file))
        names = [eod_token] if eod_token else ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"]
        ids = [tokenizer.token_to_id(name) for name in names]
        eod = next((i for i in ids if i is not None), None)
        self.eod = self._check_eod(eod, str(json_file), eod_token)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._tokenizer = tokenizer

    @staticmethod
    def _check_eod(eod: int | None, model: str, eod_token: str | None) -> int:
        if eod is None:
            asked = f"no token {eod_token!r}" if eod_token else "no end-of-document token"
            raise ValueError(f"{model} has {asked}; name one with eod_token")
        return eod

    def tokenize(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return getattr(encoded, "ids", encoded)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def make_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer that the configuration names."""
    if section.tokenizer_type == "byte":
        return ByteTokenizer()
    return HuggingFaceTokenizer(section.tokenizer_model or "", section.eod_token)


def model_vocab_size(section: TokenizerSection, tokenizer: Tokenizer) -> int:
    """Token ids that the model has room for, before padding.

    Raises:
        ConfigError: tokenizer.vocab_size is less than the tokenizer has.
    """
    if section.vocab_size is None:
        return tokenizer.vocab_size
    if section.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size = {section.vocab_size} is less than the {tokenizer.vocab_size} "
            "token ids of the tokenizer"
        )
    return section.vocab_size


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel_size: int) -> int:
    """The vocabulary size, rounded up so that every tensor-parallel rank has the same share.

    Example:
        >>> padded_vocab_size(257, divisible_by=64, tensor_parallel_size=2)
        384
    """
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
