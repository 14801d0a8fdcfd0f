"""2:4 structured-sparse, quantized language models: a vLLM plugin with its own kernels, and the offline companion."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make ``--quantization sparse24`` known to vLLM.

    Runs in every vLLM process, also for models that are not ours: it imports little, may be called again, and never
    raises, since an exception here would end processes that do not need it.
    """
    from vllm_sparse.plugin import register_with_vllm

    register_with_vllm()
