"""Experts: the op against a plain sum, the loader against what may be wrong with a file, whole mixtures in vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.plugin.agreement import assert_greedy
from tests.plugin.conftest import PROMPTS
from tests.plugin.layers import random_hub
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.formats import Sparse24Format
from vllm_sparse.kernels.reference import ReferenceKernel, quantize_activations
from vllm_sparse.scheme import SCHEMES
from vllm_sparse.weight import Sparse24Weight

pytest.importorskip("vllm")
COUNT, HIDDEN, SIZE = 5, 128, 64


def make_experts(scheme: str, **named: Any) -> tuple[Any, list[Tensor], list[Tensor], list[list[Sparse24Weight]]]:
    """Return the op's description of random experts, their stacked tensors, and their weights."""
    from vllm_sparse.plugin.expert_op import Experts, Projection

    shapes = {"w13": (2 * SIZE, HIDDEN), "w2": (HIDDEN, SIZE)}
    weights = [[random_hub(*shape, scheme, seed) for seed in range(COUNT)] for shape in shapes.values()]
    projections, stacked = [], []
    for made in weights:
        spec = made[0].spec(torch.float32)
        packed = [ReferenceKernel().prepare(spec, weight) for weight in made]
        projections.append(Projection(spec, "reference", tuple(packed[0])))
        stacked.append([torch.stack([one[name] for one in packed]) for name in packed[0]])
    return Experts(*projections, "silu", named.get("weight_on_input", False)), *stacked, weights


def plain_sum(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: list[list[Sparse24Weight]], on_input: bool
) -> Tensor:
    def linear(weight: Sparse24Weight, row: Tensor) -> Tensor:
        if weight.scheme.activation is not None:
            codes, scale = quantize_activations(row, weight.scheme.activation, None)
            row = codes.float() * scale
        return weight.matmul(row)

    out = torch.zeros_like(x)
    for m in range(x.shape[0]):
        for share, expert in zip(topk_weights[m], topk_ids[m].tolist(), strict=True):
            if expert < 0:
                continue
            row = x[m : m + 1] * share if on_input else x[m : m + 1]
            gate, up = linear(weights[0][expert], row).chunk(2, dim=-1)
            out[m] += linear(weights[1][expert], silu(gate) * up)[0] * (1 if on_input else share)
    return out


