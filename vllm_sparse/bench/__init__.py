"""The published benchmark tables on one's own models and machine: ``vllm-sparse bench``. vLLM runs in subprocesses."""
