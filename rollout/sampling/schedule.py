"""How many positions each denoising step reveals."""

from rewards.errors import ConfigError


def tokens_per_step(completion_length: int, block_length: int, steps: int) -> list[int]:
    """Positions revealed at each of the steps; the blocks share the steps equally, left to right.

    Where the block doesn't divide evenly, its first steps reveal one more (LLaDA's floor split with the remainder up
    front), so that any step count is usable for evaluation.

    Raises:
        ConfigError: when the lengths don't divide, or a step would reveal nothing.
    """
    if completion_length < 1 or block_length < 1 or completion_length % block_length:
        raise ConfigError(
            f"completion_length {completion_length} is not a multiple of block_length {block_length}; "
            f"choose a block length that divides it"
        )
    blocks = completion_length // block_length
    if steps < 1 or steps % blocks:
        raise ConfigError(f"{steps} denoising steps can't be shared by {blocks} blocks; use a multiple of {blocks}")
    steps_per_block = steps // blocks
    if steps_per_block > block_length:
        raise ConfigError(
            f"{steps_per_block} steps for a block of {block_length} positions would reveal nothing in some; "
            f"use at most {completion_length} steps"
        )
    base, extra = divmod(block_length, steps_per_block)
    return [base + (step < extra) for step in range(steps_per_block)] * blocks
