"""One model and one recipe: which layers become 2:4, and the blocks compressed one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from vllm_sparse.compress.activations import Activations
from vllm_sparse.compress.block import BlockRun
from vllm_sparse.compress.calibration import load_calibration
from vllm_sparse.compress.curvature import block_fisher
from vllm_sparse.compress.generate import generate
from vllm_sparse.compress.keep_dense import KeepDense, Kept
from vllm_sparse.compress.layer import LayerReport
from vllm_sparse.compress.manifest import Manifest
from vllm_sparse.compress.memory import keep_freed_memory
from vllm_sparse.compress.model import BlockModel
from vllm_sparse.compress.output import make_output
from vllm_sparse.compress.phases import Phases
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.recipe import ALWAYS_DENSE, Recipe
from vllm_sparse.compress.report import Verification, verify
from vllm_sparse.compress.sensitivity import choose_dense
from vllm_sparse.compress.sequences import Sequences
from vllm_sparse.compress.staged import run_side_by_side
from vllm_sparse.compress.world import Silent, World
from vllm_sparse.errors import FormatError, OptionError
from vllm_sparse.formats.checkpoint import Checkpoint, CheckpointWriter
from vllm_sparse.formats.embedding import quantize_table, table_tensors
from vllm_sparse.formats.names import is_ignored
from vllm_sparse.scheme import check_group_size, get_scheme
from vllm_sparse.weight import LinearSpec

_BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}  # a CPU works out of its caches
_STAGED_BYTES = 4 << 30  # of the inputs of the widest layer, which a pass in stages holds for all tokens


class Job:
    """A checkpoint, the layers of it that become 2:4, and the steps from one to the other.

    Attributes:
        value_dtype: of the model as it is written; 16 bits.
        fisher: F of each block's output, where the recipe asks for it.
        leaders: see ``find_leaders``, by the names of a block's layers.
    """

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
        self.leaders: dict[tuple[str, ...], dict[str, str]] = {}
        self.batch_tokens = _BATCH_TOKENS.get(device.type, 8192)
        if recipe.refine:  # a training step takes a batch of every process
            self.batch_tokens //= self.world.size
        self.value_dtype = _source_dtype(checkpoint)
        self.model = BlockModel(checkpoint, device, _compute_dtype(device, self.value_dtype))
        patterns = (*ALWAYS_DENSE, *recipe.ignore)
        blocks = [name for index in range(len(self.model.blocks)) for name in self.model.linears(index)]
        self.kept: tuple[Kept, ...] = ()
        self.fisher: list[Tensor] = []
        self._choose([name for name in blocks if not is_ignored(name, patterns)])

    def _choose(self, layers: list[str]) -> None:
        """Decide that ``layers`` are compressed and the others are not."""
        self.chosen, recipe, linears = layers, self.recipe, self.model.all_linears()
        dense = [name for name in linears if name not in set(layers)] + self.model.routers()
        self.dense = tuple(self.file_name(name) for name in dense)
        self._check_layers(linears)
        spec = LinearSpec(get_scheme(recipe.scheme), 0, 0, recipe.group, self.value_dtype, None, recipe.static_input)
        files = [self.file_name(name) for name in layers]
        self._tables = [self.file_name(self.model.embeddings())] if recipe.embeddings == "int8" else []
        self.output = make_output(
            recipe.format, spec, recipe.scale_dtype, recipe.mask_pattern, files, self.dense, self._tables
        )

    @torch.no_grad()
    def keep_dense(self, sequences: Sequences | None) -> None:
        """Take those layers out that the recipe's rule keeps dense, as the dense model's own inputs show."""
        if not self.recipe.keep_dense or sequences is None:
            return
        linears = self.model.all_linears()

        def extra_bytes(layer: str) -> int:
            n, k = linears[layer].out_features, linears[layer].in_features
            return self._bytes_written(f"{self.file_name(layer)}.weight") - self.output.nbytes(layer, n, k)

        with self.phases("keep dense"):
            model = BlockModel(self.checkpoint, self.device, _compute_dtype(self.device, self.value_dtype))
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
            dtype = _compute_dtype(self.device, self.value_dtype)
            model, blocks = self.model.whole(dtype)
            some = Sequences(sequences.rows[: -(-self.recipe.curvature // self.world.size)])
            self.fisher = block_fisher(model, blocks, some, self.recipe.seed, self.world)

    def file_name(self, layer: str) -> str:
        """Return what the checkpoint calls a layer."""
        return self.model.file_name(f"{layer}.weight").removesuffix(".weight")

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
                dtype = _compute_dtype(self.device, self.value_dtype)
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
        state = Activations(self.model, sequences, self.batch_tokens, self.recipe.keeps_targets)
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
                reports = list(BlockRun(self, index, writer.add, state, progress).layers())
                if manifest is not None:
                    manifest.add(reports)
            yield from reports

    @torch.no_grad()
    def rehearse(self, sequences: Sequences | None, progress: Progress) -> int:
        """Compress the first block and write it nowhere; return the bytes of the hidden states of ``sequences``."""
        state = Activations(self.model, sequences, self.batch_tokens, self.recipe.keeps_targets)
        for _ in BlockRun(self, 0, lambda name, tensor: None, state, progress).layers():
            pass
        return sum(x.nbytes for _, x in state.batches(0))

    @property
    def blocks(self) -> int:
        """How many repeated blocks the model has."""
        return len(self.model.blocks)

    def shapes(self, first_block: bool = False) -> list[tuple[int, int]]:
        """Return (n, k) of every layer that becomes 2:4."""
        linears = self.model.linears(0) if first_block else self.model.all_linears()
        return [(linears[name].out_features, linears[name].in_features) for name in self.chosen if name in linears]

    def dense_bytes(self) -> dict[str, int]:
        """Return the bytes of every linear layer that stays dense, by name."""
        return {name: self._bytes_written(f"{name}.weight") for name in self.dense}

    def bytes_after(self) -> int:
        """Return the bytes of all tensors that a run writes."""
        linears = self.model.all_linears()
        compressed = {f"{self.file_name(layer)}.weight" for layer in self.chosen}
        copied = (name for name in self.checkpoint.tensors if name not in compressed | self.model.packed.keys())
        total = sum(self._bytes_written(name) for name in copied)
        for packed, parts in self.model.packed.items():
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

    def in_stages(self, state: Activations, index: int) -> bool:
        """Return whether a block's forward passes run once, in stages, and not once dense and once compressed.

        A GPU has no memory for it and no need: there, solving takes most of the time. Refinement needs all inputs of
        the dense block before any of its layers changes.
        """
        if self.device.type != "cpu" or self.recipe.refine or state.is_empty:
            return False
        batches, widest = state.batches(index), max(k for _, k in self.shapes())
        return sum(x.shape[0] * x.shape[1] for _, x in batches) * widest * batches[0][1].itemsize <= _STAGED_BYTES

    def _restore(
        self, index: int, tensors: Mapping[str, Tensor], reports: Sequence[LayerReport], state: Activations
    ) -> None:
        """Put the ``tensors`` of a finished block in place of the dense ones, for the inputs of those after it."""
        with self.phases("propagate"):
            block = self.model.load(index)
            linears = self.block_linears(index)
            if self.recipe.keeps_targets:
                state.advance_targets(index, block)
            for name, parameter in block.named_parameters():  # what smoothing changed
                if (file_name := self.model.file_name(f"{self.model.prefix}.{index}.{name}")) in tensors:
                    parameter.copy_(tensors[file_name])
            for report in reports:
                layer = self.file_name(report.name)
                own = [name for name in tensors if name.rpartition(".")[0] == layer]
                parts = {name.rpartition(".")[2]: tensors[name].to(self.device) for name in own}
                linears[report.name].weight.copy_(self.output.read(layer, parts).to_dense())
            if self.world.alone and self.in_stages(state, index):
                state.replace(run_side_by_side(block, state.batches(index)))
            else:
                state.advance(index, block)
            self.model.release(index)

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the layers of a block that become 2:4."""
        chosen = set(self.chosen)
        return {name: linear for name, linear in self.model.linears(index).items() if name in chosen}

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
            tensor = tensor.to(self.value_dtype) if info.dtype == torch.float32 else tensor
            if (parts := self.model.packed.get(name)) is None:
                writer.add(name, tensor)
                continue
            for own, part in parts.items():
                if own not in compressed:
                    writer.add(own, tensor[part.expert, part.rows])
        if (quantization := self.output.config()) is not None:
            config["quantization_config"] = quantization
        config.pop("torch_dtype", None)
        config["dtype"] = _dtype_name(self.value_dtype)
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
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise OptionError(f"sequences of {length} tokens are longer than the model's {longest} positions")


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
