"""The command as a user runs it, on stand-ins for vLLM's engine, client and server."""

import json
import sys
from pathlib import Path

import pytest

from vllm_sparse.bench import accuracy, machine, offline, runner, server, serving
from vllm_sparse.cli import main

FAKES = (sys.executable, str(Path(__file__).with_name("fakes.py")))
QUICK = ["--repeats", "2", "--rounds", "2", "--requests", "8", "--seconds", "1", "--use-case", "rag", "chat"]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(offline, "ENGINE", (*FAKES, "engine"))
    monkeypatch.setattr(runner, "CLIENT", (*FAKES, "client"))
    monkeypatch.setattr(server, "COMMAND", (*FAKES, "server"))
    for module in (runner, serving):
        monkeypatch.setattr(module, "idle_check", lambda *given, **more: [])  # a machine that runs tests is busy


@pytest.fixture
def models(tmp_path):
    """Return a function that makes model directories by name."""

    def make(*names, **behaviour):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text('{"max_position_embeddings": 8192}')
            (tmp_path / name / "behaviour").write_text(json.dumps(behaviour))
        return [str(tmp_path / name) for name in names]

    return make


def bench(tmp_path, *arguments):
    return main(["bench", *arguments, "-o", str(tmp_path / "out")])


def results(tmp_path):
    return json.loads((tmp_path / "out" / "bench.json").read_text())


