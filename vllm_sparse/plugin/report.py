"""What was loaded how: collected layer by layer, said in one line per scheme when the last layer is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_sparse.errors import NotSparseError
from vllm_sparse.plugin.compat import logger, pipeline_parallel_size
from vllm_sparse.weight import LinearSpec

_NAMED = 3  # how many of many layers a log line names


class LoadReport:
    """Counts the linear layers of one model and tells the user, once, which run 2:4 and which do not."""

    def __init__(self) -> None:
        self._expected = 0
        self._sparse: dict[str, tuple[str, str]] = {}
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._dense: dict[str, str] = {}
        self._ignored: set[str] = set()
        self._fallbacks: Counter[str] = Counter()
        self._said = False

    def expect(self, layers: int = 1) -> None:
        """More layers will be loaded that may run 2:4; a projection of all experts of a layer counts as one."""
        self._expected += layers

    def ignored(self, module: str) -> None:
        """``module`` is stored dense, as the checkpoint's config says."""
        self._ignored.add(module)

    def sparse(
        self, module: str, spec: LinearSpec, kernel: str, reasons: Mapping[str, str | None], nbytes: int
    ) -> None:
        """``module`` runs 2:4 with ``kernel`` from ``nbytes``; ``reasons`` says for each kernel why it could not."""
        self._sparse[module] = (spec.scheme.name, kernel)
        self._bytes[self._sparse[module]] += nbytes
        if kernel == "reference":
            self._fallbacks["; ".join(f"{name}: {why}" for name, why in reasons.items() if why)] += 1
        self._finish_if_complete()

    def dense(self, module: str, reason: str) -> None:
        """``module`` is not 2:4 and is served by vLLM's own method."""
        self._dense[module] = reason
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if self._said or len(self._sparse) + len(self._dense) < self._expected:
            return
        self._said = True
        for line in self.lines():
            logger.info("%s", line)
        for reason, count in self._fallbacks.items():
            why = f" ({reason})" if reason else ""
            logger.warning("sparse24: %d layers run on the slow reference kernel%s", count, why)
        if self._dense:
            self._complain_about_dense()

    def lines(self) -> list[str]:
        """Return one line per scheme and kernel, and one for what does not run 2:4."""
        total = len(self._sparse) + len(self._dense) + len(self._ignored)
        runs = Counter(self._sparse.values())
        lines = [
            f"sparse24: {count} of {total} linear layers run 2:4, scheme {run[0]}, kernel {run[1]}, "
            f"{self._bytes[run] / 1e6:.2f} MB packed"
            for run, count in sorted(runs.items())
        ]
        if self._ignored:
            lines.append(f"sparse24: {len(self._ignored)} stored dense by the checkpoint: {_some(self._ignored)}")
        if self._dense:
            lines.append(f"sparse24: {len(self._dense)} not 2:4, served dense: {_some(self._dense)}")
        return lines

    def _complain_about_dense(self) -> None:
        first = next(iter(self._dense.values()))
        if not self._sparse and pipeline_parallel_size() == 1:
            raise NotSparseError(
                f"--quantization sparse24: none of the {len(self._dense)} linear layers is 2:4 ({first}); "
                f"prune the model with 'vllm-sparse compress' or serve it without --quantization sparse24"
            )
        logger.warning(
            "sparse24: %d linear layers are not 2:4 and are served dense; the first: %s", len(self._dense), first
        )


def _some(modules: set[str] | dict[str, str]) -> str:
    names = sorted(modules)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
