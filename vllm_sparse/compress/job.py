"""One model and one recipe: which layers become 2:4, and the blocks compressed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer

from vllm_sparse.compress.calibrate import BlockHessians
from vllm_sparse.compress.calibration import fingerprint, load_calibration
from vllm_sparse.compress.layer import Inputs, LayerReport, Pruned, prune_layers, quantize_layers
from vllm_sparse.compress.manifest import Manifest
from vllm_sparse.compress.model import BlockCall, BlockModel
from vllm_sparse.compress.output import Weight, make_output
from vllm_sparse.compress.phases import Phases
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.recipe import ALWAYS_DENSE, Recipe
from vllm_sparse.compress.refine import refine
from vllm_sparse.compress.report import Verification, verify
from vllm_sparse.compress.smooth import smooth
from vllm_sparse.errors import FormatError, OptionError
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.names import is_ignored
from vllm_sparse.scheme import check_group_size, get_scheme
from vllm_sparse.weight import LinearSpec

_BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}  # a CPU works out of its caches
_Add = Callable[[str, Tensor], None]


class Job:
    """A checkpoint, the layers of it that become 2:4, and the steps from one to the other."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.device = device
        self.phases = Phases(device)
        self.batch_tokens = _BATCH_TOKENS.get(device.type, 8192)
        self._value_dtype = _source_dtype(checkpoint)
        self._model = BlockModel(checkpoint, device, _compute_dtype(device, self._value_dtype))
        patterns = (*ALWAYS_DENSE, *recipe.ignore)
        blocks = [name for index in range(len(self._model.blocks)) for name in self._model.linears(index)]
        self.chosen = [name for name in blocks if not is_ignored(name, patterns)]
        linears = self._model.all_linears()
        dense = [name for name in linears if name not in set(self.chosen)] + self._model.routers()
        self.dense = tuple(self.file_name(name) for name in dense)
        self._check_layers(linears)
        scheme = get_scheme(recipe.scheme)
        spec = LinearSpec(scheme, 0, 0, recipe.group, self._value_dtype, None, recipe.static_input)
        files = [self.file_name(name) for name in self.chosen]
        pattern = recipe.mask_pattern
        self.output = make_output(recipe.format, spec, recipe.scale_dtype, pattern, files, self.dense)

    def file_name(self, layer: str) -> str:
        """Return what the checkpoint calls a layer."""
        return self._model.file_name(f"{layer}.weight").removesuffix(".weight")

    def calibration(self, source: str | Path | Tensor | None) -> tuple[Tensor | None, dict[str, Any] | None]:
        """Return the token ids and what the report says of them; None for both where no step needs them."""
        recipe = self.recipe
        if source is None or not recipe.needs_calibration:
            return None, None
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
    def layers(
        self, writer: CheckpointWriter, tokens: Tensor | None, progress: Progress, manifest: Manifest | None = None
    ) -> Iterator[LayerReport]:
        """Compress block after block and write each; the inputs of a block come from the compressed ones before it.

        Blocks that ``manifest`` knows are read from it. Each one that is finished here is added to it.
        """
        state = _Activations(self._model, tokens, self.batch_tokens, self.recipe.refine > 0)
        finished = 0 if manifest is None else len(manifest)
        for index in range(len(self._model.blocks)):
            if manifest is not None and index < finished:
                reports = manifest.layers(index)
                if finished < len(self._model.blocks):  # else nobody needs what comes out of it
                    self._restore(index, manifest.shard(index), reports, state)
            else:
                reports = list(self._compress_block(index, writer.add, state, progress))
                if manifest is not None:
                    manifest.add(reports)
            if index < finished:
                progress.skip(len(reports), f"block {index} is finished")
            yield from reports

    @torch.no_grad()
    def rehearse(self, tokens: Tensor | None, progress: Progress) -> int:
        """Compress the first block and write it nowhere; return the bytes of the hidden states of ``tokens``."""
        state = _Activations(self._model, tokens, self.batch_tokens, self.recipe.refine > 0)
        for _ in self._compress_block(0, lambda name, tensor: None, state, progress):
            pass
        return sum(x.nbytes for _, x in state.batches(0))

    @property
    def blocks(self) -> int:
        """How many repeated blocks the model has."""
        return len(self._model.blocks)

    def shapes(self, first_block: bool = False) -> list[tuple[int, int]]:
        """Return (n, k) of every layer that becomes 2:4."""
        linears = self._model.linears(0) if first_block else self._model.all_linears()
        return [(linears[name].out_features, linears[name].in_features) for name in self.chosen if name in linears]

    def dense_bytes(self) -> dict[str, int]:
        """Return the bytes of every linear layer that stays dense, by name."""
        return {name: self._bytes_written(f"{name}.weight") for name in self.dense}

    def bytes_after(self) -> int:
        """Return the bytes of all tensors that a run writes."""
        linears = self._model.all_linears()
        compressed = {f"{self.file_name(layer)}.weight" for layer in self.chosen}
        copied = (name for name in self.checkpoint.tensors if name not in compressed | self._model.packed.keys())
        total = sum(self._bytes_written(name) for name in copied)
        for packed, parts in self._model.packed.items():
            experts = self.checkpoint.tensors[packed].shape[0]
            for part in (part for name, part in parts.items() if name not in compressed):
                total += self._bytes_written(packed) // experts // (1 if part.rows == slice(None) else 2)
        for layer in self.chosen:
            n, k = linears[layer].out_features, linears[layer].in_features
            total += self.output.nbytes(layer, n, k)
        return total

    def _bytes_written(self, name: str) -> int:
        """Return the bytes that a tensor takes which is copied; 0 for one that is not in the files."""
        info = self.checkpoint.tensors.get(name)
        if info is None or self._is_tied_head(name):
            return 0
        return info.nbytes // 2 if info.dtype == torch.float32 else info.nbytes

    def _is_tied_head(self, name: str) -> bool:
        return name == "lm_head.weight" and bool(self.checkpoint.config.get("tie_word_embeddings", False))

    def _compress_block(self, index: int, add: _Add, state: _Activations, progress: Progress) -> Iterator[LayerReport]:
        recipe = self.recipe
        with self.phases("load"):
            block = self._model.load(index)
        linears = self._linears(index)
        if recipe.refine:
            with self.phases("propagate"):
                state.advance_targets(index, block)
        batches = state.batches(index)
        if recipe.smooth:
            with self.phases("smooth"):
                self._smooth(index, block, linears, batches, add)
        pruned: Iterable[tuple[Pruned, Inputs]] = self._pruned(block, linears, batches)
        if recipe.refine:
            groups = [group for group, _ in pruned]
            with self.phases("refine"):
                progress.say(self._refine(index, block, linears, groups, batches, state.targets))
            pruned = self._with_inputs(groups, block, linears, batches)
        for group, inputs in pruned:
            with self.phases("quantize"):
                quantized = list(quantize_layers(group, inputs, recipe, self._value_dtype))
            for hub, dense, report in quantized:
                linears[report.name].weight.copy_(dense)
                with self.phases("write"):
                    self._add_layer(add, report.name, hub)
                progress.step(_line(report))
                yield report
        with self.phases("propagate"):
            state.advance(index, block)
        self._model.release(index)

    def _restore(self, index: int, shard: Path, reports: Sequence[LayerReport], state: _Activations) -> None:
        """Put a block that is finished in place of the dense one, for the inputs of those after it."""
        with self.phases("propagate"):
            block = self._model.load(index)
            linears = self._linears(index)
            if self.recipe.refine:
                state.advance_targets(index, block)
            with safe_open(shard, framework="pt") as handle:
                names = list(handle.keys())
                for name, parameter in block.named_parameters():  # what smoothing changed
                    if (file_name := self._model.file_name(f"{self._model.prefix}.{index}.{name}")) in names:
                        parameter.copy_(handle.get_tensor(file_name))
                for report in reports:
                    layer = self.file_name(report.name)
                    own = [name for name in names if name.rpartition(".")[0] == layer]
                    tensors = {name.rpartition(".")[2]: handle.get_tensor(name).to(self.device) for name in own}
                    linears[report.name].weight.copy_(self.output.read(layer, tensors).to_dense())
            state.advance(index, block)
            self._model.release(index)

    def _linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the layers of a block that become 2:4."""
        chosen = set(self.chosen)
        return {name: linear for name, linear in self._model.linears(index).items() if name in chosen}

    def _pruned(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[tuple[BlockCall, Tensor]]
    ) -> Iterator[tuple[Pruned, Inputs]]:
        for names, inputs in self._inputs(block, linears, batches):
            with self.phases("prune"):
                pruned = prune_layers({n: linears[n].weight.float() for n in names}, inputs, self.recipe)
            yield pruned, inputs

    def _with_inputs(
        self,
        groups: Sequence[Pruned],
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
    ) -> Iterator[tuple[Pruned, Inputs]]:
        """Yield ``groups`` again, each with the inputs that reach it now."""
        by_name = {tuple(group.weights): group for group in groups}
        for names, inputs in self._inputs(block, linears, batches):
            yield by_name[names], inputs

    def _inputs(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[tuple[BlockCall, Tensor]]
    ) -> Iterator[tuple[tuple[str, ...], Inputs]]:
        """Run the block and yield what reached its layers, for each set of them that shares an input."""
        with self.phases("calibrate"), BlockHessians(linears, self.recipe.static_input) as hessians:
            for call, x in batches:
                with hessians.batch():
                    call.run(block, x)
        for names, h, tokens in hessians.groups():
            with self.phases("prune"):
                inputs = Inputs(h, tokens, self.recipe, ", ".join(names), hessians.largest(names[0]))
            yield names, inputs

    def _smooth(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
        add: _Add,
    ) -> None:
        """Move large activations into the weights, and write what changed besides the layers that become 2:4."""
        prefix = f"{self._model.prefix}.{index}."
        for name, value in smooth(block, prefix, linears.values(), batches, self.recipe.smooth).items():
            if name.removesuffix(".weight") not in linears:
                file_name = self._model.file_name(name)
                dtype = self.checkpoint.tensors[file_name].dtype
                add(file_name, value.to(self._value_dtype if dtype == torch.float32 else dtype))

    def _refine(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        groups: Sequence[Pruned],
        batches: Sequence[tuple[BlockCall, Tensor]],
        targets: Sequence[Tensor],
    ) -> str:
        """Put the pruned weights into the block, train them, and take them out again; return a line on the result."""
        places = [(pruned, name, rows) for pruned in groups for name, rows in pruned.rows()]
        for pruned, name, rows in places:
            linears[name].weight.copy_(pruned.sparse[rows])
        masks = {linears[name]: pruned.mask[rows] for pruned, name, rows in places}
        examples = [(call, x, target) for (call, x), target in zip(batches, targets, strict=True)]
        result = refine(block, masks, examples, self.recipe.refine, self.recipe.seed)
        for pruned, name, rows in places:
            pruned.sparse[rows] = linears[name].weight
            linears[name].weight = nn.Parameter(linears[name].weight.to(batches[0][1].dtype), requires_grad=False)
        return f"block {index} refined: relative squared error {result.before:.4f} to {result.after:.4f}"

    def finish(self, writer: CheckpointWriter) -> int:
        """Write everything that is not a 2:4 layer; return the bytes of all tensors written."""
        config, written = dict(self.checkpoint.config), writer.names
        compressed = {f"{self.file_name(layer)}.weight" for layer in self.chosen}
        for name, info in self.checkpoint.tensors.items():
            if name in compressed or name in written or self._is_tied_head(name):
                continue
            tensor = self.checkpoint.load(name)
            tensor = tensor.to(self._value_dtype) if info.dtype == torch.float32 else tensor
            if (parts := self._model.packed.get(name)) is None:
                writer.add(name, tensor)
                continue
            for own, part in parts.items():
                if own not in compressed:
                    writer.add(own, tensor[part.expert, part.rows])
        if (quantization := self.output.config()) is not None:
            config["quantization_config"] = quantization
        config.pop("torch_dtype", None)
        config["dtype"] = _dtype_name(self._value_dtype)
        writer.write_json("config.json", config)
        for file in self.checkpoint.other_files():
            if file.name not in ("README.md", "report.json"):
                writer.copy(file)
        writer.flush()
        return writer.total_bytes

    def verify(self, directory: Path, layers: Iterable[LayerReport]) -> Verification:
        """Read the written layers again; see ``report.verify``."""
        names = [self.file_name(layer.name) for layer in layers]
        with self.phases("verify"):
            return verify(directory, self.output, self.recipe.mask_pattern, names, self.device)

    def _add_layer(self, add: _Add, layer: str, hub: Weight) -> None:
        file_name = self.file_name(layer)
        for last, tensor in self.output.tensors(hub).items():
            add(f"{file_name}.{last}", tensor)

    def _check_layers(self, linears: Mapping[str, nn.Linear]) -> None:
        """Find before the first hour of work what would fail after it."""
        if not self.chosen:
            raise OptionError(f"{self.checkpoint.path}: every linear layer is ignored, nothing is left to compress")
        for name in self.chosen:
            k = linears[name].in_features
            pattern = self.recipe.mask_pattern
            multiple = 8 if self.recipe.format == "dense" and self.recipe.scheme == "w4a16" else 4
            for what, size in ((pattern.text, pattern.size), (f"{self.recipe.scheme} in format dense", multiple)):
                if size and k % size:
                    raise FormatError(
                        f"{name}: {what} needs a multiple of {size} input features, got {k}; leave it out with --ignore"
                    )
            check_group_size(get_scheme(self.recipe.scheme), self.recipe.group, k, name)

    def _check_length(self, length: int) -> None:
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise OptionError(f"sequences of {length} tokens are longer than the model's {longest} positions")


class _Activations:
    """The hidden states between two blocks, for all calibration tokens, and what each block is called with.

    Attributes:
        targets: the same in the dense model, which refinement works towards; empty without ``refined``.
    """

    def __init__(self, model: BlockModel, tokens: Tensor | None, batch_tokens: int, refined: bool) -> None:
        self._hidden: list[Tensor] = []
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        if tokens is not None:
            for batch in tokens.split(max(1, batch_tokens // tokens.shape[1])):
                embedded, self._calls[batch.shape] = model.embed(batch)
                self._hidden.append(embedded)
        self.targets = list(self._hidden) if refined else []

    def batches(self, index: int) -> list[tuple[BlockCall, Tensor]]:
        """Return the calls and inputs of block ``index``."""
        return [(self._calls[x.shape[:2]][index], x) for x in self._hidden]

    def advance(self, index: int, block: nn.Module) -> None:
        """Run all inputs through ``block``. In place, so that only one set of activations is ever held."""
        self._advance(self._hidden, index, block)

    def advance_targets(self, index: int, block: nn.Module) -> None:
        """Do the same with the targets; ``block`` is still dense."""
        self._advance(self.targets, index, block)

    def _advance(self, states: list[Tensor], index: int, block: nn.Module) -> None:
        for i, x in enumerate(states):
            states[i] = self._calls[x.shape[:2]][index].run(block, x)


def _line(report: LayerReport) -> str:
    optimum = "" if report.optimum_ratio is None else f"  optimum x{report.optimum_ratio:.3f}"
    note = f"  ({report.note})" if report.note else ""
    return f"{report.name}  error {report.error:.4f}{optimum}{note}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compute_dtype(device: torch.device, source: torch.dtype) -> torch.dtype:
    """Return the dtype of the forward passes: the model's own, but float32 on CPUs that have no products in it."""
    fast = device.type != "cpu" or (source == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return source if fast else torch.float32


def _source_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the 16-bit dtype of the model; float32 models become bf16, which keeps their range."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return torch.float16 if max(sizes, key=lambda dtype: sizes[dtype]) == torch.float16 else torch.bfloat16


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: the tokenizer cannot be loaded, which calibration text needs ({reason})") from error
