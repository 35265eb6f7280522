"""vLLM as the engine: its pooling runner computes what the denoising loop asks for."""
