"""A run that is killed goes on where it was, and writes what it would have written."""

import json
import signal

import pytest

from tests.compress.conftest import make_model, run_and_kill
from vllm_sparse.compress import compress
from vllm_sparse.errors import FormatError, OutputError

SMALL = {"num_samples": 8, "seq_len": 64, "quiet": True, "device": "cpu", "group_size": 32, "resume": True}
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


def weights(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors*"))}


@pytest.mark.parametrize("options", [{}, {"refine": 2}, {"residual": 0.5}])
def test_a_killed_run_resumes_to_the_same_bytes(model, text, tmp_path, options, capfd):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run that is killed
    try:
        compress(model, tmp_path / "whole", calibration=text, **SMALL, **options)
        told = ", ".join(["resume=True", *(f"{name}={value}" for name, value in options.items())])
        run_and_kill(model, tmp_path / "out", text, signal.SIGKILL, after=10, options=told)  # in the second block
        manifest = json.loads((tmp_path / ".out.partial/manifest.json").read_text())
        assert len(manifest["blocks"]) == 1 and len(manifest["blocks"][0]["layers"]) == 7
        run_and_kill(model, tmp_path / "out", text, signal.SIGTERM, after=10, options=told)  # now in the third
        capfd.readouterr()
        report = compress(model, tmp_path / "out", calibration=text, **(SMALL | {"quiet": False}), **options)
    finally:
        torch.set_num_threads(threads)
    assert "block 1 is finished" in capfd.readouterr().err
    assert len(report.layers) == 7 * BLOCKS and report.verification.layers == 7 * BLOCKS
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert len(weights(tmp_path / "out")) == BLOCKS + 2  # one shard each, one for the rest, and the index
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out" / "manifest.json").exists()
    whole = json.loads((tmp_path / "whole/report.json").read_text())
    assert json.loads((tmp_path / "out/report.json").read_text())["layers"] == whole["layers"]


def test_a_run_with_other_choices_is_not_continued(model, text, tmp_path):
    run_and_kill(model, tmp_path / "out", text, signal.SIGKILL, after=8, options="resume=True")
    for changed, message in (
        ({"iterations": 3}, r"was begun with iterations 20 and cannot be resumed with 3; delete it to begin anew"),
        ({"num_samples": 9}, r"was begun with calibration '\w+' and cannot be resumed with"),
    ):
        with pytest.raises(OutputError, match=message):
            compress(model, tmp_path / "out", calibration=text, **(SMALL | changed))
    assert (tmp_path / ".out.partial/manifest.json").is_file()  # what was done is still there


def test_a_shard_that_was_lost_or_a_manifest_that_is_none_is_named(model, text, tmp_path):
    run_and_kill(model, tmp_path / "out", text, signal.SIGKILL, after=8, options="resume=True")
    shard = tmp_path / ".out.partial/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"shard-00000.safetensors: missing, truncated or not a safetensors file"):
        compress(model, tmp_path / "out", calibration=text, **SMALL)
    (tmp_path / ".out.partial/manifest.json").write_text("{}")
    with pytest.raises(FormatError, match=r"manifest.json: not a manifest of blocks; delete .* to begin anew"):
        compress(model, tmp_path / "out", calibration=text, **SMALL)


def test_resuming_without_an_earlier_run_begins_one(model, tmp_path):
    compress(model, tmp_path / "out", pruner="magnitude", quantizer="rtn", **SMALL)
    assert len(weights(tmp_path / "out")) == BLOCKS + 2 and not list(tmp_path.glob(".*"))
