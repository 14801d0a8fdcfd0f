"""The commands inspect, doctor and serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.formats.checkpoints import write_checkpoint
from tests.formats.encoders import encode
from tests.formats.golden import CASES, config, layer
from tests.plugin.layers import format_of, random_dense, random_hub
from vllm_sparse import cli

MODULE = "model.layers.0.mlp.down_proj"


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def test_inspect_reads_a_native_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = random_hub(32, 256, "w4a16")
    fmt = format_of(weight, ("lm_head",))
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in fmt.from_weight(weight).items()}
    tensors |= {"model.embed_tokens.weight": torch.zeros(8, 32), "lm_head.weight": torch.zeros(8, 32)}
    tensors["model.norm.weight"] = torch.zeros(32)
    lines = inspect(write_checkpoint(tmp_path, tensors, fmt.to_config()), capsys)
    assert len(lines) >= 5
    assert lines[0].split() == ["layer", "n", "x", "k", "scheme", "group", "sparsity", "MB", "kernel"]
    assert lines[1].split() == ["lm_head", "8", "x", "32", "dense", "0.00"]
    assert lines[2].split()[:8] == [MODULE, "32", "x", "256", "w4a16", "128", "2:4", "0.00"]
    assert "format sparse24: 1 of 2 linear layers are 2:4; 0.00 MB, where dense bf16 takes 0.02 MB" in lines


def test_inspect_finds_out_about_a_dense_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    almost = random_dense(16, 64)
    almost[0, :4] = 1
    tensors = {"a.weight": random_dense(16, 64), "b.weight": almost, "c.weight": torch.ones(4, 6).bfloat16()}
    lines = inspect(write_checkpoint(tmp_path, tensors), capsys)
    assert lines[1].split()[:6] == ["a", "16", "x", "64", "bf16", "2:4"]
    assert "not 2:4 in 1 of 256 groups, 50 % zeros" in lines[2]
    assert lines[3].split() == ["c", "4", "x", "6", "dense", "0.00"]
    assert any(line.startswith("format dense: 1 of 3 linear layers are 2:4") for line in lines)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.two_of_four and "legacy" not in case.name], ids=lambda case: case.name
)
def test_inspect_reads_every_published_format(tmp_path: Path, case, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in encode(case, layer(case)).items()}
    lines = inspect(write_checkpoint(tmp_path, tensors, config(case)), capsys)
    assert lines[1].split()[:4] == [MODULE, str(case.n), "x", str(case.k)]
    assert "2:4" in lines[1]


def test_inspect_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = random_hub(32, 64, "fp8")
    fmt = format_of(weight)
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in fmt.from_weight(weight).items()}
    tensors[f"{MODULE}.weight_scale"] = torch.ones(31, 1)
    write_checkpoint(tmp_path, tensors, fmt.to_config())
    assert cli.main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"model.safetensors: {MODULE}: expected weight_scale to be torch.float32 [32, 1]" in error
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such model directory" in capsys.readouterr().err


def test_doctor_tells_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in ("vllm-sparse ", "torch ", "GPU", "CPU", "vllm_sparse._cpu", "vllm_sparse._cuda", "scheme w4a16"):
        assert f"\n{expected}" in f"\n{out}"


def test_serve_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compat = pytest.importorskip("vllm_sparse.plugin.compat")
    given: list[str] = []
    monkeypatch.setattr(compat, "serve", given.extend)
    assert cli.main(["serve", "MODEL", "--port", "1", "--enforce-eager"]) == 0
    assert cli.main(["serve", "--port", "1", "MODEL"]) == 0
    assert given == ["MODEL", "--port", "1", "--enforce-eager", "--port", "1", "MODEL"]


def test_serve_without_vllm_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_sparse.serve.find_spec", lambda name: None)
    assert cli.main(["serve", "MODEL"]) == 2
    assert "vLLM is not installed; install 'vllm'" in capsys.readouterr().err
