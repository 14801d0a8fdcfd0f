"""Which layers to leave dense: those whose weights and inputs say that pruning or rounding them costs the most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_sparse.compress.keep_dense import KeepDense, Kept
from vllm_sparse.compress.model import BlockModel
from vllm_sparse.compress.staged import find_leaders

_OUTLIER = 5.0  # times the mean, as in the paper


def choose_dense(
    rule: KeepDense,
    model: BlockModel,
    layers: Sequence[str],
    batches: Sequence[Tensor],
    extra_bytes: Callable[[str], int],
) -> tuple[Kept, ...]:
    """Run the dense ``model`` over ``batches`` of token ids and return what stays dense, highest score first.

    Args:
        model: not to be used afterwards, since its blocks cannot be loaded again.
        layers: names of those that would be compressed.
        extra_bytes: how many more bytes a dense layer takes.
    """
    sizes = {name: linear.weight.numel() for name, linear in model.all_linears().items()}
    found = sorted(_scores(rule.rule, model, set(layers), batches), key=lambda group: -group[1])
    left = rule.amount * sum(sizes[name] for name in layers)
    kept: list[Kept] = []
    for names, score in found:
        if rule.amount >= 1:
            if len(kept) == rule.amount:
                break
        elif (weight := sum(sizes[name] for name in names)) > left:
            continue
        else:
            left -= weight
        kept.append(Kept(names, score, sum(map(extra_bytes, names))))
    return tuple(kept)


def _scores(
    rule: str, model: BlockModel, chosen: set[str], batches: Sequence[Tensor]
) -> Iterator[tuple[tuple[str, ...], float]]:
    embedded = [model.embed(ids) for ids in batches]
    hidden, calls = [x for x, _ in embedded], [call for _, call in embedded]
    for index in range(len(model.blocks)):
        block = model.load(index)
        linears = {name: linear for name, linear in model.linears(index).items() if name in chosen}
        groups = _groups(find_leaders(block, linears, (calls[0][index], hidden[0])))
        moments = {name: _Moments() for name in linears}
        hooks = [linear.register_forward_pre_hook(moments[name].see) for name, linear in linears.items()]
        for i, x in enumerate(hidden):
            hidden[i] = calls[i][index].run(block, x)
        for hook in hooks:
            hook.remove()
        for names in groups:
            yield names, _owl(names, linears, moments) if rule == "owl" else max(moments[n].kurtosis() for n in names)
        model.release(index)


class _Moments:
    """Sums of powers of a layer's inputs: by channel for the norms, of all for the kurtosis."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self._powers = torch.zeros(5, dtype=torch.float64)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if not len(x):
            return
        if self.squares is None:
            self.squares = torch.zeros(x.shape[1], device=x.device)
        self.squares += x.square().sum(0)
        for power in range(5):
            self._powers[power] += float(x.pow(power).double().sum())

    def kurtosis(self) -> float:
        """Return the fourth central moment over the square of the second; 0 without inputs."""
        count = float(self._powers[0])
        if not count:
            return 0.0
        m1, m2, m3, m4 = (self._powers[1:] / count).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return fourth / variance**2 if variance > 0 else 0.0


def _groups(leaders: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the names of layers that have to stay dense together, since a runtime makes one of them."""
    together: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        owner, experts, _ = name.partition(".experts.")
        together.setdefault(owner + experts if experts else leader, []).append(name)
    return [tuple(names) for names in together.values()]


def _owl(names: Sequence[str], linears: Mapping[str, nn.Linear], moments: Mapping[str, _Moments]) -> float:
    """Return the share of |w| ||x|| that is above ``_OUTLIER`` times its mean."""
    outliers = count = 0
    for name in names:
        squares = moments[name].squares
        if squares is None:  # an expert that no token was sent to
            continue
        products = linears[name].weight.float().abs() * squares.sqrt()
        outliers += int((products > _OUTLIER * products.mean()).sum())
        count += products.numel()
    return outliers / count if count else 0.0
