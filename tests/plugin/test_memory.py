"""A dense checkpoint is compressed layer by layer: the dense model is never in memory as a whole."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from tests.plugin.conftest import VllmContext
from tests.plugin.layers import load, new_config, random_dense
from tests.tables import add_row

pytest.importorskip("vllm")
LAYERS, FEATURES = 80, 1024
STATUS = Path("/proc/self/status")


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


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells how much memory is no file")
def test_peak_is_the_compressed_model_and_one_layer(vllm_context: VllmContext) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    dense = random_dense(FEATURES, FEATURES)
    arguments = {"bias": False, "params_dtype": torch.bfloat16}
    with vllm_context():
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
    one = dense.nbytes
    compressed = sum(p.nbytes for layer in layers for p in layer.parameters())
    grown = peak.bytes - before
    megabytes = [f"{size / 1e6:.1f}" for size in (grown, compressed, LAYERS * one, one)]
    add_row("Memory while loading, MB", ("peak", "compressed", "dense", "one layer"), tuple(megabytes))
    assert compressed < LAYERS * one * 0.6
    # Positions are found through int64 indices of one block of rows, about ten times a layer's bf16 while it lasts, and
    # the allocator may keep one such block beside the one in use.
    assert grown < compressed + 20 * one
