"""Text that the dense model writes itself, for training that would learn a small calibration set by heart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

_PROMPT = 32  # tokens of a calibration sequence that each text begins with
_TOKENS_AT_ONCE = 1 << 19  # whose keys and values are in memory


@torch.no_grad()
def generate(path: Path, tokens: Tensor, count: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Return ``count`` texts, int64 ``[count, length]``, sampled from the model in ``path`` at temperature one.

    The whole model is loaded for it.

    Args:
        tokens: int64 ``[samples, length]``; each text begins with a piece of one of them.
        seed: of the pieces and of the sampling.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    dice = torch.Generator(device).manual_seed(seed)
    length = tokens.shape[1]
    prompt = min(_PROMPT, length)
    choice = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, length - prompt + 1, (count, 1), generator=choice)
    prompts = tokens[torch.arange(count)[:, None] % len(tokens), starts + torch.arange(prompt)]
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
