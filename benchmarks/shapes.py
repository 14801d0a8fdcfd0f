"""The linear layers of the models that are measured: model -> layer -> (n, k), as vLLM fuses and shards them."""

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3.1-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Llama-3.1-70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "Llama-3.1-70B-TP4": {"qkv": (2560, 8192), "o": (8192, 2048), "gate_up": (14336, 8192), "down": (8192, 7168)},
    "Qwen2.5-7B": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