def test_a_whole_run_is_reported(tmp_path, models, capsys):
    text = tmp_path / "text.txt"
    text.write_text("x" * 600)
    assert bench(tmp_path, *models("dense", "sparse"), *QUICK, "--text", str(text), "--window", "100") == 0
    data = results(tmp_path)
    assert {row["suite"] for row in data["rows"]} == {"memory", "latency", "throughput", "serve", "perplexity"}
    assert not data["failures"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| sparse | 0.064 ±0% (2.00x) | 0.128 ±0% (2.00x) | 2.00x |" in report
    assert (
        "| sparse | 0.5 ±0% (2.00x) | 0.5 ±0% (2.00x) | 2.00x |" in report.split("milliseconds to the first token")[1]
    )
    assert "| sparse | 2000 ±0% (2.00x) | 2000 ±0% (2.00x) | 2.00x |" in report.split("tokens per second after it")[1]
    assert "| dense | 1.649 | –" not in report and "1.649 (100.0 %)" in report
    assert "4.00x" not in report.split("## Memory")[0]
    for name in ("latency", "throughput", "itl-rag", "itl-chat", "memory"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")
    printed = capsys.readouterr()
    assert "left] " in printed.err and "Latency: seconds of one request" in printed.out


def test_models_take_turns(tmp_path, models):
    bench(tmp_path, *models("dense", "sparse"), *QUICK, "--suite", "latency")
    assert [(row["model"], row["round"]) for row in results(tmp_path)["rows"] if row["suite"] == "latency"] == [
        ("dense", 0), ("dense", 0), ("sparse", 0), ("sparse", 0),
        ("sparse", 1), ("sparse", 1), ("dense", 1), ("dense", 1),
    ]  # fmt: skip


def test_resident_engines_load_once_and_alternate_by_sample(tmp_path, models):
    bench(tmp_path, *models("dense", "sparse"), *QUICK, "--suite", "latency", "--resident", "--repeats", "3")
    rows = [row for row in results(tmp_path)["rows"] if row["suite"] == "latency"]
    assert len(rows) == 12 and all(len(row["seconds"]) == 1 for row in rows)
    logs = sorted(file.name for file in (tmp_path / "out" / "logs").iterdir())
    assert logs == ["engine-dense.log", "engine-sparse.log"]


def test_rates_follow_the_baselines_saturation_until_the_server_falls_behind(tmp_path, models):
    bench(tmp_path, *models("dense", "sparse"), *QUICK, "--suite", "serve", "--rounds", "1", "--arrivals", "poisson")
    rates = [row["rate"] for row in results(tmp_path)["rows"] if row["arrival"] == "poisson"]
    assert rates == 4 * [2.5, 5.0, 7.5, 10.0, 12.5]


def test_a_model_that_does_not_load_is_named_and_the_others_go_on(tmp_path, models, capsys):
    paths = models("dense") + models("broken", load="fail")
    assert bench(tmp_path, *paths, *QUICK, "--suite", "latency", "serve", "--rounds", "1") == 1
    errors = [failure["error"] for failure in results(tmp_path)["failures"]]
    assert errors[0].startswith(
        "broken: the engine ended with exit status 1 while loading: ValueError: model.layers.0 has no weight; see "
    )
    assert errors[1].startswith(
        "broken: the model does not load, the server ended with exit status 1: "
        "ValueError: model.layers.0 has no weight; see "
    )
    assert errors[0] in capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    assert errors[0] in report and "| broken | – | – | – |" in report


def test_a_killed_engine_keeps_what_it_measured_and_resume_goes_on(tmp_path, models):
    path = models("fragile")
    assert bench(tmp_path, *path, *QUICK, "--suite", "latency", "--rounds", "1") == 1
    data = results(tmp_path)
    assert [row["use_case"] for row in data["rows"] if row["suite"] == "latency"] == ["rag"]
    assert "fragile: the engine was killed by SIGKILL while it measured" in data["failures"][0]["error"]
    assert bench(tmp_path, *path, *QUICK, "--suite", "latency", "--rounds", "1", "--resume") == 0
    data = results(tmp_path)
    assert [row["use_case"] for row in data["rows"] if row["suite"] == "latency"] == ["rag", "chat"]
    assert not data["failures"]


def test_a_killed_server_is_told_from_one_that_refuses(tmp_path, models, monkeypatch):
    monkeypatch.setenv("FAKE_PROMPT", "die")
    assert bench(tmp_path, *models("dense"), *QUICK, "--suite", "serve") == 1
    failures = results(tmp_path)["failures"]
    assert len(failures) == 1
    assert "dense: the server ended with exit status 9 while it was measured" in failures[0]["error"]


def test_a_full_queue_is_reported_and_its_loads_do_not_count(tmp_path, models):
    paths = models("dense", queue=6)
    assert bench(tmp_path, *paths, *QUICK, "--suite", "serve", "--rounds", "1", "--use-case", "rag") == 1
    data = results(tmp_path)
    single, flood = data["rows"]
    assert (single["failed"], flood["failed"], flood["completed"]) == (0, 5, 3)
    assert flood["warnings"] == [
        "dense: the server refused 5 of 8 requests (rag, at-once): HTTP Error 503: Service Unavailable"
    ]
    assert "the server refused 8 of 8 requests (rag, constant)" in data["failures"][0]["error"]
    assert flood["warnings"][0] in (tmp_path / "out" / "report.md").read_text()


def test_an_unreachable_endpoint_is_one_sentence(tmp_path, capsys):
    assert bench(tmp_path, "there=http://127.0.0.1:9", *QUICK, "--suite", "serve") == 1
    assert "there: http://127.0.0.1:9/v1/models does not answer: [Errno 111] Connection refused" in (
        capsys.readouterr().err
    )


def test_a_full_queue_stops_perplexity(tmp_path, models):
    text = tmp_path / "text.txt"
    text.write_text("x" * 600)
    assert bench(tmp_path, *models("dense", queue=0), "--suite", "accuracy", "--text", str(text), "--window", "99") == 1
    error = results(tmp_path)["failures"][0]["error"]
    assert error.startswith("dense: the queue of http://127.0.0.1:") and "is full (HTTP 503): " in error


def test_a_second_run_does_not_mix_with_the_first(tmp_path, models, capsys):
    paths = models("dense")
    bench(tmp_path, *paths, *QUICK, "--suite", "latency")
    capsys.readouterr()
    assert bench(tmp_path, *paths, *QUICK, "--suite", "latency") == 2
    assert "bench.json holds a run: give another -o, or --resume to go on with it" in capsys.readouterr().err
    assert bench(tmp_path, *paths, *QUICK, "--suite", "latency", "--scale", "0.5", "--resume") == 2
    assert "cannot go on with this run, its arguments are not the same" in capsys.readouterr().err


def test_reports_say_that_lengths_are_scaled(tmp_path, models):
    bench(tmp_path, *models("dense"), *QUICK, "--suite", "latency", "--scale", "0.5", "--use-case", "rag")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "scaled by 0.5" in report and "RAG 512+64" in report


def test_throttling_is_in_the_report(tmp_path, models, monkeypatch):
    state = dict.fromkeys(machine._GPU) | {"name": "NVIDIA X", "throttle": 0x40, "sm_mhz": 900.0, "utilization": 0.0}
    monkeypatch.setattr(offline, "gpu_states", lambda: [state])
    bench(tmp_path, *models("dense"), *QUICK, "--suite", "latency")
    assert "GPU 0 is throttled by its temperature: 900 MHz" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give models, or --dummy CONFIG, and not both"),
        (["a", "b/a"], "two models are called 'a': name them as LABEL=MODEL"),
        (["a", "--scale", "2"], "--scale 2: expected a factor above 0 and at most 1"),
        (["a", "--repeats", "0"], "--repeats 0: expected more than 0"),
        (["a", "--rates", "1", "-1"], "--rates: expected more than 0 requests per second"),
        (["a", "--window", "1"], "--window 1: expected at least 2 tokens"),
        (["a", "--suite", "accuracy"], "--suite accuracy needs --text FILE or --task NAME"),
        (["a", "--suite", "accuracy", "--text", "/none"], "--text /none: No such file or directory"),
        (["http://x", "--suite", "latency"], "a running server can be measured by --suite serve and accuracy alone"),
        (["a", "--model-args", "b=--x"], "--model-args: no model is called 'b'"),
        (["a", "--model-args", "x"], "--model-args 'x': expected LABEL=ARGUMENTS"),
        (["--dummy", "/none.json"], "--dummy /none.json: not the config.json of a language model"),
    ],
)
def test_wrong_calls(tmp_path, capsys, arguments, text):
    assert bench(tmp_path, *arguments) == 2
    assert text in capsys.readouterr().err


def test_a_use_case_longer_than_the_context_is_refused_before_anything_loads(tmp_path, models, capsys):
    path = Path(models("dense")[0])
    (path / "config.json").write_text('{"max_position_embeddings": 2048}')
    assert bench(tmp_path, str(path), "--suite", "latency") == 2
    assert "dense: has 2048 positions, but summarization and the other use cases need 4616" in capsys.readouterr().err


def test_tasks_without_the_harness_say_what_to_install(tmp_path, models, capsys, monkeypatch):
    monkeypatch.setattr(accuracy.importlib.util, "find_spec", lambda name: None)
    assert bench(tmp_path, *models("dense"), "--suite", "accuracy", "--task", "arc_easy") == 2
    assert "--task needs lm-evaluation-harness: pip install 'vllm-sparse[eval]'" in capsys.readouterr().err
