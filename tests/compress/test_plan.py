"""A dry run says what a run does, and does nothing."""

import re

import pytest

from tests.compress.conftest import make_model
from vllm_sparse.cli import main
from vllm_sparse.compress import compress
from vllm_sparse.compress.pipeline import dry_run

SMALL = {"num_samples": 8, "seq_len": 64, "device": "cpu"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{"scheme": "bf16"}, {"group_size": 32, "ignore": ["re:.*down_proj"]}])
def test_the_planned_bytes_are_the_written_ones(text, tmp_path, tied, options):
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    plan = dry_run(model, tmp_path / "out", calibration=text, **SMALL, **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    report = compress(model, tmp_path / "out", calibration=text, quiet=True, **SMALL, **options)
    assert (plan.bytes_before, plan.bytes_after) == (report.bytes_before, report.bytes_after)
    assert set(plan.dense) == set(report.dense) and plan.tokens == report.calibration["tokens"]
    assert sum(plan.shapes.values()) == len(report.layers) and plan.seconds > plan.block_seconds > 0


def test_what_is_printed(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (
        f"compress {tiny} -o {out} --calibration {text} --num-samples 8 --seq-len 64 --group-size 32 --device cpu"
    )
    assert main([*arguments.split(), "--dry-run", "--ignore", "model.layers.0.mlp.down_proj"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "2:4      13 layers in 2 blocks, w4a16, group size 32: 4 of 64 x 64, 4 of 32 x 64, 4 of 96 x 64, 1 of 64 x 96"
    )
    assert lines[1] == "dense    model.layers.0.mlp.down_proj (0.0 MB), lm_head (0.0 MB)"
    assert lines[2].startswith("bytes    0.2 MB to 0.1 MB") and lines[3] == "memory   0.1 MB of activations"
    assert re.fullmatch(r"time     about 0:0\d on cpu, 0:0\d a block with 512 tokens", lines[4])
    assert lines[5] == "dry run: nothing was written" and not out.exists()


def test_what_a_run_would_refuse_is_refused(tiny, text, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["compress", str(tiny), "-o", str(tmp_path / "full"), "--calibration", str(text), "--dry-run"]) == 2
    assert "the output directory is not empty; use --force to replace it" in capsys.readouterr().err