@pytest.mark.parametrize("way", ["chosen", "all"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w4a16"])
def test_op_is_the_weighted_sum_of_experts(way: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse.plugin import expert_op

    experts, w13, w2, weights = make_experts(scheme)
    if way == "all":  # as in a CUDA graph
        monkeypatch.setattr(expert_op, "_run_chosen", expert_op._run_all)
    torch.manual_seed(0)
    x, share = torch.randn(7, HIDDEN), torch.rand(7, 2)
    ids = torch.tensor([[0, 3], [3, 0], [-1, 2], [-1, -1], [4, 2], [2, 4], [0, 2]], dtype=torch.int32)  # never 1
    got = torch.ops.vllm_sparse.experts(x, share, ids, w13, w2, expert_op.register(experts))
    torch.testing.assert_close(got, plain_sum(x, share, ids, weights, False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["chosen", "all"])
def test_routing_weights_on_the_input(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse.plugin import expert_op

    experts, w13, w2, weights = make_experts("bf16", weight_on_input=True)
    if way == "all":
        monkeypatch.setattr(expert_op, "_run_chosen", expert_op._run_all)
    x, share, ids = torch.randn(3, HIDDEN), torch.rand(3, 1), torch.tensor([[0], [3], [3]])
    got = torch.ops.vllm_sparse.experts(x, share, ids, w13, w2, expert_op.register(experts))
    torch.testing.assert_close(got, plain_sum(x, share, ids, weights, True), rtol=1e-4, atol=1e-4)


def test_no_tokens() -> None:
    from vllm_sparse.plugin import expert_op

    experts, w13, w2, _ = make_experts("bf16")
    none = torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64)
    assert torch.ops.vllm_sparse.experts(torch.empty(0, HIDDEN), *none, w13, w2, expert_op.register(experts)).shape == (
        0,
        HIDDEN,
    )


FORMAT = Sparse24Format(SCHEMES["w4a16"], group_size=32)


def expert_tensors(projection: str, rank: int = 0, size: int = 1, first: int = 0) -> tuple[Any, list[Any]]:
    """Return a stand-in for a layer with two of four experts, from ``first`` on, and the tensors of one projection."""
    from vllm_sparse.plugin.expert_loading import ExpertTensor

    layer = torch.nn.Module()
    parallel = SimpleNamespace(tp_rank=rank, tp_size=size)
    layer.moe_config = SimpleNamespace(num_local_experts=2, moe_parallel_config=parallel)
    layer._map_global_expert_id_to_local_expert_id = lambda e: e - first if first <= e < first + 2 else -1
    share = SIZE * 2 // size
    n, k = (2 * share, HIDDEN) if projection == "w13" else (HIDDEN, share)
    parts = (share, share) if projection == "w13" else (HIDDEN,)
    specs = FORMAT.tensors("m", n, k, torch.bfloat16)
    tensors = [ExpertTensor(projection, spec, "m.experts", parts, (), layer) for spec in specs]
    for tensor in tensors:
        layer.register_parameter(tensor.attribute, tensor.parameter(None))
    return layer, tensors


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("projection", ["w13", "w2"])
def test_ranks_hold_their_share_of_their_experts(projection: str, size: int) -> None:
    shape = (2 * SIZE, HIDDEN) if projection == "w13" else (HIDDEN, 2 * SIZE)
    shards = ("w1", "w3") if projection == "w13" else ("w2",)
    hubs = {(e, s): random_hub(*shape, "w4a16", seed=e + 9 * i) for e in range(4) for i, s in enumerate(shards)}
    hubs = {key: quantized_in_groups(weight) for key, weight in hubs.items()}
    for rank in range(size):
        layer, tensors = expert_tensors(projection, rank, size, first=2)
        for (expert, shard), weight in hubs.items():
            for name, tensor in FORMAT.from_weight(weight).items():
                parameter = layer.get_parameter(f"{projection}_{name}")
                done = parameter.weight_loader(parameter, tensor, name, shard, expert, return_success=True)
                assert done is (expert >= 2)
        loaded = {tensor.spec.name: tensor.take(layer) for tensor in tensors}
        for local in range(2):
            own = {name: tensor[local] for name, tensor in loaded.items()}
            wanted = [
                hubs[local + 2, shard].to_dense().chunk(size, 0 if len(shards) == 2 else 1)[rank] for shard in shards
            ]
            torch.testing.assert_close(FORMAT.to_weight("m", own).to_dense(), torch.cat(wanted), rtol=0, atol=0)


def quantized_in_groups(weight: Sparse24Weight) -> Sparse24Weight:
    scales = torch.rand(weight.n, weight.k // 32) + 0.1
    return Sparse24Weight(weight.scheme, weight.values, weight.positions, scales, 32)


def test_loader_names_what_is_wrong() -> None:
    layer, tensors = expert_tensors("w13")
    scale = layer.get_parameter("w13_weight_scale")
    right = torch.ones(2 * SIZE, HIDDEN // 32)
    message = r"m.experts: expert 1, .*: expected shape \[128, 4\] in the checkpoint, got \[64, 4\]"
    with pytest.raises(FormatError, match=message):
        scale.weight_loader(scale, right[:SIZE], "experts.w13_weight_scale", "w1", 1)
    with pytest.raises(FormatError, match=r"expert 0, .*: expected torch.float32 in the checkpoint, got torch.int32"):
        scale.weight_loader(scale, right.int(), "experts.w13_weight_scale", "w3", 0)
    for expert, shard in ((0, "w1"), (0, "w3"), (1, "w1")):
        scale.weight_loader(scale, right, "experts.w13_weight_scale", shard, expert)
    taken = next(tensor for tensor in tensors if tensor.spec.name == "weight_scale")
    with pytest.raises(
        FormatError, match=r"m.experts: tensor weight_scale of expert 1 \(w3\) is not in the checkpoint"
    ):
        taken.take(layer)


@pytest.mark.serve
@pytest.mark.parametrize(
    ("kind", "scheme", "eager"),
    [("mixtral", "w4a16", True), ("mixtral", "bf16", False), ("qwen3_moe", "fp8", True)],
)
def test_native_mixture(engine: Any, tmp_path: Path, kind: str, scheme: str, eager: bool) -> None:
    from tests.plugin.mixtures import save_native

    stored = save_native(tmp_path, kind, scheme)
    row = ("native", scheme, f"{kind}{'' if eager else ', compiled'}")
    assert_greedy(stored.reference, PROMPTS, engine(stored.path, enforce_eager=eager), row)


@pytest.mark.serve
@pytest.mark.parametrize("dense", [(), ("layers.1.block_sparse_moe.experts.2.w1",)])
def test_mixture_found_to_be_sparse(engine: Any, tmp_path: Path, dense: tuple[str, ...]) -> None:
    """One expert that is not 2:4 leaves all of its layer to vLLM."""
    from tests.plugin.mixtures import reference, save_dense

    path = save_dense(tmp_path / "m", "mixtral", dense)
    row = ("dense", "bf16", "mixtral, one expert not 2:4" if dense else "mixtral")
    assert_greedy(reference(path), PROMPTS, engine(path, quantization="sparse24"), row)


def test_converted_mixture_has_a_weight_for_each_expert(tmp_path: Path) -> None:
    from tests.plugin.mixtures import save_dense
    from vllm_sparse.formats.checkpoint import Checkpoint
    from vllm_sparse.formats.convert import convert

    summary = convert(save_dense(tmp_path / "m", "mixtral"), tmp_path / "out")
    assert summary.sparse == 2 * (4 + 3 * 4) and len(summary.dense) == 3
    with Checkpoint(tmp_path / "out") as made:
        assert made.config["quantization_config"]["ignore"] == [
            "lm_head",
            "model.layers.0.block_sparse_moe.gate",
            "model.layers.1.block_sparse_moe.gate",
        ]
        assert made.tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight_packed"].shape == (128, 128)


def test_experts_in_one_tensor_are_not_converted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.plugin.mixtures import save_dense
    from vllm_sparse.formats.convert import convert

    file = save_dense(tmp_path / "m", "mixtral") / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 128, 256)}, file)
    message = "model.layers.0.mlp.experts: holds all experts in one tensor down_proj"
    with pytest.raises(FormatError, match=message):
        convert(tmp_path / "m", tmp_path / "out")


@pytest.mark.serve
def test_adapters_are_refused(engine: Any, tmp_path: Path) -> None:
    from tests.plugin.mixtures import save_native

    with pytest.raises(
        UnsupportedError, match=r"block_sparse_moe.experts: 2:4 experts with LoRA adapters on the model"
    ):
        engine(save_native(tmp_path, "mixtral", "bf16").path, enable_lora=True)


@pytest.mark.serve
def test_dummy_mixture(engine: Any, tmp_path: Path) -> None:
    from tests.plugin.mixtures import save_native

    path = save_native(tmp_path, "mixtral", "w4a16").path
    assert len(engine(path, load_format="dummy")) == len(PROMPTS)
