"""Calibration text to token sequences: of one length where it is running text, and one for each conversation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.errors import OptionError

_PIECE = 1 << 16  # characters tokenized at once, so that only as much text is read as is needed
_SPARE = 4  # times the tokens needed that are read, so that the choice of sequences is spread over the text


@dataclass(frozen=True)
class _Piece:
    """Text to tokenize: a part of a document, which others may follow, or a whole conversation."""

    text: str
    conversation: bool = False


def load_calibration(source: str | Path, tokenizer: Any, num_samples: int, seq_len: int, seed: int) -> Sequences:
    """Return ``num_samples`` sequences of ``source``; fewer when it is short.

    Documents are put one after the other and cut into sequences of ``seq_len`` tokens. A conversation (``messages``)
    is a sequence of its own, of whatever length it has, or its first ``seq_len`` tokens.

    Args:
        source: a text file, a directory of them, a .jsonl file (``text``, ``content`` or ``messages``), or the id of a
            Hugging Face dataset, whose ``train`` split is streamed (``id:config`` chooses a configuration).

    Raises:
        OptionError: there is no such source, or it holds no conversation and less than one sequence of text.
    """
    ids: list[int] = []
    conversations: list[Tensor] = []
    for piece in _pieces(source, tokenizer, seed):
        new = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        if piece.conversation:
            conversations += [torch.tensor(new[:seq_len])] if new else []
        else:
            ids += new
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
        if len(ids) + len(conversations) * seq_len >= _SPARE * num_samples * seq_len:
            break
    count = len(ids) // seq_len
    found = [*torch.tensor(ids[: count * seq_len]).view(count, seq_len), *conversations]
    if not found:
        what = "no text" if not ids else f"only {len(ids)} tokens, less than one sequence of {seq_len}"
        raise OptionError(f"calibration {source}: {what}")
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(len(found), num_samples)))
    return Sequences(tuple(found[i] for i in chosen))


def _pieces(source: str | Path, tokenizer: Any, seed: int) -> Iterator[_Piece]:
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
        parts = [part for document in documents for part in _parts(document)]
        order.shuffle(parts)
        yield from parts


def _parts(document: _Piece) -> list[_Piece]:
    """Return a long text in parts. A conversation begins where it begins."""
    if document.conversation:
        return [document]
    return [_Piece(document.text[i : i + _PIECE]) for i in range(0, len(document.text), _PIECE)]


def _text(file: Path) -> list[_Piece]:
    try:
        return [_Piece(file.read_text(encoding="utf-8"))]
    except UnicodeDecodeError:
        return []  # a directory of text may hold other files
    except OSError as error:
        raise OptionError(f"calibration {file}: cannot be read ({error})") from error


def _jsonl(file: Path, tokenizer: Any) -> list[_Piece]:
    pieces = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                pieces.append(_record(json.loads(line), tokenizer, f"{file}, line {number}"))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise OptionError(
                    f"calibration {file}, line {number}: expected an object with text, content or messages"
                ) from error
    return pieces


def _record(record: dict[str, Any], tokenizer: Any, where: str) -> _Piece:
    if "messages" in record:
        if getattr(tokenizer, "chat_template", None) is None:
            raise OptionError(f"calibration {where}: has messages, but the model's tokenizer has no chat template")
        try:
            return _Piece(str(tokenizer.apply_chat_template(record["messages"], tokenize=False)), conversation=True)
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OptionError(
                f"calibration {where}: the chat template does not take its messages ({reason})"
            ) from error
    text = record["text"] if "text" in record else record["content"]
    if not isinstance(text, str):
        raise TypeError("text is no string")
    return _Piece(text)


def _dataset(name: str, tokenizer: Any, seed: int) -> Iterator[_Piece]:
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
            yield _record(row, tokenizer, name)
        except (KeyError, TypeError) as error:
            raise OptionError(f"calibration {name}: its rows have no text, content or messages") from error
