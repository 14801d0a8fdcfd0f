"""Sparse24Weight, the hub: every format reads into one, every kernel packs from one, the compressor writes one.

A 2:4 weight keeps exactly two entries of every aligned group of four along the input features (Mishra et al.,
"Accelerating Sparse Deep Neural Networks", arXiv 2104.08378). ``to_dense`` is the reference for everything else.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, replace

import torch
from torch import Tensor

from vllm_sparse.errors import FormatError, NotSparseError
from vllm_sparse.scheme import Scheme, check_group_size

# Nibble of the lowest two positions that complete a group with the given non-zeros (bit i set: entry i is non-zero).
# A group with fewer than two non-zeros is filled up with its lowest free positions, so that compression is a function
# of the dense weight. Masks with three or four bits set are not 2:4 and are rejected before this table is read.
POSITIONS_OF_MASK = (4, 4, 4, 4, 8, 8, 9, 4, 12, 12, 13, 4, 14, 4, 4, 4)
_VALID_POSITIONS = frozenset((4, 8, 12, 9, 13, 14))
_ROWS_AT_ONCE = 1 << 24  # entries per block of rows: bounds the int64 index that gather and scatter need


def _bytes_if_fp8(tensor: Tensor) -> Tensor:
    """View fp8 as uint8, since indexing kernels exist for bytes everywhere and for fp8 not."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _exact_in_fp32(values: Tensor) -> Tensor:
    """Widen fp8, for which few operations exist; the rest stays as it is."""
    return values.float() if values.dtype == torch.float8_e4m3fn else values


def nonzero_mask(dense: Tensor) -> Tensor:
    """Return which entries are non-zero; -0.0 is zero in every dtype, NaN is not."""
    if dense.dtype == torch.float8_e4m3fn:
        return (dense.view(torch.uint8) & 0x7F) != 0
    return dense != 0


