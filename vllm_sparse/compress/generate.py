"""Text that the dense model writes itself, for training that would learn a small calibration set by heart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_sparse.compress.sequences import Sequences

_PROMPT = 32  # tokens of a calibration sequence that each text begins with
_TOKENS_AT_ONCE = 1 << 19  # whose keys and values are in memory


@torch.no_grad()
def generate(
    path: Path, sequences: Sequences, count: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Tensor:
    """Return ``count`` texts, int64 ``[count, longest]``, sampled from the model in ``path`` at temperature one.

    The whole model is loaded for it.

    Args:
        sequences: each text begins with a piece of one of them and is as long as the longest.
        seed: of the pieces and of the sampling.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    dice = torch.Generator(device).manual_seed(seed)
    length, shortest = sequences.longest, sequences.shortest
    prompt = min(_PROMPT, shortest)
    choice = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, shortest - prompt + 1, (count,), generator=choice).tolist()
    rows = sequences.rows
    prompts = torch.stack([rows[i % len(rows)][start : start + prompt] for i, start in enumerate(starts)])
    texts = []
    for batch in prompts.to(device).split(max(1, _TOKENS_AT_ONCE // length)):
        written, cache, new = [batch], None, batch
        for _ in range(length - prompt):
            result = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            new = torch.multinomial(result.logits[:, -1].float().softmax(-1), 1, generator=dice)
            written.append(new)
        texts.append(torch.cat(written, 1).cpu())
    return torch.cat(texts)
