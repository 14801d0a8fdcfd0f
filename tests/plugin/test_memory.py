"""A dense checkpoint is compressed layer by layer: the dense model is never in memory as a whole."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.plugin.conftest import make_context
from tests.plugin.layers import load, new_config, random_dense
from tests.tables import add_row

pytest.importorskip("vllm")
LAYERS, FEATURES = 80, 1024
STATUS = Path("/proc/self/status")
_MMAP_THRESHOLD = (
    -3
)  # of mallopt: what is larger goes back to the system when it is freed, so that fragments do not count


def anonymous_bytes() -> int:
    """Return the memory of this process that is no file."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Samples the memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())


def measure() -> tuple[int, int, int]:
    """Load ``LAYERS`` layers; return the bytes that memory grew by meanwhile, of the packed model, and of one layer."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    dense = random_dense(FEATURES, FEATURES)
    arguments = {"bias": False, "params_dtype": torch.bfloat16}
    with pytest.MonkeyPatch.context() as patch, make_context(patch)():
        config = new_config(None)
        warm = ReplicatedLinear(FEATURES, FEATURES, quant_config=new_config(None), prefix="warm", **arguments)
        load(warm, {"weight": dense})  # takes what the allocator keeps for the next layer
        layers = [
            ReplicatedLinear(FEATURES, FEATURES, quant_config=config, prefix=f"l{i}", **arguments)
            for i in range(LAYERS)
        ]
        gc.collect()
        before, peak = anonymous_bytes(), Peak()
        peak.start()
        for layer in layers:
            load(layer, {"weight": dense.clone()})
        peak.stopped.set()
        peak.join()
    return peak.bytes - before, sum(p.nbytes for layer in layers for p in layer.parameters()), dense.nbytes


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells how much memory is no file")
def test_peak_is_the_compressed_model_and_one_layer() -> None:
    # In a process of its own: what earlier tests have freed would be taken again without being seen.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        grown, compressed, one = pool.submit(measure).result()
    megabytes = [f"{size / 1e6:.1f}" for size in (grown, compressed, LAYERS * one, one)]
    add_row("Memory while loading, MB", ("peak", "compressed", "dense", "one layer"), tuple(megabytes))
    assert compressed < grown
    assert compressed < LAYERS * one * 0.6
    # Positions are found through int64 indices of one block of rows, several times a layer's bf16 while it lasts.
    assert grown < compressed + 10 * one
