"""One block of a job: its layers solved and written, and the hidden states run through it to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from vllm_sparse.compress.activations import Activations
from vllm_sparse.compress.calibrate import BlockHessians, Group
from vllm_sparse.compress.coupled import damp_outputs
from vllm_sparse.compress.curvature import output_curvature
from vllm_sparse.compress.layer import Inputs, LayerReport, Pruned, prune_layers, quantize_layers, regroup
from vllm_sparse.compress.output import Weight
from vllm_sparse.compress.progress import Progress
from vllm_sparse.compress.refine import refine
from vllm_sparse.compress.residual import Streams, find_writes
from vllm_sparse.compress.smooth import smooth
from vllm_sparse.compress.staged import StagedBlock, find_leaders

if TYPE_CHECKING:
    from vllm_sparse.compress.job import Job

Add = Callable[[str, Tensor], None]
_T = TypeVar("_T")


class BlockRun:
    """The steps of one block.

    Args:
        job: what the block is part of.
        index: of the block.
        add: takes the tensors to write, by their names in the checkpoint.
        state: the hidden states that reach the block; those that reach the next one when it is done.
    """

    def __init__(self, job: Job, index: int, add: Add, state: Activations, progress: Progress) -> None:
        self._job, self._recipe, self._phases, self._world = job, job.recipe, job.phases, job.world
        self._index, self._add, self._state, self._progress = index, add, state, progress
        with self._phases("load"):
            self._block = job.model.load(index)
        self._linears = job.block_linears(index)
        self._streams = self._find_streams()
        self._curvature: dict[str, Tensor] = {}

    def layers(self) -> Iterator[LayerReport]:
        """Compress the block's layers and yield a report of each one that is written."""
        recipe, state = self._recipe, self._state
        if recipe.keeps_targets:
            with self._phases("propagate"), self._streams.dense():
                state.advance_targets(self._index, self._block)
        if recipe.smooth:
            with self._phases("smooth"):
                self._smooth()
        if recipe.curvature and not state.is_empty:
            with self._phases("curvature"):
                self._curvature = output_curvature(
                    self._block, self._linears, state.batches(self._index), self._job.fisher[self._index],
                    recipe.curvature, recipe.seed + self._index, self._world,
                )  # fmt: skip
        inputs = [x for _, x in state.batches(self._index)] if recipe.residual else []
        with self._streams.compared(inputs):
            yield from self._compress()
        self._job.model.release(self._index)

    def _find_streams(self) -> Streams:
        """Find which layers add to the residual stream, where the recipe asks for it."""
        writes = {}
        if self._recipe.residual and not self._state.is_empty:
            with self._phases("calibrate"):
                first = self._state.batches(self._index)[0]
                writes = self._world.from_one(find_writes(self._block, self._linears, first))
            if not writes:
                self._progress.say(f"block {self._index}: no layer's output is added to the residual stream as it is")
        return Streams(self._block, self._linears, writes)

    def _compress(self) -> Iterator[LayerReport]:
        """Compress the layers, and run the block to the inputs of the next."""
        outputs = self._index + 1 < self._job.blocks
        if self._world.alone and self._job.in_stages(self._state, self._index):
            yield from self._compress_in_stages(outputs)
            return
        yield from self._write(self._solved()) if self._world.alone else self._write_shared()
        if outputs:
            with self._phases("propagate"):
                self._state.advance(self._index, self._block)

    def _compress_in_stages(self, outputs: bool) -> Iterator[LayerReport]:
        batches = self._state.batches(self._index)
        staged = StagedBlock(
            self._block, self._linears, batches, self._leaders(), self._recipe.static_input, outputs, self._streams
        )
        try:
            yield from self._write(self._pruned(self._staged_groups(staged)))
            if outputs:
                self._state.replace(staged.outputs())
        finally:
            staged.close()

    def _leaders(self) -> dict[str, str]:
        """Return who leads whom, found out once for blocks whose layers have the same names."""
        known, linears = self._job.leaders, self._linears
        start = len(os.path.commonprefix([f"{name}." for name in linears]))  # noqa: RUF071 - all end with a dot
        own = tuple(name[start:] for name in linears)
        if own not in known:
            found = find_leaders(self._block, linears, self._state.batches(self._index)[0])
            known[own] = {name[start:]: leader[start:] for name, leader in found.items()}
        return {name: name[:start] + known[own][name[start:]] for name in linears}

    def _staged_groups(self, staged: StagedBlock) -> Iterator[Group]:
        groups = staged.groups()
        while True:
            with self._phases("calibrate"):
                group = next(groups, None)
            if group is None:
                return
            yield group

    def _solved(self) -> Iterator[tuple[Pruned, Inputs]]:
        """Prune a block that runs as a whole, and train what is left where the recipe asks for it."""
        groups = self._groups(self._streams)
        if not self._recipe.refine:
            return self._pruned(groups)
        pruned = [one for one, _ in self._pruned(groups)]
        self._refine(pruned)
        return ((regroup(pruned, group.names), Inputs(group, self._recipe)) for group in self._groups())

    def _write(self, pruned: Iterable[tuple[Pruned, Inputs]]) -> Iterator[LayerReport]:
        """Quantize and write layers, and put their new weights in place before the next ones are asked for."""
        for group, inputs in pruned:
            with self._phases("quantize"):
                quantized = list(quantize_layers(group, inputs, self._recipe, self._job.value_dtype))
            for hub, dense, report in quantized:
                self._linears[report.name].weight.copy_(dense)
                with self._phases("write"):
                    self._add_layer(report.name, hub)
                self._progress.step(line(report))
                yield report

    def _write_shared(self) -> Iterator[LayerReport]:
        """Do what ``_solved`` and ``_write`` do together with other processes."""
        linears, device = self._linears, self._job.device
        pruned: list[Pruned] = []

        def prune(group: Group) -> tuple[dict[str, Tensor | None], Tensor, Tensor, Mapping[str, float]]:
            one, _ = self._prune(group)
            # The others have the dense weights, but not those that are aimed at something else.
            weights = {name: None if group.lack is None else weight.cpu() for name, weight in one.weights.items()}
            return weights, one.sparse.cpu(), one.mask.cpu(), one.ratios

        def quantize(group: Group) -> list[tuple[Weight, LayerReport]]:
            if pruned:
                one, inputs = regroup(pruned, group.names), Inputs(group, self._recipe)
            else:
                one, inputs = self._prune(group)
            with self._phases("quantize"):
                found = quantize_layers(one, inputs, self._recipe, self._job.value_dtype)
                return [(hub.to("cpu"), report) for hub, _, report in found]

        if self._recipe.refine:
            for own, sparse, mask, ratios in self._shared(self._groups(self._streams), prune):
                weights = {
                    name: linears[name].weight.float() if weight is None else weight.to(device)
                    for name, weight in own.items()
                }
                curvature = {name: damp_outputs(self._curvature[name]) for name in own if name in self._curvature}
                pruned.append(Pruned(weights, sparse.to(device), mask.to(device), ratios, curvature))
            self._refine(pruned)
        for layers in self._shared(self._groups(None if pruned else self._streams), quantize):
            for hub, report in layers:
                linears[report.name].weight.copy_(hub.to(device).to_dense())
                self._add_layer(report.name, hub)
                self._progress.step(line(report))
                yield report

    def _shared(self, groups: Iterable[Group], solve: Callable[[Group], _T]) -> Iterator[_T]:
        """Solve each group in one of the processes; all of them get what the others found."""
        solved: list[_T | None] = []
        for number, group in enumerate(self._world.groups(groups, self._linears)):
            solved.append(solve(group) if self._world.owner(number) == self._world.rank else None)
        for number, own in enumerate(solved):
            with self._phases("share"):
                there = self._world.from_one(own, self._world.owner(number))
            yield cast(_T, there)

    def _pruned(self, groups: Iterable[Group]) -> Iterator[tuple[Pruned, Inputs]]:
        for group in groups:
            yield self._prune(group)

    def _prune(self, group: Group) -> tuple[Pruned, Inputs]:
        with self._phases("prune"):
            inputs = Inputs(group, self._recipe)
            weights = {name: self._linears[name].weight.float() for name in group.names}
            curvature = {name: self._curvature[name] for name in group.names if name in self._curvature}
            return prune_layers(weights, inputs, self._recipe, curvature), inputs

    def _groups(self, streams: Streams | None = None) -> Iterator[Group]:
        """Run the block and yield what reached its layers, for each set of them that shares an input."""
        with (
            self._phases("calibrate"),
            BlockHessians(self._linears, self._recipe.static_input, streams) as hessians,
        ):
            for number, (call, x) in enumerate(self._state.batches(self._index)):
                with hessians.batch(number):
                    call.run(self._block, x)
        yield from hessians.groups()

    def _smooth(self) -> None:
        """Move large activations into the weights, and write what changed besides the layers that become 2:4."""
        job, batches = self._job, self._state.batches(self._index)
        prefix, strength = f"{job.model.prefix}.{self._index}.", self._recipe.smooth
        for name, value in smooth(self._block, prefix, self._linears.values(), batches, strength, self._world).items():
            if name.removesuffix(".weight") not in self._linears:
                file_name = job.model.file_name(name)
                dtype = job.checkpoint.tensors[file_name].dtype
                self._add(file_name, value.to(job.value_dtype if dtype == torch.float32 else dtype))

    def _refine(self, groups: Sequence[Pruned]) -> None:
        """Put the pruned weights into the block, train them, and take them out again."""
        linears, batches = self._linears, self._state.batches(self._index)
        places = [(pruned, name, rows) for pruned in groups for name, rows in pruned.rows()]
        for pruned, name, rows in places:
            linears[name].weight.copy_(pruned.sparse[rows])
        masks = {linears[name]: pruned.mask[rows] for pruned, name, rows in places}
        examples = [(call, x, target) for (call, x), target in zip(batches, self._state.targets, strict=True)]
        with self._phases("refine"):
            result = refine(self._block, masks, examples, self._recipe.refine, self._recipe.seed, self._world)
        for pruned, name, rows in places:
            pruned.sparse[rows] = linears[name].weight
            linears[name].weight = nn.Parameter(linears[name].weight.to(batches[0][1].dtype), requires_grad=False)
        self._progress.say(
            f"block {self._index} refined: relative squared error {result.before:.4f} to {result.after:.4f}"
        )

    def _add_layer(self, layer: str, hub: Weight) -> None:
        file_name = self._job.file_name(layer)
        for last, tensor in self._job.output.tensors(hub).items():
            self._add(f"{file_name}.{last}", tensor)


def line(report: LayerReport) -> str:
    """Return what is printed of a layer that is done."""
    optimum = "" if report.optimum_ratio is None else f"  optimum x{report.optimum_ratio:.3f}"
    note = f"  ({report.note})" if report.note else ""
    return f"{report.name}  error {report.error:.4f}{optimum}{note}"
