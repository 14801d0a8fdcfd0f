"""Calibration text to token sequences of one length. Equal lengths mean that no padding token ever enters H."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import OptionError

_PIECE = 1 << 16  # characters tokenized at once, so that only as much text is read as is needed
_SPARE = 4  # times the tokens needed that are read, so that the choice of sequences is spread over the text


def load_calibration(source: str | Path, tokenizer: Any, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Return token ids int64 ``[samples, seq_len]`` of ``source``; fewer than ``num_samples`` when it is short.

    Args:
        source: a text file, a directory of them, a .jsonl file (``text``, ``content`` or ``messages``), or the id of a
            Hugging Face dataset, whose ``train`` split is streamed (``id:config`` chooses a configuration).

    Raises:
        OptionError: there is no such source, or it holds less than one sequence of text.
    """
    pieces = _pieces(source, tokenizer, seed)
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= _SPARE * num_samples * seq_len:
            break
    count = len(ids) // seq_len
    if not count:
        what = "no text" if not ids else f"only {len(ids)} tokens, less than one sequence of {seq_len}"
        raise OptionError(f"calibration {source}: {what}")
    sequences = torch.tensor(ids[: count * seq_len]).view(count, seq_len)
    chosen = sorted(random.Random(seed).sample(range(count), min(count, num_samples)))
    return sequences[chosen]


def fingerprint(ids: Tensor) -> str:
    """Return a hash of token ids, so that a report says which tokens were used."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]


def _pieces(source: str | Path, tokenizer: Any, seed: int) -> Iterator[str]:
    """Yield documents, long ones in parts, in an order that depends on ``seed`` alone."""
    path = Path(source)
    if not path.exists():
        yield from _dataset(str(source), tokenizer, seed)
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    order = random.Random(seed)
    order.shuffle(files)
    for file in files:
        documents = _jsonl(file, tokenizer) if file.suffix == ".jsonl" else _text(file)
        parts = [text[i : i + _PIECE] for text in documents for i in range(0, len(text), _PIECE)]
        order.shuffle(parts)
        yield from parts


def _text(file: Path) -> list[str]:
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError:
        return []  # a directory of text may hold other files
    except OSError as error:
        raise OptionError(f"calibration {file}: cannot be read ({error})") from error


def _jsonl(file: Path, tokenizer: Any) -> list[str]:
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                texts.append(_record_text(json.loads(line), tokenizer))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise OptionError(
                    f"calibration {file}, line {number}: expected an object with text, content or messages"
                ) from error
    return texts


def _record_text(record: dict[str, Any], tokenizer: Any) -> str:
    if "messages" in record:
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    text = record["text"] if "text" in record else record["content"]
    if not isinstance(text, str):
        raise TypeError("text is no string")
    return text


def _dataset(name: str, tokenizer: Any, seed: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise OptionError(
            f"calibration {name}: no such file or directory; for a Hugging Face dataset install the package 'datasets'"
        ) from error
    dataset, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    except Exception as error:  # the library raises its own and its network layer's errors
        raise OptionError(f"calibration {name}: neither a file nor a dataset that can be loaded ({error})") from error
    for row in rows.shuffle(seed=seed, buffer_size=1000):
        try:
            yield _record_text(row, tokenizer)
        except (KeyError, TypeError) as error:
            raise OptionError(f"calibration {name}: its rows have no text, content or messages") from error
