"""Single vLLM linear layers: every rank's shard against the whole, and every way a checkpoint can be wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.plugin.conftest import VllmContext
from tests.plugin.layers import SHARDS, format_of, load, new_config, random_dense, random_hub
from vllm_sparse.errors import FormatError, NotSparseError, UnsupportedError
from vllm_sparse.scheme import get_scheme
from vllm_sparse.weight import Sparse24Weight

pytest.importorskip("vllm")

SCHEMES = ("bf16", "fp8", "int8", "w4a16", "w8a16")
HEADS, KV_HEADS, HEAD = 8, 2, 16
HIDDEN = 512


def make(kind: str, config: Any) -> Any:
    """Return a vLLM layer of a small Llama."""
    from vllm.model_executor.layers import linear

    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": f"layers.0.{kind}"}
    if kind == "qkv_proj":
        return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
    if kind == "gate_up_proj":
        return linear.MergedColumnParallelLinear(HIDDEN, [256, 256], **common)
    if kind == "down_proj":
        return linear.RowParallelLinear(HIDDEN, 256, **common)
    return linear.ReplicatedLinear(HIDDEN, 256, **common)


PART_SIZES = {
    "qkv_proj": [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD],
    "gate_up_proj": [256, 256],
    "down_proj": [256],
    "gate": [256],
}


def loaded_layer(kind: str, weights: list[Sparse24Weight]) -> Any:
    """Return a layer loaded from one hub weight per part."""
    fmt = format_of(weights[0])
    layer = make(kind, new_config(fmt))
    for weight, shard in zip(weights, SHARDS.get(kind, [None]), strict=True):
        load(layer, fmt.from_weight(weight), shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def part_weights(kind: str, scheme: str) -> list[Sparse24Weight]:
    return [random_hub(n, HIDDEN, scheme, seed) for seed, n in enumerate(PART_SIZES[kind])]


def dense_of(weights: list[Sparse24Weight]) -> list[Tensor]:
    return [weight.to_dense() for weight in weights]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj"])
def test_shards_of_output_features_hold_the_whole(vllm_context: VllmContext, kind: str, size: int, scheme: str) -> None:
    weights = part_weights(kind, scheme)
    for rank in range(size):
        with vllm_context(rank, size):
            layer = loaded_layer(kind, weights)
        method = layer.quant_method
        expected = []
        for number, dense in enumerate(dense_of(weights)):
            per_rank = method.parts[number]
            # Fewer key-value heads than ranks: neighbouring ranks hold the same head.
            copies = per_rank * size // dense.shape[0]
            expected.append(dense[rank // copies * per_rank :][:per_rank])
        got = method.kernel.apply(method.spec, packed_of(layer), torch.eye(HIDDEN, dtype=torch.bfloat16), None, None)
        # Identity activations are exact in every scheme: one non-zero per token, equal to the token's largest value.
        torch.testing.assert_close(got.T.float(), torch.cat(expected), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("kind", "gated"), [("qkv_proj", False), ("gate_up_proj", True), ("down_proj", False)])
def test_two_equal_parts_are_a_gate_and_what_it_multiplies(vllm_context: VllmContext, kind: str, gated: bool) -> None:
    with vllm_context():
        layer = loaded_layer(kind, part_weights(kind, "w4a16"))
    assert layer.quant_method.spec.gated is gated


def packed_of(layer: Any) -> dict[str, Tensor]:
    return {name: getattr(layer, attribute) for name, attribute in layer.quant_method._attributes.items()}


@pytest.mark.parametrize(
    ("scheme", "size"),
    [(name, size) for name in SCHEMES for size in (1, 2, 4, 8) if size < 8 or not get_scheme(name).grouped],
)  # an eighth is less than a group of 128
def test_shards_of_input_features_sum_to_the_whole(vllm_context: VllmContext, scheme: str, size: int) -> None:
    (weight,) = part_weights("down_proj", scheme)
    columns = []
    for rank in range(size):
        with vllm_context(rank, size):
            layer = loaded_layer("down_proj", [weight])
        identity = torch.eye(HIDDEN // size, dtype=torch.bfloat16)
        columns.append(layer.quant_method.apply(layer, identity).T.float())
    torch.testing.assert_close(torch.cat(columns, 1), weight.to_dense(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_replicated_layer_takes_any_leading_shape_and_a_bias(vllm_context: VllmContext, scheme: str) -> None:
    (weight,) = part_weights("gate", scheme)
    with vllm_context(1, 2):
        layer = loaded_layer("gate", [weight])
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-1, 1, 256).bfloat16()
    expected = weight.matmul(x.float()) + bias.float()
    got = layer.quant_method.apply(layer, x, bias).float()
    assert got.shape == (2, 3, 256)
    # bf16 output: 2^-9; int8 and e4m3 activations: about 1 % and 3 % of the norm.
    bound = {"fp8": 0.05, "int8": 0.02}.get(scheme, 0.005)
    assert (got - expected).norm() / expected.norm() < bound


def test_static_scales_of_fused_parts_become_their_largest(vllm_context: VllmContext) -> None:
    scales = [0.25, 0.5, 0.125]
    weights = [
        random_hub(n, HIDDEN, "fp8", seed, scale)
        for seed, (n, scale) in enumerate(zip(PART_SIZES["qkv_proj"], scales, strict=True))
    ]
    with vllm_context():
        layer = loaded_layer("qkv_proj", weights)
    assert layer.quant_method.spec.static_input
    assert layer.input_scale.tolist() == [0.5]


@pytest.mark.parametrize("static", [False, True])
def test_activations_with_a_zero_point(vllm_context: VllmContext, static: bool) -> None:
    """Through the kernel that quantizes them itself, and through one that takes codes."""
    from vllm_sparse.kernels.reference import ReferenceKernel, quantize_asymmetric

    class TakesCodes(ReferenceKernel):
        quantizes_input = False

    weights = []
    for seed, (n, zero) in enumerate(zip(PART_SIZES["gate_up_proj"], (-100, 20), strict=True)):
        weight = random_hub(n, HIDDEN, "int8", seed, 0.03 if static else None)
        given = torch.tensor([zero], dtype=torch.int32) if static else None
        weights.append(replace(weight, symmetric_input=False, input_zero=given, layer="gate_up_proj"))
    with vllm_context():
        layer = loaded_layer("gate_up_proj", weights)
        x = (
            torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
            + torch.tensor([1.0, -1, 0, 3, -3])[:, None]
        )
        results = [layer.quant_method.apply(layer, x.bfloat16()).double()]
        layer.quant_method.kernel = TakesCodes()
        results.append(layer.quant_method.apply(layer, x.bfloat16()).double())
    static_scale, static_zero = (layer.input_scale, layer.input_zero) if static else (None, None)
    codes, scale, zeros = quantize_asymmetric(x.bfloat16(), static_scale, static_zero)
    operand = (codes.double() - zeros) * scale.double()
    expected = torch.cat([operand @ weight.to_dense(torch.float64).T for weight in weights], 1)
    assert all((result - expected).norm() <= 2.0**-8 * expected.norm() for result in results)


def test_kernel_that_takes_codes_gets_them(vllm_context: VllmContext) -> None:
    from vllm_sparse.kernels.reference import ReferenceKernel, quantize_activations

    class TakesCodes(ReferenceKernel):
        quantizes_input = False

    for scheme, tolerance in (("fp8", 0.02), ("int8", 0.0)):
        (weight,) = part_weights("gate", scheme)
        with vllm_context():
            layer = loaded_layer("gate", [weight])
            x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
            expected = layer.quant_method.apply(layer, x).float()
            layer.quant_method.kernel = TakesCodes()
            got = layer.quant_method.apply(layer, x).float()
        # vLLM multiplies by the reciprocal of the scale where the reference divides: codes may differ by one step.
        assert (got - expected).norm() <= tolerance * expected.norm()
        assert quantize_activations(x, weight.scheme.activation, None)[1].shape == (5, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_best_kernel_of_this_machine_agrees_and_is_found_by_lora(vllm_context: VllmContext, scheme: str) -> None:
    from vllm.lora.layers.utils import _get_lora_device

    (weight,) = part_weights("gate", scheme)
    with vllm_context(options={"kernel": None}):
        layer = loaded_layer("gate", [weight])
    identity = torch.eye(HIDDEN, dtype=torch.bfloat16)
    torch.testing.assert_close(
        layer.quant_method.apply(layer, identity).T.float(), weight.to_dense(), rtol=1e-2, atol=1e-6
    )
    assert _get_lora_device(layer) == layer.weight_packed.device


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_load_makes_a_valid_weight(vllm_context: VllmContext, scheme: str) -> None:
    with vllm_context(load_format="dummy"):
        layer = make("qkv_proj", new_config(format_of(part_weights("qkv_proj", scheme)[0])))
        layer.quant_method.process_weights_after_loading(layer)
    out = layer.quant_method.apply(layer, torch.ones(2, HIDDEN, dtype=torch.bfloat16))
    assert torch.isfinite(out).all()
    assert out.abs().sum() > 0


def test_missing_tensor_is_named(vllm_context: VllmContext) -> None:
    weights = part_weights("gate_up_proj", "w4a16")
    fmt = format_of(weights[0])
    with vllm_context():
        layer = make("gate_up_proj", new_config(fmt))
        load(layer, fmt.from_weight(weights[0]), 0)
        expected = "layers.0.gate_up_proj: tensor weight_packed is not in the checkpoint, or only a part of it"
        with pytest.raises(FormatError, match=expected):
            layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("kind", "tensor", "shard", "message"),
    [
        ("gate_up_proj", torch.zeros(256, 64), 0, "expected torch.uint8 in the checkpoint, got torch.float32"),
        ("gate_up_proj", torch.zeros(256, 65, dtype=torch.uint8), 0, "expected shape [256, 64] in the checkpoint"),
        ("gate_up_proj", torch.zeros(512, 64, dtype=torch.uint8), 0, "expected shape [256, 64] in the checkpoint"),
        ("qkv_proj", torch.zeros(64, 64, dtype=torch.uint8), "k", "expected shape [32, 64] in the checkpoint"),
        ("down_proj", torch.zeros(256, 32, dtype=torch.uint8), None, "expected shape [256, 64] in the checkpoint"),
        ("gate", torch.zeros(64, 256, dtype=torch.uint8), None, "expected shape [256, 64] in the checkpoint"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_wrong_tensor_is_named(
    vllm_context: VllmContext, size: int, kind: str, tensor: Tensor, shard: Any, message: str
) -> None:
    with vllm_context(0, size):
        layer = make(kind, new_config(format_of(part_weights(kind, "bf16")[0])))
        with pytest.raises(FormatError, match=f"layers.0.{kind}: tensor weight_positions: {re.escape(message)}"):
            load(layer, {"weight_positions": tensor}, shard)


def test_positions_out_of_order_are_an_error(vllm_context: VllmContext) -> None:
    (weight,) = part_weights("down_proj", "bf16")
    fmt = format_of(weight)
    with vllm_context():
        layer = make("down_proj", new_config(fmt))
        load(layer, fmt.from_weight(weight) | {"weight_positions": torch.zeros(256, 64, dtype=torch.uint8)})
        with pytest.raises(FormatError, match=r"layers.0.down_proj: positions .* out of order or repeated"):
            layer.quant_method.process_weights_after_loading(layer)


def test_shard_that_does_not_divide_gives_the_sizes(vllm_context: VllmContext) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    arguments = {"bias": False, "params_dtype": torch.bfloat16, "prefix": "layers.0.down_proj"}
    with vllm_context(0, 2):
        config = new_config(format_of(random_hub(64, 264, "bf16")))
        message = r"cuts a \[64, 264\] layer so that a rank gets 132 input features of a part, .* multiple of 8 as"
        with pytest.raises(UnsupportedError, match=message):
            RowParallelLinear(264, 64, quant_config=config, **arguments)
    with vllm_context(0, 4):
        config = new_config(format_of(random_hub(64, 256, "w4a16")))
        message = r"cuts a \[64, 256\] layer so that a rank gets \[64, 64\]: .*group size 128 does not divide the 64"
        with pytest.raises(UnsupportedError, match=message):
            RowParallelLinear(256, 64, quant_config=config, **arguments)


def test_dense_checkpoint_is_compressed_as_it_arrives(vllm_context: VllmContext) -> None:
    gate, up = random_dense(256, HIDDEN, 0), random_dense(256, HIDDEN, 1)
    config = new_config(None)
    with vllm_context():
        layer = make("gate_up_proj", config)
        assert layer.weight.is_meta
        load(layer, {"weight": gate}, 0)
        assert layer.weight.is_meta
        load(layer, {"weight": up}, 1)
    assert not hasattr(layer, "weight")
    assert layer.weight_packed.shape == (512, HIDDEN // 2)
    got = layer.quant_method.apply(layer, torch.eye(HIDDEN, dtype=torch.bfloat16)).T
    assert torch.equal(got, torch.cat([gate, up]))
    assert config.report.lines() == [
        "sparse24: 1 of 1 linear layers run 2:4, scheme bf16, kernel reference, 0.29 MB packed"
    ]


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_dense_checkpoint_is_quantized_when_asked(vllm_context: VllmContext, scheme: str) -> None:
    dense = random_dense(256, HIDDEN)
    with vllm_context(options={"scheme": scheme}):
        layer = make("down_proj", new_config(None))
        load(layer, {"weight": dense})
        assert layer.quant_method.spec.scheme.name == scheme
        got = layer.quant_method.apply(layer, torch.eye(HIDDEN, dtype=torch.bfloat16)).T.float()
    # Rounding to the nearest code: 4 bits leave about 10 % of the norm, e4m3 about 3 %, 8 bits below 1 %.
    bound = {"w4a16": 0.15, "fp8": 0.04}.get(scheme, 0.012)
    assert (got - dense.float()).norm() / dense.float().norm() < bound


def test_dense_layer_that_is_not_sparse_stays_dense_and_is_counted(vllm_context: VllmContext) -> None:
    sparse, full = random_dense(256, HIDDEN), torch.ones(256, HIDDEN, dtype=torch.bfloat16)
    config = new_config(None)
    with vllm_context():
        layers = [make("down_proj", config), make("gate", config)]
        load(layers[0], {"weight": sparse})
        load(layers[1], {"weight": full})
        out = layers[1].quant_method.apply(layers[1], torch.ones(1, HIDDEN, dtype=torch.bfloat16))
    assert torch.equal(out, torch.full((1, 256), float(HIDDEN), dtype=torch.bfloat16))
    assert config.report.lines() == [
        "sparse24: 1 of 2 linear layers run 2:4, scheme bf16, kernel reference, 0.15 MB packed",
        "sparse24: 1 not 2:4, served dense: layers.0.gate",
    ]


def test_model_without_a_sparse_layer_is_an_error(vllm_context: VllmContext) -> None:
    with vllm_context():
        layer = make("down_proj", new_config(None))
        message = r"none of the 1 linear layers is 2:4 \(layers.0.down_proj: 32768 of 32768 groups of four have more"
        with pytest.raises(NotSparseError, match=message):
            load(layer, {"weight": torch.ones(256, HIDDEN, dtype=torch.bfloat16)})


def test_strict_makes_a_dense_layer_an_error(vllm_context: VllmContext) -> None:
    dense = random_dense(256, HIDDEN)
    dense[3, 4:8] = 1.0
    with vllm_context(options={"strict": True}):
        layer = make("down_proj", new_config(None))
        with pytest.raises(NotSparseError, match=r"layers.0.down_proj: 1 of 32768 groups .* 'vllm-sparse compress'"):
            load(layer, {"weight": dense})


def test_nan_in_a_dense_checkpoint_is_an_error(vllm_context: VllmContext) -> None:
    dense = random_dense(256, HIDDEN)
    dense[0, 0] = float("nan")
    dense[0, 1:4] = 0
    with vllm_context():
        layer = make("down_proj", new_config(None))
        with pytest.raises(FormatError, match=r"layers.0.down_proj: the weight holds NaN or Inf"):
            load(layer, {"weight": dense})


def test_negative_zero_is_zero(vllm_context: VllmContext) -> None:
    dense = random_dense(256, HIDDEN)
    dense[dense == 0] = -0.0
    with vllm_context():
        layer = make("down_proj", new_config(None))
        load(layer, {"weight": dense})
    assert layer.quant_method.spec.scheme.name == "bf16"


@pytest.mark.parametrize("stored", ["native", "dense"])
def test_reload_puts_new_weights_into_the_same_tensors(vllm_context: VllmContext, stored: str) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    weights = [random_hub(256, HIDDEN, "bf16", seed) for seed in (0, 1)]
    fmt = format_of(weights[0]) if stored == "native" else None

    def tensors(weight: Sparse24Weight) -> dict[str, Tensor]:
        return {"weight": weight.to_dense(torch.bfloat16)} if fmt is None else fmt.from_weight(weight)

    with vllm_context():
        layer = make("down_proj", new_config(fmt))
        layerwise.record_metadata_for_reloading(layer)
        load(layer, tensors(weights[0]))
        layer.quant_method.process_weights_after_loading(layer)
        addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
        layerwise.initialize_layerwise_reload(layer)
        load(layer, tensors(weights[1]))
        layerwise.finalize_layerwise_reload(layer, None)
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == addresses
    got = layer.quant_method.apply(layer, torch.eye(HIDDEN, dtype=torch.bfloat16)).T
    assert torch.equal(got, weights[1].to_dense(torch.bfloat16))
