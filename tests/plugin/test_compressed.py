"""What ``vllm-sparse compress`` writes, served: the tokens are those of the compressed model in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.plugin.agreement import assert_greedy
from tests.plugin.conftest import PROMPTS
from tests.plugin.mixtures import CONFIGS
from tests.plugin.models import SIZES, save_tokenizer

pytest.importorskip("vllm")


def save_mixture(path: Path, kind: str) -> Path:
    """Write a random mixture that is not sparse at all."""
    torch.manual_seed(0)
    config_class, changes = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | changes)).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.12)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.mark.serve
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {"scheme": "w4a16", "group_size": 32}),
        ("qwen3_moe", {"scheme": "w4a16", "group_size": 32, "format": "dense"}),
    ],
)
def test_compressed_mixture(engine: Any, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    from vllm_sparse.compress import compress
    from vllm_sparse.compress.evaluate import load_dense

    tokens = torch.randint(320, (4, 64), generator=torch.Generator().manual_seed(0))
    model = save_mixture(tmp_path / "model", kind)
    compress(model, tmp_path / "out", calibration=tokens, device="cpu", quiet=True, **options)
    row = ("compressed", "w4a16", f"{kind}, {options.get('format', 'native')}")
    assert_greedy(load_dense(tmp_path / "out"), PROMPTS, engine(tmp_path / "out"), row)
