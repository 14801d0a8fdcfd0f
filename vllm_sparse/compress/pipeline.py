"""The whole job: calibrate, prune and quantize block by block, write, verify, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

import vllm_sparse
from vllm_sparse.compress.calibrate import BlockHessians
from vllm_sparse.compress.calibration import fingerprint, load_calibration
from vllm_sparse.compress.layer import Inputs, LayerReport, Pruned, prune_layers, quantize_layers
from vllm_sparse.compress.model import BlockCall, BlockModel
from vllm_sparse.compress.phases import Phases
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.recipe import ALWAYS_DENSE, Recipe, make_recipe, read_recipe
from vllm_sparse.compress.refine import refine
from vllm_sparse.compress.report import Report, Verification, model_card, verify
from vllm_sparse.errors import FormatError, OptionError
from vllm_sparse.formats.base import is_ignored
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.sparse24 import Sparse24Format
from vllm_sparse.scheme import check_group_size, get_scheme
from vllm_sparse.weight import Sparse24Weight

_TOKENS_AT_ONCE = 8192
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def compress(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | Tensor | None = None,
    device: str | torch.device | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    force: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Report:
    """Compress a Hugging Face causal LM to 2:4 and write it as a sparse24 checkpoint.

    Args:
        model: directory or Hugging Face id.
        output: directory to write; it appears when it is complete, or not at all.
        calibration: see ``load_calibration``, or token ids int64 ``[samples, length]``.
        device: where to compute; None: the first GPU if there is one, else the CPU.
        recipe: YAML file or mapping of options.
        force: replace what is in ``output``.
        quiet: print no progress.
        **options: attributes of ``Recipe``; they win over those of ``recipe``.

    Returns:
        The report, which is also written as report.json and README.md.

    Raises:
        SparseError: every failure a user can cause, as one sentence.
    """
    started = time.monotonic()
    where = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    given = read_recipe(recipe) if isinstance(recipe, (str, Path)) else dict(recipe or {})
    plan = make_recipe(given | {name: value for name, value in options.items() if value is not None}, where)
    if calibration is None and plan.needs_calibration:
        raise OptionError(f"pruner {plan.pruner} with quantizer {plan.quantizer} needs calibration text")
    with CheckpointWriter(output, force) as writer:
        job = _Job(Checkpoint(_directory(model)), plan, _device(device))
        tokens, described = None, None
        if calibration is not None and plan.needs_calibration:
            tokens, described = job.calibration(calibration)
        with Progress(len(job.chosen), quiet=quiet) as progress:
            layers = tuple(job.layers(writer, tokens, progress))
        bytes_after = job.finish(writer)
        report = Report(
            model=str(model),
            recipe=plan,
            calibration=described,
            layers=layers,
            dense=job.dense,
            bytes_before=sum(info.nbytes for info in job.checkpoint.tensors.values()),
            bytes_after=bytes_after,
            verification=job.verify(writer.directory, layers),
            seconds=time.monotonic() - started,
            phases=job.phases.seconds,
            peak_device_bytes=job.phases.peak_bytes(),
            versions={
                "vllm-sparse": vllm_sparse.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )
        writer.write_text("report.json", report.to_json())
        writer.write_text("README.md", model_card(report, Path(output).name))
    return report


class _Job:
    """A checkpoint, the layers of it that become 2:4, and the steps from one to the other."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self._recipe = recipe
        self.device = device
        self.phases = Phases(device)
        self._value_dtype = _source_dtype(checkpoint)
        # A CPU gains nothing from computing in 16 bits that would be worth the rounding of the calibration inputs.
        self._model = BlockModel(checkpoint, device, torch.float32 if device.type == "cpu" else self._value_dtype)
        patterns = (*ALWAYS_DENSE, *recipe.ignore)
        blocks = [name for index in range(len(self._model.blocks)) for name in self._model.linears(index)]
        self.chosen = [name for name in blocks if not is_ignored(name, patterns)]
        linears = self._model.all_linears()
        self.dense = tuple(self.file_name(name) for name in linears if name not in set(self.chosen))
        self._check_layers(linears)
        scheme = get_scheme(recipe.scheme)
        self.format = Sparse24Format(
            scheme,
            "bfloat16" if scheme.scaled else _dtype_name(self._value_dtype),
            recipe.group,
            _dtype_name(recipe.scale_dtype),
            ignore=self.dense,
        )
        self._written: set[str] = set()
        self._bytes = 0

    def file_name(self, layer: str) -> str:
        """Return what the checkpoint calls a layer."""
        return self._model.file_name(f"{layer}.weight").removesuffix(".weight")

    def calibration(self, source: str | Path | Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the token ids and what the report says of them."""
        recipe = self._recipe
        if isinstance(source, Tensor):
            tokens = source
        else:
            self._check_length(recipe.seq_len)
            tokenizer = _tokenizer(self.checkpoint.path)
            tokens = load_calibration(source, tokenizer, recipe.num_samples, recipe.seq_len, recipe.seed)
        if tokens.dim() != 2 or not tokens.numel():
            raise OptionError(f"calibration tokens must be [samples, length] and not empty, got {list(tokens.shape)}")
        self._check_length(tokens.shape[1])
        return tokens, {
            "source": "token ids" if isinstance(source, Tensor) else str(source),
            "sequences": tokens.shape[0],
            "tokens": tokens.numel(),
            "sha256": fingerprint(tokens),
        }

    @torch.no_grad()
    def layers(self, writer: CheckpointWriter, tokens: Tensor | None, progress: Progress) -> Iterator[LayerReport]:
        """Compress block after block and write each; the inputs of a block come from the compressed ones before it."""
        recipe = self._recipe
        hidden: list[Tensor] = []
        calls: dict[torch.Size, list[BlockCall]] = {}
        if tokens is not None:
            for batch in tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])):
                embedded, calls[batch.shape] = self._model.embed(batch)
                hidden.append(embedded)
        targets = list(hidden)
        for index in range(len(self._model.blocks)):
            with self.phases("load"):
                block = self._model.load(index)
            linears = {name: m for name, m in self._model.linears(index).items() if name in set(self.chosen)}
            batches = [(calls[x.shape[:2]][index], x) for x in hidden]
            if recipe.refine:
                with self.phases("propagate"):
                    for i, x in enumerate(targets):
                        targets[i] = calls[x.shape[:2]][index].run(block, x)
            groups = []
            for names, inputs in self._inputs(block, linears, batches):
                with self.phases("prune"):
                    pruned = prune_layers({name: linears[name].weight.float() for name in names}, inputs, recipe)
                groups.append((pruned, inputs))
            if recipe.refine:
                with self.phases("refine"):
                    progress.say(self._refine(index, block, linears, groups, batches, targets))
                renewed = dict(self._inputs(block, linears, batches))
                groups = [(pruned, renewed[tuple(pruned.weights)]) for pruned, _ in groups]
            for pruned, inputs in groups:
                with self.phases("quantize"):
                    quantized = list(quantize_layers(pruned, inputs, recipe, self._value_dtype))
                for hub, dense, report in quantized:
                    linears[report.name].weight.copy_(dense)
                    with self.phases("write"):
                        self._add_layer(writer, report.name, hub)
                    progress.step(_line(report))
                    yield report
            del batches, groups, pruned, inputs, quantized, hub, dense
            with self.phases("propagate"):
                for i, x in enumerate(hidden):  # in place, so that only one set of activations is ever held
                    hidden[i] = calls[x.shape[:2]][index].run(block, x)
            self._model.release(index)

    def _inputs(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[tuple[BlockCall, Tensor]]
    ) -> Iterator[tuple[tuple[str, ...], Inputs]]:
        """Run the block and yield what reached its layers, for each set of them that shares an input."""
        with self.phases("calibrate"), BlockHessians(linears) as hessians:
            for call, x in batches:
                call.run(block, x)
                hessians.end_batch()
        for names, h, tokens in hessians.groups():
            with self.phases("prune"):
                inputs = Inputs(h, tokens, self._recipe, ", ".join(names))
            yield names, inputs

    def _refine(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        groups: Sequence[tuple[Pruned, Inputs]],
        batches: Sequence[tuple[BlockCall, Tensor]],
        targets: Sequence[Tensor],
    ) -> str:
        """Put the pruned weights into the block, train them, and take them out again; return a line on the result."""
        places = [(pruned, name, rows) for pruned, _ in groups for name, rows in pruned.rows()]
        for pruned, name, rows in places:
            linears[name].weight.copy_(pruned.sparse[rows])
        masks = {linears[name]: pruned.mask[rows] for pruned, name, rows in places}
        examples = [(call, x, target) for (call, x), target in zip(batches, targets, strict=True)]
        result = refine(block, masks, examples, self._recipe.refine, self._recipe.seed)
        for pruned, name, rows in places:
            pruned.sparse[rows] = linears[name].weight
            linears[name].weight = nn.Parameter(linears[name].weight.to(batches[0][1].dtype), requires_grad=False)
        return f"block {index} refined: relative squared error {result.before:.4f} to {result.after:.4f}"

    def finish(self, writer: CheckpointWriter) -> int:
        """Write everything that is not a 2:4 layer; return the bytes of all tensors written."""
        config = dict(self.checkpoint.config)
        tied = bool(config.get("tie_word_embeddings", False))
        for name, info in self.checkpoint.tensors.items():
            if name in self._written or (tied and name == "lm_head.weight"):
                continue
            tensor = self.checkpoint.load(name)
            self._add(writer, name, tensor.to(self._value_dtype) if info.dtype == torch.float32 else tensor)
        config["quantization_config"] = self.format.to_config()
        config.pop("torch_dtype", None)
        config["dtype"] = _dtype_name(self._value_dtype)
        writer.write_json("config.json", config)
        for file in self.checkpoint.other_files():
            if file.name not in ("README.md", "report.json"):
                writer.copy(file)
        writer.flush()
        return self._bytes

    def verify(self, directory: Path, layers: Iterable[LayerReport]) -> Verification:
        """Read the written 2:4 layers again; see ``report.verify``."""
        with self.phases("verify"):
            return verify(directory, self.format, [self.file_name(layer.name) for layer in layers], self.device)

    def _add_layer(self, writer: CheckpointWriter, layer: str, hub: Sparse24Weight) -> None:
        file_name = self.file_name(layer)
        for last, tensor in self.format.from_weight(hub).items():
            self._add(writer, f"{file_name}.{last}", tensor)
        self._written.add(f"{file_name}.weight")

    def _add(self, writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
        writer.add(name, tensor)
        self._bytes += tensor.nbytes

    def _check_layers(self, linears: Mapping[str, nn.Linear]) -> None:
        """Find before the first hour of work what would fail after it."""
        if not self.chosen:
            raise OptionError(f"{self.checkpoint.path}: every linear layer is ignored, nothing is left to compress")
        for name in self.chosen:
            k = linears[name].in_features
            if k % 4:
                raise FormatError(
                    f"{name}: 2:4 needs a multiple of 4 input features, got {k}; leave it out with --ignore"
                )
            check_group_size(get_scheme(self._recipe.scheme), self._recipe.group, k, name)

    def _check_length(self, length: int) -> None:
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise OptionError(f"sequences of {length} tokens are longer than the model's {longest} positions")


def _line(report: LayerReport) -> str:
    optimum = "" if report.optimum_ratio is None else f"  optimum x{report.optimum_ratio:.3f}"
    note = f"  ({report.note})" if report.note else ""
    return f"{report.name}  error {report.error:.4f}{optimum}{note}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the 16-bit dtype of the model; float32 models become bf16, which keeps their range."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return torch.float16 if max(sizes, key=lambda dtype: sizes[dtype]) == torch.float16 else torch.bfloat16


def _device(name: str | torch.device | None) -> torch.device:
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


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: the tokenizer cannot be loaded, which calibration text needs ({reason})") from error
