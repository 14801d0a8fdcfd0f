"""Train a small real Llama, or Qwen2 with its biases, on the standard library, in about two minutes on two cores.

A model that learned something is needed to see what compression costs, and downloading one is not always possible.
Everything is seeded; a wall-clock limit bounds the training on slow machines.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

ARCHITECTURES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
VOCABULARY = 2048
SEQUENCE = 128
BATCH = 16
STEPS = 500
LEARNING_RATE = 4e-3
EVALUATION_SHARE = 16  # one file of this many is never trained on
SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "pydoc_data"}


def source_texts(evaluation: bool) -> list[str]:
    """Return the standard library's Python files of one side of the split, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        digest = hashlib.sha1(str(relative).encode()).digest()[0]
        if SKIPPED.isdisjoint(relative.parts) and (digest % EVALUATION_SHARE == 0) == evaluation:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(architecture: str = "llama") -> PreTrainedModel:
    """Return an untrained model of four layers and 3.7 million parameters; ``architecture`` is llama or qwen2."""
    config = ARCHITECTURES[architecture](
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, tokens: Tensor, seconds: float) -> float:
    """Train on random windows of ``tokens`` until STEPS or ``seconds`` are used up; return the last mean loss."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    start, mean_loss = time.monotonic(), float("nan")
    bar = tqdm(range(STEPS), desc="train", unit="step", mininterval=2)
    for step in bar:
        done = max(step / STEPS, (time.monotonic() - start) / seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 40, math.cos(done * math.pi / 2) ** 2 + 0.01)
        starts = torch.randint(0, len(tokens) - SEQUENCE - 1, (BATCH,))
        window = tokens[starts[:, None] + torch.arange(SEQUENCE + 1)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(window[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.2f}")
    return mean_loss


def main() -> None:
    """Train, and write the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=90, help="wall-clock limit of the training")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    args = parser.parse_args()
    torch.manual_seed(0)
    texts = source_texts(evaluation=False)
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer("\n".join(texts))["input_ids"])
    model = new_model(args.architecture)
    loss = train(model, tokens, args.seconds)
    tokenizer.save_pretrained(args.out)
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"trained on {len(tokens)} tokens, loss {loss:.3f}, perplexity {math.exp(loss):.1f}")


if __name__ == "__main__":
    main()
