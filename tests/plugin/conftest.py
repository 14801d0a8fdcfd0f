"""vLLM layers without an engine: one process plays every tensor-parallel rank in turn."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin.agreement import Continuation

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

VllmContext = Callable[..., Any]
PROMPTS = [[5, 17, 99, 200, 31, 7], [3, 3], [250, 1, 90, 12, 44, 45, 46, 47, 48]]
NEW_TOKENS = 12
# Wrong by a seventh there; right once codes have seven bits. Ours cannot saturate.
needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="vLLM's own int8 kernel (oneDNN's) saturates without VNNI"
)
BLOCKS = 64  # of the KV cache: clearing a gigabyte takes as long as loading one of these models


@pytest.fixture
def vllm_context(monkeypatch: pytest.MonkeyPatch) -> VllmContext:
    """Return ``context(rank=0, size=1, options=None, load_format="auto")``, in which layers can be built and loaded."""
    pytest.importorskip("vllm")
    return make_context(monkeypatch)


def make_context(monkeypatch: pytest.MonkeyPatch) -> VllmContext:
    """Return what ``vllm_context`` is, in any process."""
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    @contextmanager
    def context(rank: int = 0, size: int = 1, options: Any = None, load_format: str = "auto") -> Iterator[None]:
        for module in (parameter, linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda x: x)
        if options is None or isinstance(options, dict):
            options = {"kernel": "reference"} | (options or {})  # the same result whatever was built
        config = VllmConfig(load_config=LoadConfig(load_format=load_format), additional_config={"sparse24": options})
        with set_current_vllm_config(config):
            yield

    return context


def continuation(output: Any) -> Continuation:
    """Return what vLLM says of one sequence."""
    tokens = list(output.token_ids)
    assert len(tokens) == NEW_TOKENS
    return Continuation(tokens, [of[token].logprob for token, of in zip(tokens, output.logprobs, strict=True)])


class Session:
    """A model in vLLM, in this process."""

    def __init__(self, path: Path, sparse24: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM

        defaults = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}
        defaults |= {"num_gpu_blocks_override": BLOCKS}
        extra = {"additional_config": {"sparse24": sparse24}} if sparse24 else {}
        self.llm = LLM(str(path), **defaults | extra | options)

    def generate(
        self, prompts: list[list[int]] = PROMPTS, adapter: Path | None = None, images: list[Any] | None = None
    ) -> list[Continuation]:
        """Return the greedy continuation of each prompt, with one image for each if given."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        tokens: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in prompts]
        for one, image in zip(tokens, images or (), strict=images is not None):
            one["multi_modal_data"] = {"image": image}
        outputs = self.llm.generate(tokens, wanted, use_tqdm=False, lora_request=lora)
        return [continuation(output.outputs[0]) for output in outputs]


@contextmanager
def running(path: Path, sparse24: dict[str, Any] | None = None, **options: Any) -> Iterator[Session]:
    """Give a model in this process; the next one can start when this one is left."""
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM collects garbage eight times from start to end, each time through all that torch and transformers have made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        try:
            session = Session(path, sparse24, **options)
            yield session
            del session.llm
        finally:
            patch.undo()
            cleanup_dist_env_and_memory()  # collects once


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    """Return ``start(path, options of the plugin, **options of vLLM)``, which loads a model until the test's end."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(running(*arguments, **options))


@pytest.fixture
def engine(session: Callable[..., Session]) -> Callable[..., list[Continuation]]:
    """Return ``generate(path, ...)``, which loads a model and returns how it continues prompts."""

    def generate(
        path: Path,
        sparse24: dict[str, Any] | None = None,
        prompts: list[list[int]] = PROMPTS,
        adapter: Path | None = None,
        **options: Any,
    ) -> list[Continuation]:
        return session(path, sparse24, **options).generate(prompts, adapter)

    return generate
