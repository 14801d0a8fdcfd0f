"""Cut by its ``TensorSpec`` alone, a layer of any format gives the shard of its weight; fused, the parts in a row."""

from functools import cache

import pytest
import torch

from tests.formats.encoders import encode
from tests.formats.golden import Case, config, layer
from vllm_sparse.formats import detect

MODULE = "model.layers.0.mlp.up_proj"
CASES = (
    Case("bitmask", "sparse-24-bitmask", 8, 64, 16, torch.bfloat16),
    Case("bitmask-fp8", "sparse-24-bitmask", 8, 64, 8, torch.float8_e4m3fn),
    Case("bitmask-int8-tensor", "sparse-24-bitmask", 8, 64, 8, group_size=0),
    Case("marlin-channel", "marlin-24", 256, 128, 4),
    Case("marlin-8bit", "marlin-24", 256, 128, 8),
    Case("marlin-group", "marlin-24", 256, 512, 4, group_size=128),
    Case("packed-group", "pack-quantized", 8, 128, 4, group_size=32),
    Case("packed-channel", "pack-quantized", 8, 64, 8),
    Case("packed-asymmetric", "pack-quantized", 32, 128, 4, group_size=32, symmetric=False),
    Case("quantized", "float-quantized", 8, 64, 8, torch.float8_e4m3fn),
    Case("quantized-tensor", "int-quantized", 8, 64, 8, group_size=0),
)


@cache
def stored(case):
    """Return the tensors of ``case`` in its format."""
    return encode(case, layer(case))


def cut(tensor, dim, start, stop, features):
    """Return the entries of ``tensor`` along ``dim`` for features start … stop, by the rule of ``TensorSpec``."""
    if dim is None:
        return tensor
    size = tensor.shape[dim]
    assert start * size % features == 0 and stop * size % features == 0
    return tensor.narrow(dim, start * size // features, (stop - start) * size // features)


def shard(case, rows, columns):
    """Return (weight of the shard, dense of the shard) for ranges of output and input features."""
    form, tensors, cut_tensors = detect(config(case)), stored(case), {}
    for spec in form.tensors(MODULE, case.n, case.k, torch.bfloat16):
        if spec.metadata:
            continue
        assert rows[0] % spec.output_multiple == 0 == rows[1] % spec.output_multiple
        if spec.input_dim is not None:
            assert columns[0] % spec.input_multiple == 0 == columns[1] % spec.input_multiple
        part = tensors[spec.name] if spec.per_part else cut(tensors[spec.name], spec.output_dim, *rows, case.n)
        cut_tensors[spec.name] = part if spec.per_part else cut(part, spec.input_dim, *columns, case.k)
    n, k = rows[1] - rows[0], columns[1] - columns[0]
    assert n % form.shard_n == 0 and k % form.shard_k == 0
    expected = form.to_weight(MODULE, tensors, [case.n]).to_dense(torch.float64)[slice(*rows), slice(*columns)]
    return form.to_weight(MODULE, cut_tensors, [n], case.k).to_dense(torch.float64), expected


@pytest.mark.parametrize("ways", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_along_both_dimensions(case, ways):
    for rank in range(ways):
        rows = (rank * case.n // ways, (rank + 1) * case.n // ways)
        columns = (rank * case.k // ways, (rank + 1) * case.k // ways)
        if rows[0] % 8 == 0 or case.symmetric:
            weight, expected = shard(case, rows, (0, case.k))
            assert torch.equal(weight, expected)
        weight, expected = shard(case, (0, case.n), columns)
        assert torch.equal(weight, expected)


def test_the_order_of_marlin_scales_is_that_of_the_whole_layer():
    case = CASES[5]
    form = detect(config(case))
    tensors = encode(case, layer(case))
    quarter = {}
    for spec in form.tensors(MODULE, case.n, case.k, torch.bfloat16):
        quarter[spec.name] = cut(tensors[spec.name], spec.input_dim, 0, 128, case.k)
    whole = form.to_weight(MODULE, tensors)
    assert torch.equal(form.to_weight(MODULE, quarter, full_k=512).scales, whole.scales[:, :1])
    assert not torch.equal(form.to_weight(MODULE, quarter).scales, whole.scales[:, :1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fused_parts_follow_each_other(case):
    """Two layers of different size, put one after the other along the output dimension, as q and k are."""
    form = detect(config(case))
    small = Case(case.name + "-small", case.format, case.n // 2, case.k, case.bits, case.dtype, case.group_size)
    small = Case(**(vars(small) | {"symmetric": case.symmetric}))
    both = [stored(part) for part in (case, small)]
    fused = {}
    for spec in form.tensors(MODULE, case.n + small.n, case.k, torch.bfloat16):
        parts = [tensors[spec.name] for tensors in both if spec.name in tensors]
        if not spec.metadata:
            fused[spec.name] = (
                torch.cat([part.view(torch.uint8) for part in parts], spec.output_dim or 0).view(parts[0].dtype)
                if parts[0].itemsize == 1
                else torch.cat(parts, spec.output_dim or 0)
            )
            if not spec.per_part:
                assert fused[spec.name].shape == spec.shape
    weight = form.to_weight(MODULE, fused, [case.n, small.n])
    apart = [form.to_weight(MODULE, tensors).to_dense(torch.float64) for tensors in both]
    assert torch.equal(weight.to_dense(torch.float64), torch.cat(apart))


def test_static_input_scales_of_fused_parts_become_the_largest():
    case = Case("static", "float-quantized", 8, 16, 8, torch.float8_e4m3fn)
    found = config(case)
    found["config_groups"]["group_0"]["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    tensors = encode(case, layer(case)) | {"input_scale": torch.tensor([0.25, 0.5])}
    assert detect(found).to_weight(MODULE, tensors, [4, 4]).input_scale.tolist() == [0.5]
    tensors["input_scale"] = torch.tensor(0.125, dtype=torch.bfloat16)
    assert detect(found).to_weight(MODULE, tensors).input_scale.tolist() == [0.125]
