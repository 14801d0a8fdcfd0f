"""The whole job: calibrate, prune and quantize block by block, write, verify, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

import vllm_sparse
from vllm_sparse.compress.job import Job
from vllm_sparse.compress.manifest import Manifest, source_fingerprint
from vllm_sparse.compress.plan import Plan, make_plan
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.recipe import Recipe, make_recipe, read_recipe
from vllm_sparse.compress.report import Report, model_card
from vllm_sparse.compress.world import Silent, World
from vllm_sparse.errors import FormatError, OptionError
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def compress(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | Tensor | Iterable[Tensor] | None = None,
    device: str | torch.device | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Report:
    """Compress a Hugging Face causal LM to 2:4 and write it as a sparse24 checkpoint.

    Started by torchrun, the processes share the work, and all of them return the same report.

    Args:
        model: directory or Hugging Face id.
        output: directory to write; it appears when it is complete, or not at all.
        calibration: see ``load_calibration``, or token ids: int64 ``[samples, length]``, or a list of ``[length]``.
        device: where to compute; None: the first GPU if there is one, else the CPU.
        recipe: YAML file or mapping of options.
        force: replace what is in ``output``.
        resume: write each block to disk as it is finished, keep them when the run is cut short, and begin after those
            that an earlier run with the same inputs kept. The result is the same to the byte.
        quiet: print no progress.
        **options: attributes of ``Recipe``; they win over those of ``recipe``.

    Returns:
        The report, which is also written as report.json and README.md.

    Raises:
        SparseError: every failure a user can cause, as one sentence.
    """
    started = time.monotonic()
    plan, world = _recipe(recipe, options, calibration), World.join()
    writer = CheckpointWriter(output, force, keep=resume)
    job = Job(Checkpoint(_directory(model)), plan, _device(device, world), world)
    sequences, described = job.calibration(calibration)
    sequences = world.from_one(sequences)
    job.keep_dense(sequences)
    sequences = world.share(sequences)
    job.measure_fisher(sequences)
    if not world.first:
        with Progress(len(job.chosen), quiet=True) as progress:
            for _ in job.layers(Silent(), sequences, progress):
                pass
        return world.from_one(cast(Report, None))
    with writer:
        manifest = Manifest(writer, _identity(job, plan, described)) if resume else None
        with Progress(len(job.chosen), quiet=quiet) as progress:
            layers = tuple(job.layers(writer, sequences, progress, manifest))
        bytes_after = job.finish(writer)
        report = Report(
            model=str(model),
            recipe=plan,
            calibration=described,
            layers=layers,
            dense=job.dense,
            kept=job.kept,
            bytes_before=sum(info.nbytes for info in job.checkpoint.tensors.values()),
            bytes_after=bytes_after,
            verification=job.verify(writer.directory, layers),
            seconds=time.monotonic() - started,
            phases=job.phases.seconds,
            peak_device_bytes=job.phases.peak_bytes,
            versions=_versions(),
        )
        writer.write_text("report.json", report.to_json())
        writer.write_text("README.md", model_card(report, Path(output).name))
        if manifest is not None:
            manifest.remove()
    return world.from_one(report)


def dry_run(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | Tensor | Iterable[Tensor] | None = None,
    device: str | torch.device | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    force: bool = False,
    **options: Any,
) -> Plan:
    """Return what ``compress`` would do with the same arguments. It raises the same errors and writes nothing."""
    plan = _recipe(recipe, options, calibration)
    CheckpointWriter(output, force)
    job = Job(Checkpoint(_directory(model)), plan, _device(device, World()))
    sequences, _ = job.calibration(calibration)
    job.keep_dense(sequences)
    job.measure_fisher(sequences)
    return make_plan(job, sequences)


def _recipe(recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any], calibration: object) -> Recipe:
    """Return the recipe with ``options`` (None: not given) on top, checked against the calibration text given."""
    where = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    given = read_recipe(recipe) if isinstance(recipe, (str, Path)) else dict(recipe or {})
    result = make_recipe(given | {name: value for name, value in options.items() if value is not None}, where)
    if calibration is None and result.needs_calibration:
        raise OptionError(f"pruner {result.pruner} with quantizer {result.quantizer} needs calibration text")
    return result


def _identity(job: Job, recipe: Recipe, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return everything that decides the bytes written."""
    return (
        {
            "model": source_fingerprint(job.checkpoint),
            "calibration": None if calibration is None else calibration["sha256"],
            "device": job.device.type,
            "processes": job.world.size,
        }
        | _versions()
        | recipe.to_dict()
    )


def _versions() -> dict[str, str]:
    return {
        "vllm-sparse": vllm_sparse.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _device(name: str | torch.device | None, world: World) -> torch.device:
    if name is None and not world.alone and torch.cuda.is_available():
        return world.local_device()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used here ({reason})") from error
    return device


def _directory(model: str | Path) -> Path:
    """Return the model's directory, fetched when ``model`` is a Hugging Face id and no path."""
    path = Path(model)
    if path.exists() or str(model).count("/") != 1 or str(model).startswith(("/", ".", "~")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=_MODEL_FILES))
    except Exception as error:  # the library raises its own and its network layer's errors
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{model}: no such directory, and not a model that can be fetched ({reason})") from error
