"""llm-compressor on given tokens, run by accuracy.py in an environment of its own.

Usage: python accuracy_rival.py MODEL TOKENS.pt OUT, with int64 token ids [samples, length] in TOKENS.pt. Writes two
dense models, OUT/sparsegpt and OUT/sparsegpt-gptq-remasked (W4A16 g128, zeroed again where SparseGPT had pruned, since
GPTQ fills 2:4 groups up), and OUT/rival.json with seconds and the share of groups that GPTQ broke.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.offload import remove_dispatch
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.utils.dev import get_main_device
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = ["re:.*lm_head"]


def save(model: torch.nn.Module, names: set[str], source: Path, out: Path) -> None:
    """Write the tensors the source model has; what the rival adds to the model is left out."""
    out.mkdir(parents=True)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name in names}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((source / file).read_bytes())


def run(model: torch.nn.Module, tokenizer: object, tokens: torch.Tensor, modifier: object) -> float:
    """Apply one modifier with the rival's defaults, the given tokens in the given order; return seconds."""
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    started = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=[modifier],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    seconds = time.monotonic() - started
    # Where it found a GPU, every access to a weight would go on giving a copy there, and changes to it would be lost.
    remove_dispatch(model)
    return seconds


def main(source: Path, tokens: torch.Tensor, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    names = set(model.state_dict()) - {"lm_head.weight"}
    result = {"version": __version__, "device": get_main_device().type, "threads": torch.get_num_threads()}
    sparsegpt = SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=IGNORE)
    result["sparsegpt_seconds"] = run(model, tokenizer, tokens, sparsegpt)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    masks = {name: m.weight.detach() != 0 for name, m in linears.items()}
    save(model, names, source, out / "sparsegpt")
    gptq = GPTQModifier(targets=["Linear"], scheme="W4A16", ignore=IGNORE)
    result["gptq_seconds"] = run(model, tokenizer, tokens, gptq)
    broken = total = 0
    for name, linear in linears.items():
        groups = (linear.weight.detach() != 0).unflatten(1, (-1, 4)).sum(-1)
        broken, total = broken + int((groups > 2).sum()), total + groups.numel()
        linear.weight.data *= masks[name]
    result["groups_broken_by_gptq"] = broken / total
    save(model, names, source, out / "sparsegpt-gptq-remasked")
    (out / "rival.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.load(sys.argv[2]), Path(sys.argv[3]))
