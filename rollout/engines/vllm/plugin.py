"""Makes our models known to vLLM, which calls ``register`` in its processes (entry point ``vllm.general_plugins``)."""

from rollout.engines.vllm.settings import ARCHITECTURES

CLASSES = {"llada": "LLaDA", "dream": "Dream", "llada_moe": "LLaDAMoE"}


def register() -> None:
    """May be called again."""
    from vllm import ModelRegistry

    import rollout.models.family  # noqa: F401  registers the configs with transformers

    known = ModelRegistry.get_supported_archs()
    for family, architecture in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"rollout.engines.vllm.models:{CLASSES[family]}")
