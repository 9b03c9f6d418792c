"""Makes Megatron's .bin/.idx data files from text.

    python -m megatron_ep.preprocess --input book.txt notes/ --suffix .txt .md --output data/books
    python -m megatron_ep.preprocess --input corpus.jsonl --json-key text --output data/corpus

A text file is one document, a .jsonl file one document per line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ep.config.schema import TokenizerSection
from megatron_ep.cpu_compat import enable_cpu
from megatron_ep.ranks import ignore_known_warnings, leave
from megatron_ep.tokenizer import Tokenizer, make_tokenizer


class PreprocessError(ValueError):
    """Input that cannot be made into data; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was written.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, end-of-document tokens among them.
        skipped: files and lines without text, or passed over.
    """

    documents: int
    tokens: int
    skipped: int


def find_files(inputs: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that the inputs name; directories are searched for the suffixes, in sorted order.

    Raises:
        PreprocessError: an input does not exist, or nothing was found.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise PreprocessError(f"{name}: no such file or directory")
    if not files:
        raise PreprocessError(f"no file with suffix {' or '.join(suffixes)} in {', '.join(inputs)}")
    return files


def read_documents(
    path: Path, *, json_key: str, skip_undecodable: bool = False
) -> Iterator[str | None]:
    """The documents of a file, byte for byte; a .jsonl file has one on each line.

    Args:
        path: the file.
        json_key: where the text of a .jsonl line is.
        skip_undecodable: give None for a text file or a line that is not UTF-8.

    Raises:
        PreprocessError: the file cannot be read; a line is not JSON or has no text under the key;
            something is not UTF-8.
    """
    try:
        if path.suffix != ".jsonl":
            yield _decode(path.read_bytes(), str(path), skip_undecodable=skip_undecodable)
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path}:{number}"
                text = _decode(line, place, skip_undecodable=skip_undecodable)
                if text is None or text.strip():
                    yield None if text is None else _json_text(text, json_key, place)
    except OSError as error:
        raise PreprocessError(f"{path}: {error.strerror}") from None


def _decode(data: bytes, place: str, *, skip_undecodable: bool) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return None
        raise PreprocessError(f"{place}: not UTF-8 at byte {error.start}") from None


def _json_text(line: str, key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PreprocessError(f"{place}: not JSON: {error}") from None
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise PreprocessError(f"{place}: no text under {key!r} (there is: {keys})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise PreprocessError(f"{place}: half a surrogate pair, {found}") from None
    return text


def write_dataset(
    files: Iterable[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    append_eod: bool = True,
    json_key: str = "text",
    skip_undecodable: bool = False,
    progress: bool = False,
) -> Summary:
    """Writes <prefix>.bin and <prefix>.idx; neither exists before both are complete.

    Args:
        files: text and .jsonl files.
        prefix: path without suffix; directories are made.
        tokenizer: makes tokens of text.
        append_eod: end each document with the token for it.
        json_key: where the text of a .jsonl line is.
        skip_undecodable: pass over text files and .jsonl lines that are not UTF-8.
        progress: show a progress bar.

    Raises:
        PreprocessError: unreadable input, or no text in it.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tqdm import tqdm

    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial_bin, partial_idx = (f"{prefix}.{os.getpid()}.{end}" for end in ("bin", "idx"))
    builder = IndexedDatasetBuilder(partial_bin, dtype=DType.optimal_dtype(tokenizer.vocab_size))
    documents = tokens = skipped = 0
    try:
        for path in tqdm(list(files), unit="file", disable=not progress, desc=str(prefix)):
            for text in read_documents(path, json_key=json_key, skip_undecodable=skip_undecodable):
                ids = tokenizer.tokenize(text or "")
                if not ids:
                    skipped += 1
                    continue
                if append_eod:
                    ids.append(tokenizer.eod)
                builder.add_document(np.array(ids), [len(ids)])
                documents, tokens = documents + 1, tokens + len(ids)
        if not documents:
            raise PreprocessError("the input contains no text")
        builder.finalize(partial_idx)
        os.replace(partial_bin, f"{prefix}.bin")
        os.replace(partial_idx, f"{prefix}.idx")
    finally:
        builder.data_file.close()
        for leftover in (partial_bin, partial_idx):
            Path(leftover).unlink(missing_ok=True)
    return Summary(documents=documents, tokens=tokens, skipped=skipped)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.preprocess",
        description="Makes Megatron's .bin/.idx data files from text files or JSON lines.",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files and directories")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    add("--suffix", nargs="+", default=[".txt", ".jsonl"], help="files to take from directories")
    add("--json-key", default="text", help="where the text of a JSON line is")
    add("--tokenizer-type", choices=["byte", "huggingface"], default="byte")
    add("--tokenizer-model", help="tokenizer.json, directory or hub name, for huggingface")
    add("--eod-token", help="token that ends documents; that of the tokenizer if not given")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    add("--skip-undecodable", action="store_true", help="pass over what is not UTF-8")
    add("--no-progress-bar", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    ignore_known_warnings()
    enable_cpu()
    section = TokenizerSection(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        eod_token=options.eod_token,
    )
    try:
        summary = write_dataset(
            find_files(options.input, options.suffix),
            options.output,
            make_tokenizer(section),
            append_eod=options.append_eod,
            json_key=options.json_key,
            skip_undecodable=options.skip_undecodable,
            progress=not options.no_progress_bar,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(  # noqa: T201
        f"{options.output}.bin/.idx: {summary.documents} documents, {summary.tokens} tokens"
        + (f", {summary.skipped} skipped" if summary.skipped else "")
    )
    return 0


if __name__ == "__main__":
    leave(main())
