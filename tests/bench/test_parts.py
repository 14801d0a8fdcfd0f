"""Parts of the benchmark whose rules a user can check by hand."""

import io
import json

import pytest

from vllm_sparse.bench import accuracy, machine, process
from vllm_sparse.bench.progress import Progress
from vllm_sparse.bench.serving import sustained
from vllm_sparse.bench.summary import Figure
from vllm_sparse.bench.targets import dummy_targets, dummy_variants, parse_targets
from vllm_sparse.bench.use_cases import USE_CASES, select
from vllm_sparse.errors import OptionError
from vllm_sparse.formats import detect


def test_the_seven_use_cases():
    assert [(case.prompt, case.output) for case in USE_CASES] == [
        (256, 1024), (768, 128), (1024, 1024), (1024, 128), (256, 128), (512, 256), (4096, 512),
    ]  # fmt: skip
    assert [(case.prompt, case.output) for case in select(["rag"], 0.1)] == [(102, 13)]
    with pytest.raises(OptionError, match=r"unknown use case 'x': expected one of code-completion, "):
        select(["x"], 1)


def test_medians_come_with_their_spread():
    assert Figure.of([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0, 3)
    assert Figure(2.0, 1.0, 3.0, 3).spread == 0.5
    assert Figure.of([]) is None


@pytest.mark.parametrize(("duration", "kept_up"), [(10.0, True), (11.9, True), (12.1, False)])
def test_a_rate_is_sustained_when_the_requests_end_soon_after_the_last_was_sent(duration, kept_up):
    row = {"failed": 0, "rate": 2.0, "requests": 20, "duration": duration}
    assert sustained(row, single_seconds=1 / 3) is kept_up
    assert not sustained(row | {"failed": 1}, 100.0)


def test_every_dummy_variant_is_a_model_directory(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": 50, "quantization_config": {"quant_method": "gone"}}))
    targets = dummy_targets(config, [], tmp_path / "models")
    assert [target.label for target in targets] == [
        "bf16", "fp8", "w4a16", "sparse24-bf16", "sparse24-fp8", "sparse24-int8", "sparse24-w4a16", "sparse24-w8a16",
    ]  # fmt: skip
    for target in targets:
        written = json.loads((tmp_path / "models" / target.label / "config.json").read_text())
        assert written.get("quantization_config") == dummy_variants()[target.label]
        if target.label.startswith("sparse24"):
            assert detect(written["quantization_config"]).ignore == ("lm_head",)
    with pytest.raises(OptionError, match=r"unknown variant 'x': expected one of bf16, fp8, w4a16, sparse24-bf16"):
        dummy_targets(config, ["x"], tmp_path)


def test_labels_and_arguments_of_one_model():
    dense, sparse = parse_targets(["/m/dense", "s=org/name"], ["s=--quantization sparse24"])
    assert (dense.label, dense.source, dense.options) == ("dense", "/m/dense", ())
    assert (sparse.label, sparse.source, sparse.options) == ("s", "org/name", ("--quantization", "sparse24"))


def test_the_cause_is_found_in_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("ERROR ValueError: the cause\nRuntimeError: Engine core initialization failed. See above\n")
    assert process.last_error(log) == "ValueError: the cause"
    log.write_text("RuntimeError: Engine core initialization failed.\n")
    assert process.last_error(log).startswith("RuntimeError")
    log.write_text("one\ntwo\n\n")
    assert process.last_error(log) == "two"


def test_gpu_states_are_read_from_nvidia_smi(monkeypatch):
    line = "NVIDIA H200, 580.1, 143771, 10, 1980, 1980, 3201, 650.5, 700.00, 60, 0, 0x0000000000000004"
    monkeypatch.setattr(machine, "_command", lambda *words: line)
    (state,) = machine.gpu_states()
    assert (state["name"], state["driver"], state["sm_mhz"], state["watts"]) == ("NVIDIA H200", "580.1", 1980.0, 650.5)
    assert machine.throttle_check([state]) == ["GPU 0 is throttled by its power cap: 1980 MHz"]
    monkeypatch.setattr(machine, "_command", lambda *words: line.replace("650.5", "[N/A]").replace("4", "0"))
    (state,) = machine.gpu_states()
    assert state["watts"] is None and machine.throttle_check([state]) == []


def test_time_left_is_told_from_what_the_work_took_so_far(monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("vllm_sparse.bench.progress.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = Progress(100.0, out)
    assert progress.left() == ""
    progress.done(20.0, "first")
    assert out.getvalue() == "[40 s left] first\n"


def test_windows_leave_out_a_short_rest():
    assert accuracy.windows(list(range(10)), 3, 8) == [[0, 1, 2], [3, 4, 5]]


def test_task_results_are_read_without_their_filters(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    results = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    (folder / "results_2026.json").write_text(json.dumps(results))
    assert accuracy.read_tasks(tmp_path) == {"t": {"acc": 0.5, "acc_stderr": 0.1}}
