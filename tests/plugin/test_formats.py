"""Every published format through vLLM's own loaders: fused layers and every rank's shard against the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.encoders import encode
from tests.formats.golden import CASES, Case, config, layer
from tests.plugin.conftest import VllmContext, needs_vnni
from tests.plugin.layers import PARTS
from vllm_sparse.errors import FormatError, NotSparseError, UnsupportedError

pytest.importorskip("vllm")
SERVED = [case for case in CASES if case.two_of_four and case.format != "sparse-bitmask"]


def sized(case: Case, n: int, k: int) -> Case:
    """Return ``case`` with another size; its name salts the numbers."""
    return replace(case, n=n, k=k, name=f"{case.name}-{n}")


def new_config(case: Case) -> Any:
    from vllm_sparse.plugin.config import Sparse24Config

    made = Sparse24Config.from_config(config(case))
    made.packed_modules_mapping = PARTS
    return made


def make(kind: str, quant_config: Any, sizes: list[int], k: int, dtype: torch.dtype) -> Any:
    from vllm.model_executor.layers import linear

    common = {"bias": False, "params_dtype": dtype, "quant_config": quant_config, "prefix": f"model.layers.0.{kind}"}
    if kind == "gate_up_proj":
        return linear.MergedColumnParallelLinear(k, sizes, **common)
    return linear.RowParallelLinear(k, sizes[0], **common)


def dequantized(case: Case) -> Tensor:
    made = layer(case)
    codes, scales = made["codes"].float(), made.get("scales")
    if scales is None:
        return codes
    return (
        codes.unflatten(1, (1 if scales.dim() == 1 else scales.shape[1], -1)) * scales.float().unsqueeze(-1)
    ).flatten(1)


def load(vllm_layer: Any, case: Case, shard: Any = None) -> None:
    """Load what ``case`` has on disk, by the names that vLLM's mapper leaves of them."""
    quant_config = vllm_layer.quant_config
    stored = {f"x.{name}": tensor for name, tensor in encode(case, layer(case)).items()}
    for full_name, tensor in quant_config.get_cache_scale_mapper().apply(stored.items()):
        parameter = getattr(vllm_layer, full_name.removeprefix("x."))
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def product(vllm_layer: Any, k: int, dtype: torch.dtype) -> Tensor:
    """Return the weight as the layer applies it, ``[n, k]``."""
    vllm_layer.quant_method.process_weights_after_loading(vllm_layer)
    return vllm_layer.quant_method.apply(vllm_layer, torch.eye(k, dtype=dtype)).T.float()


def dtype_of(case: Case) -> torch.dtype:
    return torch.float16 if case.dtype == torch.float16 else torch.bfloat16


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_fused_layers_hold_their_parts(vllm_context: VllmContext, case: Case, size: int) -> None:
    k, dtype = 256, dtype_of(case)
    parts = [sized(case, 128, k), sized(case, 256, k)]
    for rank in range(size):
        with vllm_context(rank, size):
            fused = make("gate_up_proj", new_config(case), [part.n for part in parts], k, dtype)
            for shard, part in enumerate(parts):
                load(fused, part, shard)
            got = product(fused, k, dtype)
        expected = [dequantized(part).chunk(size)[rank] for part in parts]
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_shards_of_input_features_make_the_whole(vllm_context: VllmContext, case: Case) -> None:
    whole, dtype, columns = sized(case, 128, 512), dtype_of(case), []
    for rank in range(2):
        with vllm_context(rank, 2):
            row = make("down_proj", new_config(case), [128], 512, dtype)
            load(row, whole)
            columns.append(product(row, 256, dtype))
    torch.testing.assert_close(torch.cat(columns, 1), dequantized(whole), rtol=1e-2, atol=1e-6)


def test_tiles_that_a_shard_would_cut_are_an_error(vllm_context: VllmContext) -> None:
    case = next(case for case in CASES if case.format == "marlin-24")
    message = r"cuts a \[128, 256\] layer so that a rank gets 32 output .* not a multiple of 64 as the marlin-24"
    with vllm_context(0, 2), pytest.raises(UnsupportedError, match=message):
        make("gate_up_proj", new_config(case), [64, 64], 256, torch.float16)


def test_targets_may_name_the_parts_of_a_fused_layer(vllm_context: VllmContext) -> None:
    case = sized(next(case for case in SERVED if case.name == "bitmask-fp8"), 64, 64)
    found = config(case)
    found["config_groups"]["group_0"]["targets"] = ["re:.*gate_proj$", "re:.*up_proj$"]
    found["sparsity_config"]["targets"] = ["re:.*gate_proj$", "re:.*up_proj$"]
    with vllm_context():
        from vllm_sparse.plugin.config import Sparse24Config

        made = Sparse24Config.from_config(found)
        made.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        fused = make("gate_up_proj", made, [64, 64], 64, torch.bfloat16)
        assert fused.quant_method.scheme.name == "fp8"


def test_unstructured_bitmask_says_how_to_convert_it() -> None:
    case = next(case for case in CASES if case.format == "sparse-bitmask")
    with pytest.raises(FormatError, match="convert it once with 'vllm-sparse convert SRC -o OUT'"):
        new_config(case)


@needs_vnni
def test_quantized_layer_that_is_not_sparse_is_served_by_vllm(vllm_context: VllmContext) -> None:
    case = next(case for case in CASES if case.name == "quantized-int8-tensor")
    sparse, full = sized(case, 128, 256), replace(sized(case, 128, 256), two_of_four=False)
    quant_config = new_config(replace(case, two_of_four=True))
    with vllm_context():
        layers = [make("down_proj", quant_config, [128], 256, torch.bfloat16) for _ in range(2)]
        layers[1].quant_method.module = "model.layers.1.down_proj"
        for made, part in zip(layers, (sparse, full), strict=True):
            load(made, part)
        for made, part in zip(layers, (sparse, full), strict=True):
            torch.testing.assert_close(product(made, 256, torch.bfloat16), dequantized(part), rtol=1e-2, atol=1e-6)
    assert quant_config.report.lines()[1] == "sparse24: 1 not 2:4, served dense: model.layers.1.down_proj"


def test_strict_makes_a_quantized_layer_that_is_not_sparse_an_error(vllm_context: VllmContext) -> None:
    case = next(case for case in CASES if case.name == "packed-4bit-g32")
    full = replace(sized(case, 128, 256), two_of_four=False)
    with vllm_context(options={"strict": True}):
        made = make("down_proj", new_config(case), [128], 256, torch.bfloat16)
        with pytest.raises(NotSparseError, match=r"model.layers.0.down_proj: \d+ of 8192 groups of four"):
            load(made, full)
