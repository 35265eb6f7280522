"""Model families: what the rest must know of one, their modules, loading, tokenizers, LoRA and quantization."""
