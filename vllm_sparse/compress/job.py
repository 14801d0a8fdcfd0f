"""One model and one recipe: which layers become 2:4, and the blocks compressed one after the other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from vllm_sparse.compress.calibrate import BlockHessians, Group
from vllm_sparse.compress.calibration import load_calibration
from vllm_sparse.compress.coupled import damp_outputs
from vllm_sparse.compress.curvature import block_fisher, output_curvature
from vllm_sparse.compress.generate import generate
from vllm_sparse.compress.keep_dense import KeepDense, Kept
from vllm_sparse.compress.layer import Inputs, LayerReport, Pruned, prune_layers, quantize_layers, regroup
from vllm_sparse.compress.manifest import Manifest
from vllm_sparse.compress.memory import keep_freed_memory
from vllm_sparse.compress.model import BlockCall, BlockModel
from vllm_sparse.compress.output import Weight, make_output
from vllm_sparse.compress.phases import Phases
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.recipe import ALWAYS_DENSE, Recipe
from vllm_sparse.compress.refine import refine
from vllm_sparse.compress.report import Verification, verify
from vllm_sparse.compress.residual import Streams, find_writes
from vllm_sparse.compress.sensitivity import choose_dense
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.smooth import smooth
from vllm_sparse.compress.staged import StagedBlock, find_leaders, run_side_by_side
from vllm_sparse.compress.world import Silent, World
from vllm_sparse.errors import FormatError, OptionError
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.embedding import quantize_table, table_tensors
from vllm_sparse.formats.names import is_ignored
from vllm_sparse.scheme import check_group_size, get_scheme
from vllm_sparse.weight import LinearSpec

_BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}  # a CPU works out of its caches
_STAGED_BYTES = 4 << 30  # of the inputs of the widest layer, which a pass in stages holds for all tokens
_Add = Callable[[str, Tensor], None]
_T = TypeVar("_T")


class Job:
    """A checkpoint, the layers of it that become 2:4, and the steps from one to the other."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, device: torch.device, world: World | None = None
    ) -> None:
        self.world = world or World()
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.device = device
        if device.type == "cpu":
            keep_freed_memory()
        self.phases = Phases(device)
        self._leaders: dict[tuple[str, ...], dict[str, str]] = {}
        self.batch_tokens = _BATCH_TOKENS.get(device.type, 8192)
        if recipe.refine:  # a training step takes a batch of every process
            self.batch_tokens //= self.world.size
        self._value_dtype = _source_dtype(checkpoint)
        self._model = BlockModel(checkpoint, device, _compute_dtype(device, self._value_dtype))
        patterns = (*ALWAYS_DENSE, *recipe.ignore)
        blocks = [name for index in range(len(self._model.blocks)) for name in self._model.linears(index)]
        self.kept: tuple[Kept, ...] = ()
        self._fisher: list[Tensor] = []
        self._curvature: dict[str, Tensor] = {}
        self._choose([name for name in blocks if not is_ignored(name, patterns)])

    def _choose(self, layers: list[str]) -> None:
        """Decide that ``layers`` are compressed and the others are not."""
        self.chosen, recipe, linears = layers, self.recipe, self._model.all_linears()
        dense = [name for name in linears if name not in set(layers)] + self._model.routers()
        self.dense = tuple(self.file_name(name) for name in dense)
        self._check_layers(linears)
        spec = LinearSpec(get_scheme(recipe.scheme), 0, 0, recipe.group, self._value_dtype, None, recipe.static_input)
        files = [self.file_name(name) for name in layers]
        self._tables = [self.file_name(self._model.embeddings())] if recipe.embeddings == "int8" else []
        self.output = make_output(
            recipe.format, spec, recipe.scale_dtype, recipe.mask_pattern, files, self.dense, self._tables
        )

    @torch.no_grad()
    def keep_dense(self, sequences: Sequences | None) -> None:
        """Take those layers out that the recipe's rule keeps dense, as the dense model's own inputs show."""
        if not self.recipe.keep_dense or sequences is None:
            return
        linears = self._model.all_linears()

        def extra_bytes(layer: str) -> int:
            n, k = linears[layer].out_features, linears[layer].in_features
            return self._bytes_written(f"{self.file_name(layer)}.weight") - self.output.nbytes(layer, n, k)

        with self.phases("keep dense"):
            model = BlockModel(self.checkpoint, self.device, _compute_dtype(self.device, self._value_dtype))
            batches = sequences.batches(self.batch_tokens)
            rule = KeepDense.parse(self.recipe.keep_dense)
            self.kept = self.world.from_one(choose_dense(rule, model, self.chosen, batches, extra_bytes))
        dense = {name for kept in self.kept for name in kept.layers}
        self._choose([name for name in self.chosen if name not in dense])

    def measure_fisher(self, sequences: Sequences | None) -> None:
        """Find what errors of each block's output cost, where the recipe asks for it."""
        if not self.recipe.curvature or sequences is None:
            return
        with self.phases("curvature"):
            dtype = _compute_dtype(self.device, self._value_dtype)
            model, blocks = self._model.whole(dtype)
            some = Sequences(sequences.rows[: -(-self.recipe.curvature // self.world.size)])
            self._fisher = block_fisher(model, blocks, some, self.recipe.seed, self.world)

    def file_name(self, layer: str) -> str:
        """Return what the checkpoint calls a layer."""
        return self._model.file_name(f"{layer}.weight").removesuffix(".weight")

    def calibration(
        self, source: str | Path | Tensor | Iterable[Tensor] | None
    ) -> tuple[Sequences | None, dict[str, Any] | None]:
        """Return the sequences and what the report says of them; None for both where no step needs them."""
        recipe = self.recipe
        if source is None or not recipe.needs_calibration:
            return None, None
        if isinstance(source, str | Path):
            self._check_length(recipe.seq_len)
            tokenizer = _tokenizer(self.checkpoint.path)
            sequences = load_calibration(source, tokenizer, recipe.num_samples, recipe.seq_len, recipe.seed)
        else:
            sequences = Sequences.of(source)
        self._check_length(sequences.longest)
        if recipe.generate:
            with self.phases("generate"):
                dtype = _compute_dtype(self.device, self._value_dtype)
                own = generate(self.checkpoint.path, sequences, recipe.generate, self.device, dtype, recipe.seed)
            sequences += Sequences.of(own)
        return sequences, {
            "source": str(source) if isinstance(source, str | Path) else "token ids",
            "sequences": len(sequences),
            "generated": recipe.generate,
            "tokens": sequences.tokens,
            "sha256": sequences.fingerprint(),
        }

    @torch.no_grad()
    def layers(
        self,
        writer: CheckpointWriter | Silent,
        sequences: Sequences | None,
        progress: Progress,
        manifest: Manifest | None = None,
    ) -> Iterator[LayerReport]:
        """Compress block after block and write each; the inputs of a block come from the compressed ones before it.

        Blocks that ``manifest`` knows are read from it, in the process that writes, and sent to the others. Each one
        that is finished here is added to it.
        """
        state = _Activations(self._model, sequences, self.batch_tokens, self.recipe.keeps_targets)
        finished = self.world.from_one(0 if manifest is None else len(manifest))
        for index in range(self.blocks):
            if index < finished:
                needed = finished < self.blocks  # else nobody needs what comes out of it
                own = None if manifest is None else (manifest.layers(index), manifest.tensors(index) if needed else {})
                reports, tensors = self.world.from_one(cast(tuple[list[LayerReport], dict[str, Tensor]], own))
                if needed:
                    self._restore(index, tensors, reports, state)
                progress.skip(len(reports), f"block {index} is finished")
            else:
                reports = list(self._compress_block(index, writer.add, state, progress))
                if manifest is not None:
                    manifest.add(reports)
            yield from reports

    @torch.no_grad()
    def rehearse(self, sequences: Sequences | None, progress: Progress) -> int:
        """Compress the first block and write it nowhere; return the bytes of the hidden states of ``sequences``."""
        state = _Activations(self._model, sequences, self.batch_tokens, self.recipe.keeps_targets)
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
        if self._is_table(name):
            return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in table_tensors(*info.shape))
        return info.nbytes // 2 if info.dtype == torch.float32 else info.nbytes

    def _is_tied_head(self, name: str) -> bool:
        return name == "lm_head.weight" and bool(self.checkpoint.config.get("tie_word_embeddings", False))

    def _is_table(self, name: str) -> bool:
        return name in {f"{table}.weight" for table in self._tables}

    def _compress_block(self, index: int, add: _Add, state: _Activations, progress: Progress) -> Iterator[LayerReport]:
        recipe = self.recipe
        with self.phases("load"):
            block = self._model.load(index)
        linears = self._linears(index)
        batches = state.batches(index)
        streams = self._find_streams(index, block, linears, batches, progress)
        if recipe.keeps_targets:
            with self.phases("propagate"), streams.dense():
                state.advance_targets(index, block)
        if recipe.smooth:
            with self.phases("smooth"):
                self._smooth(index, block, linears, batches, add)
        if recipe.curvature and batches:
            with self.phases("curvature"):
                self._curvature = output_curvature(
                    block, linears, batches, self._fisher[index], recipe.curvature, recipe.seed + index, self.world
                )
        inputs = [x for _, x in batches] if recipe.residual else []
        del batches  # which would keep every input until all outputs are there
        with streams.compared(inputs):
            yield from self._compress_linears(index, block, linears, streams, add, state, progress)
        self._model.release(index)

    def _find_streams(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
        progress: Progress,
    ) -> Streams:
        """Find which layers add to the residual stream, where the recipe asks for it."""
        writes = {}
        if self.recipe.residual and batches:
            with self.phases("calibrate"):
                writes = self.world.from_one(find_writes(block, linears, batches[0]))
            if not writes:
                progress.say(f"block {index}: no layer's output is added to the residual stream as it is")
        return Streams(block, linears, writes)

    def _compress_linears(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        streams: Streams,
        add: _Add,
        state: _Activations,
        progress: Progress,
    ) -> Iterator[LayerReport]:
        """Compress the layers of a block, and run it to the inputs of the next."""
        batches, outputs = state.batches(index), index + 1 < self.blocks
        if self.world.alone and self._in_stages(batches):
            leaders, ranges = self._find_leaders(block, linears, batches[0]), self.recipe.static_input
            staged = StagedBlock(block, linears, batches, leaders, ranges, outputs, streams)
            try:
                yield from self._write(self._pruned(linears, self._staged_groups(staged)), linears, add, progress)
                if outputs:
                    state.replace(staged.outputs())
            finally:
                staged.close()
        else:
            if self.world.alone:
                solved = self._solved(index, block, linears, streams, state, progress)
                yield from self._write(solved, linears, add, progress)
            else:
                yield from self._write_shared(index, block, linears, streams, state, add, progress)
            if outputs:
                del batches  # which would keep every input until all outputs are there
                with self.phases("propagate"):
                    state.advance(index, block)

    def _solved(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        streams: Streams,
        state: _Activations,
        progress: Progress,
    ) -> Iterator[tuple[Pruned, Inputs]]:
        """Prune a block that runs as a whole, and train what is left where the recipe asks for it."""
        batches = state.batches(index)
        groups = self._groups(block, linears, batches, streams)
        if not self.recipe.refine:
            return self._pruned(linears, groups)
        pruned = [one for one, _ in self._pruned(linears, groups)]
        self._refine(index, block, linears, pruned, batches, state.targets, progress)
        again = self._groups(block, linears, batches)
        return ((regroup(pruned, group.names), Inputs(group, self.recipe)) for group in again)

    def _write(
        self, pruned: Iterable[tuple[Pruned, Inputs]], linears: Mapping[str, nn.Linear], add: _Add, progress: Progress
    ) -> Iterator[LayerReport]:
        """Quantize and write layers, and put their new weights in place before the next ones are asked for."""
        for group, inputs in pruned:
            with self.phases("quantize"):
                quantized = list(quantize_layers(group, inputs, self.recipe, self._value_dtype))
            for hub, dense, report in quantized:
                linears[report.name].weight.copy_(dense)
                with self.phases("write"):
                    self._add_layer(add, report.name, hub)
                progress.step(_line(report))
                yield report

    def _write_shared(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        streams: Streams,
        state: _Activations,
        add: _Add,
        progress: Progress,
    ) -> Iterator[LayerReport]:
        """Do what ``_solved`` and ``_write`` do together with other processes."""
        batches = state.batches(index)
        pruned: list[Pruned] = []

        def prune(group: Group) -> tuple[dict[str, Tensor | None], Tensor, Tensor, Mapping[str, float]]:
            one, _ = self._prune(linears, group)
            # The others have the dense weights, but not those that are aimed at something else.
            weights = {name: None if group.lack is None else weight.cpu() for name, weight in one.weights.items()}
            return weights, one.sparse.cpu(), one.mask.cpu(), one.ratios

        def quantize(group: Group) -> list[tuple[Weight, LayerReport]]:
            if pruned:
                one, inputs = regroup(pruned, group.names), Inputs(group, self.recipe)
            else:
                one, inputs = self._prune(linears, group)
            with self.phases("quantize"):
                found = quantize_layers(one, inputs, self.recipe, self._value_dtype)
                return [(hub.to("cpu"), report) for hub, _, report in found]

        if self.recipe.refine:
            groups = self._groups(block, linears, batches, streams)
            for own, sparse, mask, ratios in self._shared(groups, linears, prune):
                weights = {
                    name: linears[name].weight.float() if weight is None else weight.to(self.device)
                    for name, weight in own.items()
                }
                curvature = {name: damp_outputs(self._curvature[name]) for name in own if name in self._curvature}
                pruned.append(Pruned(weights, sparse.to(self.device), mask.to(self.device), ratios, curvature))
            self._refine(index, block, linears, pruned, batches, state.targets, progress)
        groups = self._groups(block, linears, batches, None if pruned else streams)
        for layers in self._shared(groups, linears, quantize):
            for hub, report in layers:
                linears[report.name].weight.copy_(hub.to(self.device).to_dense())
                self._add_layer(add, report.name, hub)
                progress.step(_line(report))
                yield report

    def _shared(
        self, groups: Iterable[Group], linears: Mapping[str, nn.Linear], solve: Callable[[Group], _T]
    ) -> Iterator[_T]:
        """Solve each group in one of the processes; all of them get what the others found."""
        solved: list[_T | None] = []
        for number, group in enumerate(self.world.groups(groups, linears)):
            solved.append(solve(group) if self.world.owner(number) == self.world.rank else None)
        for number, own in enumerate(solved):
            with self.phases("share"):
                there = self.world.from_one(own, self.world.owner(number))
            yield cast(_T, there)

    def _in_stages(self, batches: Sequence[tuple[BlockCall, Tensor]]) -> bool:
        """Return whether a block's forward passes run once, in stages, and not once dense and once compressed.

        A GPU has no memory for it and no need: there, solving takes most of the time. Refinement needs all inputs of
        the dense block before any of its layers changes.
        """
        if self.device.type != "cpu" or self.recipe.refine or not batches:
            return False
        widest = max(k for _, k in self.shapes())
        return sum(x.shape[0] * x.shape[1] for _, x in batches) * widest * batches[0][1].itemsize <= _STAGED_BYTES

    def _find_leaders(
        self, block: nn.Module, linears: Mapping[str, nn.Linear], batch: tuple[BlockCall, Tensor]
    ) -> dict[str, str]:
        """Return who leads whom, found out once for blocks whose layers have the same names."""
        start = len(os.path.commonprefix([f"{name}." for name in linears]))  # noqa: RUF071 - all end with a dot
        own = tuple(name[start:] for name in linears)
        if own not in self._leaders:
            found = find_leaders(block, linears, batch)
            self._leaders[own] = {name[start:]: leader[start:] for name, leader in found.items()}
        return {name: name[:start] + self._leaders[own][name[start:]] for name in linears}

    def _staged_groups(self, staged: StagedBlock) -> Iterator[Group]:
        groups = staged.groups()
        while True:
            with self.phases("calibrate"):
                group = next(groups, None)
            if group is None:
                return
            yield group

    def _restore(
        self, index: int, tensors: Mapping[str, Tensor], reports: Sequence[LayerReport], state: _Activations
    ) -> None:
        """Put the ``tensors`` of a finished block in place of the dense ones, for the inputs of those after it."""
        with self.phases("propagate"):
            block = self._model.load(index)
            linears = self._linears(index)
            if self.recipe.keeps_targets:
                state.advance_targets(index, block)
            for name, parameter in block.named_parameters():  # what smoothing changed
                if (file_name := self._model.file_name(f"{self._model.prefix}.{index}.{name}")) in tensors:
                    parameter.copy_(tensors[file_name])
            for report in reports:
                layer = self.file_name(report.name)
                own = [name for name in tensors if name.rpartition(".")[0] == layer]
                parts = {name.rpartition(".")[2]: tensors[name].to(self.device) for name in own}
                linears[report.name].weight.copy_(self.output.read(layer, parts).to_dense())
            if self.world.alone and self._in_stages(batches := state.batches(index)):
                state.replace(run_side_by_side(block, batches))
            else:
                state.advance(index, block)
            self._model.release(index)

    def _linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the layers of a block that become 2:4."""
        chosen = set(self.chosen)
        return {name: linear for name, linear in self._model.linears(index).items() if name in chosen}

    def _pruned(self, linears: Mapping[str, nn.Linear], groups: Iterable[Group]) -> Iterator[tuple[Pruned, Inputs]]:
        for group in groups:
            yield self._prune(linears, group)

    def _prune(self, linears: Mapping[str, nn.Linear], group: Group) -> tuple[Pruned, Inputs]:
        with self.phases("prune"):
            inputs = Inputs(group, self.recipe)
            weights = {name: linears[name].weight.float() for name in group.names}
            curvature = {name: self._curvature[name] for name in group.names if name in self._curvature}
            return prune_layers(weights, inputs, self.recipe, curvature), inputs

    def _groups(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        batches: Sequence[tuple[BlockCall, Tensor]],
        streams: Streams | None = None,
    ) -> Iterator[Group]:
        """Run the block and yield what reached its layers, for each set of them that shares an input."""
        with self.phases("calibrate"), BlockHessians(linears, self.recipe.static_input, streams) as hessians:
            for number, (call, x) in enumerate(batches):
                with hessians.batch(number):
                    call.run(block, x)
        yield from hessians.groups()

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
        for name, value in smooth(block, prefix, linears.values(), batches, self.recipe.smooth, self.world).items():
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
        progress: Progress,
    ) -> None:
        """Put the pruned weights into the block, train them, and take them out again."""
        places = [(pruned, name, rows) for pruned in groups for name, rows in pruned.rows()]
        for pruned, name, rows in places:
            linears[name].weight.copy_(pruned.sparse[rows])
        masks = {linears[name]: pruned.mask[rows] for pruned, name, rows in places}
        examples = [(call, x, target) for (call, x), target in zip(batches, targets, strict=True)]
        with self.phases("refine"):
            result = refine(block, masks, examples, self.recipe.refine, self.recipe.seed, self.world)
        for pruned, name, rows in places:
            pruned.sparse[rows] = linears[name].weight
            linears[name].weight = nn.Parameter(linears[name].weight.to(batches[0][1].dtype), requires_grad=False)
        progress.say(f"block {index} refined: relative squared error {result.before:.4f} to {result.after:.4f}")

    def finish(self, writer: CheckpointWriter) -> int:
        """Write everything that is not a 2:4 layer; return the bytes of all tensors written."""
        config, written = dict(self.checkpoint.config), writer.names
        compressed = {f"{self.file_name(layer)}.weight" for layer in self.chosen}
        for name, info in self.checkpoint.tensors.items():
            if name in compressed or name in written or self._is_tied_head(name):
                continue
            tensor = self.checkpoint.load(name)
            if self._is_table(name):
                for last, coded in quantize_table(tensor).items():
                    writer.add(f"{name.removesuffix('.weight')}.{last}", coded)
                continue
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
        targets: the same in the dense model, which the compressed one works towards; empty without ``targeted``.
    """

    def __init__(self, model: BlockModel, sequences: Sequences | None, batch_tokens: int, targeted: bool) -> None:
        self._hidden: list[Tensor] = []
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        if sequences is not None:
            for batch in sequences.batches(batch_tokens):
                embedded, self._calls[batch.shape] = model.embed(batch)
                self._hidden.append(embedded)
        self.targets = list(self._hidden) if targeted else []

    def batches(self, index: int) -> list[tuple[BlockCall, Tensor]]:
        """Return the calls and inputs of block ``index``."""
        return [(self._calls[x.shape[:2]][index], x) for x in self._hidden]

    def advance(self, index: int, block: nn.Module) -> None:
        """Run all inputs through ``block``. In place, so that only one set of activations is ever held."""
        self._advance(self._hidden, index, block)

    def advance_targets(self, index: int, block: nn.Module) -> None:
        """Do the same with the targets; ``block`` is still dense."""
        self._advance(self.targets, index, block)

    def replace(self, hidden: list[Tensor]) -> None:
        """Take what came out of a block that was run elsewhere."""
        self._hidden = hidden

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