def count_violations(dense: Tensor) -> int:
    """Return how many aligned groups of four along the last dimension of ``dense`` hold more than two non-zeros."""
    bad = 0
    for rows in dense.split(max(1, _ROWS_AT_ONCE // max(1, dense.shape[-1]))):
        bad += int((nonzero_mask(rows).unflatten(-1, (-1, 4)).sum(-1, dtype=torch.uint8) > 2).sum())
    return bad


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Pack ``[n, groups]`` nibbles into ``[n, ceil(groups / 2)]`` bytes, even groups in the low half."""
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=4)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, groups: int) -> Tensor:
    """Inverse of ``pack_nibbles``: return ``[n, groups]`` nibbles as uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :groups]


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel knows of a linear layer before it sees its data.

    Attributes:
        scheme: see ``vllm_sparse.scheme``.
        n, k: output and input features.
        group_size: input features per scale, -1 for one scale per output channel.
        dtype: dtype of activations and output outside the layer (bf16, fp16 or fp32).
        scale_dtype: dtype of the weight scales, None when there are none.
        static_input: whether activations are quantized with one scale fixed at calibration.
        symmetric_input: whether quantized activations have no zero point.
        gated: whether the output features are a gate and, behind it, as many that it multiplies.
    """

    scheme: Scheme
    n: int
    k: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype | None
    static_input: bool = False
    symmetric_input: bool = True
    gated: bool = False


@dataclass(frozen=True)
class Sparse24Weight:
    """A 2:4 weight of ``n`` output and ``k`` input features, ``k % 4 == 0``.

    Attributes:
        scheme: what the values are and what activations they multiply.
        values: ``[n, k / 2]``; group g's two kept entries at columns 2g and 2g + 1, ascending position. A dtype of
            ``scheme.value_dtypes``; int4 codes are -8 … 7 in int8. A kept entry may be zero.
        positions: uint8 ``[n, ceil(k / 8)]``; a nibble ``p0 | p1 << 2`` with ``p0 < p1`` per group, the even group in
            the low half. The unused last nibble, when there is one, is 4 (positions 0 and 1).
        scales: ``[n, 1]`` or ``[n, k / group_size]`` in float32, bf16 or fp16; None when the scheme has none.
            The weight is code times scale; there is no zero point.
        group_size: input features per scale, -1 for one scale per output channel.
        input_scale: float32 ``[1]``, the static activation scale, or None (dynamic, one per token).
        layer: not kept; the layer's name for the constructor's errors.
        symmetric_input: False if quantized activations have a zero point: they are (code - zero point) times scale.
        input_zero: int32 ``[1]``, that of static activations; None when symmetric or dynamic.

    The constructor checks shapes and dtypes; ``validate`` checks the data.

    Raises:
        FormatError, OptionError: naming ``layer`` and the shape, dtype or group size that does not fit.
    """

    scheme: Scheme
    values: Tensor
    positions: Tensor
    scales: Tensor | None = None
    group_size: int = -1
    input_scale: Tensor | None = None
    layer: InitVar[str] = "weight"
    symmetric_input: bool = field(default=True, kw_only=True)
    input_zero: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self, layer: str) -> None:
        self._check_shapes(layer)

    @property
    def n(self) -> int:
        return self.values.shape[0]

    @property
    def k(self) -> int:
        return self.values.shape[1] * 2

    @property
    def device(self) -> torch.device:
        return self.values.device

    def spec(self, dtype: torch.dtype) -> LinearSpec:
        """Return the layer description for activations of ``dtype``."""
        scale_dtype = None if self.scales is None else self.scales.dtype
        static = self.input_scale is not None
        return LinearSpec(
            self.scheme, self.n, self.k, self.group_size, dtype, scale_dtype, static, self.symmetric_input
        )

    def to(self, device: torch.device | str) -> Sparse24Weight:
        """Return the same weight on ``device``."""
        return replace(
            self,
            values=self.values.to(device),
            positions=self.positions.to(device),
            scales=None if self.scales is None else self.scales.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
            input_zero=None if self.input_zero is None else self.input_zero.to(device),
        )

    def nibbles(self) -> Tensor:
        """Return the positions unpacked, uint8 ``[n, k / 4]``."""
        return unpack_nibbles(self.positions, self.k // 4)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        scheme: Scheme,
        scales: Tensor | None = None,
        group_size: int = -1,
        input_scale: Tensor | None = None,
        layer: str = "weight",
    ) -> Sparse24Weight:
        """Compress ``dense`` ``[n, k]``, stored values or codes (not multiplied by ``scales``).

        Raises:
            FormatError: ``dense`` is not a matrix, or k is not a multiple of 4.
            NotSparseError: some group of four has more than two non-zeros; ``layer`` and the count are in the message.
        """
        if dense.dim() != 2:
            raise FormatError(f"{layer}: expected a matrix [n, k], got shape {list(dense.shape)}")
        n, k = dense.shape
        if k % 4:
            raise FormatError(f"{layer}: 2:4 needs a multiple of 4 input features, got {k}")
        if bad := count_violations(dense):
            raise NotSparseError(
                f"{layer}: {bad} of {n * (k // 4)} groups of four have more than two non-zeros, so the weight is not "
                f"2:4; prune it with 'vllm-sparse compress' or leave the layer dense"
            )
        blocks = [_compress_rows(rows) for rows in dense.split(max(1, _ROWS_AT_ONCE // max(1, k)))] if n else []
        values = torch.cat([block[0] for block in blocks]) if blocks else dense.new_empty(0, k // 2)
        positions = (
            torch.cat([block[1] for block in blocks])
            if blocks
            else torch.empty(0, -(-k // 8), dtype=torch.uint8, device=dense.device)
        )
        return cls(scheme, values, positions, scales, group_size, input_scale, layer)

    def to_dense_codes(self) -> Tensor:
        """Return the stored values at their places in a dense ``[n, k]`` of the values' dtype, zeros elsewhere."""
        source = _bytes_if_fp8(self.values)
        dense = torch.zeros(self.n, self.k, dtype=source.dtype, device=self.device)
        step = max(1, _ROWS_AT_ONCE // max(1, self.k))
        for start in range(0, self.n, step):
            rows = slice(start, start + step)
            nibbles = unpack_nibbles(self.positions[rows], self.k // 4)
            index = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
            dense[rows].unflatten(1, (-1, 4)).scatter_(-1, index, source[rows].unflatten(1, (-1, 2)))
        return dense.view(self.values.dtype)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized dense weight ``[n, k]``; products are rounded once, to ``dtype``."""
        codes = self.to_dense_codes()
        if self.scales is None:
            return codes.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        scales = self.scales.to(wide)
        return (codes.to(wide).unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T`` for ``x`` ``[..., k]`` in the precision of ``x``, activations not quantized."""
        return x @ self.to_dense(x.dtype).T

    def validate(self, layer: str) -> None:
        """Check the data: ordered positions, finite values, codes in range, finite positive scales.

        Raises:
            FormatError: naming ``layer`` and what is wrong.
        """
        step = max(1, _ROWS_AT_ONCE // max(1, self.k))
        for start in range(0, self.n, step):
            self._validate_rows(slice(start, start + step), layer)
        for what, scale in (("a weight scale", self.scales), ("the input scale", self.input_scale)):
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise FormatError(f"{layer}: {what} is zero, negative, NaN or Inf")

    def _validate_rows(self, rows: slice, layer: str) -> None:
        values, positions = self.values[rows], self.positions[rows]
        nibbles = unpack_nibbles(positions, self.k // 4)
        if not bool(((nibbles & 3) < (nibbles >> 2)).all()):
            raise FormatError(f"{layer}: positions of a 2:4 group are out of order or repeated")
        if self.k % 8 and not bool((positions[:, -1] >> 4 == 4).all()):
            raise FormatError(f"{layer}: the unused half of the last byte of positions is not 4")
        if values.is_floating_point() and not bool(torch.isfinite(_exact_in_fp32(values)).all()):
            raise FormatError(f"{layer}: the weight holds NaN or Inf")
        if self.scheme.weight_bits == 4 and values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
            raise FormatError(f"{layer}: a 4-bit code is outside -8 … 7")

    def _check_shapes(self, layer: str) -> None:
        scheme, values = self.scheme, self.values
        if values.dim() != 2 or values.shape[1] % 2:
            raise FormatError(f"{layer}: expected values [n, k/2] with k a multiple of 4, got {list(values.shape)}")
        if values.dtype not in scheme.value_dtypes:
            raise FormatError(f"{layer}: scheme {scheme.name} cannot hold values of {values.dtype}")
        want = [self.n, -(-self.k // 8)]
        if self.positions.dtype != torch.uint8 or list(self.positions.shape) != want:
            got = f"{self.positions.dtype} {list(self.positions.shape)}"
            raise FormatError(f"{layer}: expected positions torch.uint8 {want}, got {got}")
        check_group_size(scheme, self.group_size, self.k, layer)
        if (self.scales is not None) != scheme.scaled:
            raise FormatError(f"{layer}: scheme {scheme.name} {'needs' if scheme.scaled else 'has no'} weight scales")
        if self.scales is not None:
            shape = [self.n, 1 if self.group_size == -1 else self.k // self.group_size]
            if list(self.scales.shape) != shape or self.scales.dtype not in _SCALE_DTYPES:
                got = f"{self.scales.dtype} {list(self.scales.shape)}"
                raise FormatError(f"{layer}: expected floating-point weight scales {shape}, got {got}")
        if self.input_scale is not None:
            if scheme.activation is None:
                raise FormatError(f"{layer}: scheme {scheme.name} has no input scale")
            if self.input_scale.dtype != torch.float32 or list(self.input_scale.shape) != [1]:
                got = f"{self.input_scale.dtype} {list(self.input_scale.shape)}"
                raise FormatError(f"{layer}: expected an input scale torch.float32 [1], got {got}")
        self._check_zero_point(layer)

    def _check_zero_point(self, layer: str) -> None:
        if self.symmetric_input and self.input_zero is None:
            return
        if self.scheme.activation != torch.int8:
            raise FormatError(f"{layer}: scheme {self.scheme.name} has no zero point of activations")
        if self.symmetric_input or (self.input_zero is None) != (self.input_scale is None):
            raise FormatError(f"{layer}: static activations that are not symmetric, and no others, have a zero point")
        zero = self.input_zero
        if zero is not None and (zero.dtype != torch.int32 or list(zero.shape) != [1]):
            raise FormatError(
                f"{layer}: expected an input zero point torch.int32 [1], got {zero.dtype} {list(zero.shape)}"
            )


_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _compress_rows(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and packed positions of rows that are known to be 2:4."""
    groups = _bytes_if_fp8(dense).unflatten(1, (-1, 4))
    weights = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=dense.device)
    mask = (nonzero_mask(dense).unflatten(1, (-1, 4)) * weights).sum(-1, dtype=torch.uint8)
    table = torch.tensor(POSITIONS_OF_MASK, dtype=torch.uint8, device=dense.device)
    nibbles = table[mask.long()]
    index = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    return groups.gather(-1, index).flatten(1).view(dense.dtype), pack_nibbles(nibbles)
