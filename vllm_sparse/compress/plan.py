"""What a run would do, before it does it: layers, bytes, memory and time, the last two measured on the first block."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vllm_sparse.compress.job import Job
from vllm_sparse.compress.progress import Progress, clock
from vllm_sparse.compress.recipe import Recipe
from vllm_sparse.compress.sequences import Sequences


@dataclass(frozen=True)
class Plan:
    """The result of a dry run.

    Attributes:
        recipe: every option, defaults resolved.
        device: where the run would compute.
        blocks: how many repeated blocks the model has.
        shapes: how many 2:4 layers there are of each (n, k).
        dense: bytes of every linear layer that stays dense, by name; 0 for a head that shares the embedding's weight.
        bytes_before, bytes_after: size of all tensors.
        tokens: calibration tokens.
        activation_bytes: what the hidden states between two blocks take, of all tokens.
        device_bytes: the most GPU memory that the first block took, activations of all tokens included; None on a CPU.
        block_seconds: time of the first block, with all tokens.
        seconds: time of all blocks.
    """

    recipe: Recipe
    device: str
    blocks: int
    shapes: dict[tuple[int, int], int]
    dense: dict[str, int]
    bytes_before: int
    bytes_after: int
    tokens: int
    activation_bytes: int
    device_bytes: int | None
    block_seconds: float
    seconds: float

    def to_text(self) -> str:
        """Return the plan as a few lines."""
        size = f", group size {self.recipe.group}" if self.recipe.group > 0 else ""
        layers = f"{sum(self.shapes.values())} layers in {self.blocks} blocks"
        shapes = ", ".join(f"{count} of {n} x {k}" for (n, k), count in self.shapes.items())
        dense = ", ".join(f"{name} ({_megabytes(size)})" for name, size in self.dense.items()) or "none"
        memory = f"{_megabytes(self.activation_bytes)} of activations"
        if self.device_bytes is not None:
            memory += f", {_megabytes(self.device_bytes)} at most on the GPU"
        return "\n".join(
            (
                f"{self.recipe.pattern:8} {layers}, {self.recipe.scheme}{size}: {shapes}",
                f"dense    {dense}",
                f"bytes    {_megabytes(self.bytes_before)} to {_megabytes(self.bytes_after)}",
                f"memory   {memory}",
                f"time     about {clock(self.seconds)} on {self.device}, {clock(self.block_seconds)} a block with "
                f"{self.tokens} tokens",
                "dry run: nothing was written",
            )
        )


def make_plan(job: Job, sequences: Sequences | None) -> Plan:
    """Compress the first block with one batch of ``sequences``, forget it, and return the plan."""
    batch = None if sequences is None else Sequences.of(sequences.batches(job.batch_tokens)[0])
    hidden_bytes = job.rehearse(batch, Progress(1, quiet=True))
    batches = 1.0 if sequences is None or batch is None else sequences.tokens / batch.tokens
    passes = sum(job.phases.seconds.get(name, 0.0) for name in ("calibrate", "propagate"))
    solving = sum(job.phases.seconds.values()) - passes
    first, whole = (sum(n * k for n, k in shapes) for shapes in (job.shapes(first_block=True), job.shapes()))
    block_seconds = passes * batches + solving
    activations = round(hidden_bytes * batches) * (2 if job.recipe.keeps_targets else 1)
    peak = max(job.phases.peak_bytes.values(), default=None)
    return Plan(
        recipe=job.recipe,
        device=str(job.device),
        blocks=job.blocks,
        shapes=dict(Counter(job.shapes())),
        dense=job.dense_bytes(),
        bytes_before=sum(info.nbytes for info in job.checkpoint.tensors.values()),
        bytes_after=job.bytes_after(),
        tokens=0 if sequences is None else sequences.tokens,
        activation_bytes=activations,
        device_bytes=None if peak is None else peak + activations,
        block_seconds=block_seconds,
        seconds=block_seconds * whole / first,
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
