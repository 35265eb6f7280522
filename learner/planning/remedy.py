"""What to change first when a process ran out of its GPU's memory, said in the process itself."""

from learner.planning.changes import first_change
from learner.planning.prompts import prompt_tokens
from learner.planning.shapes import model_shape
from learner.settings.run import RunConfig
from rewards.errors import ConfigError


def remedy(config: RunConfig, process: str) -> str:
    """Of a "learner rank" or a "rollout actor", by the plan's own order."""
    try:
        model = model_shape(config)
    except ConfigError as error:
        return f"lower learner.views_per_forward or rollout.max_rows (nothing is planned: {error})"
    tokens, _ = prompt_tokens(config)
    change = first_change(config, model, prompt=tokens, process=process)
    if change is None:
        return "take a GPU with more memory"
    return f"change first: {' '.join(change.settings)}"
