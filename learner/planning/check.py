"""``learner.main``'s refusal of runs that can't fit, before anything expensive starts."""

from learner.planning.fit import plan_run
from learner.planning.hardware import Hardware
from learner.planning.prompts import prompt_tokens
from learner.planning.report import render_refusal
from learner.planning.shapes import model_shape
from learner.settings.run import RunConfig
from rewards.errors import ConfigError


def check_memory(config: RunConfig, hardware: Hardware) -> str | None:
    """Refuse a run whose plan needs more than there is, or takes longer than it may;
    ``resources.check_memory=false`` skips it.

    Returns a sentence when the model's sizes or the hardware's memory can't be found out, and nothing was checked.

    Raises:
        ConfigError: the run does not fit; the message is the plan's table and the first thing to change, or says
            what takes too long.
    """
    if not config.resources.check_memory:
        return None
    if hardware.memory is None:
        return f"memory was not checked before the start: how much there is on {hardware.source} is unknown"
    try:
        model = model_shape(config)
    except ConfigError as error:
        return f"memory was not checked before the start: {error}"
    tokens, source = prompt_tokens(config)
    plan = plan_run(config, model, hardware, prompt=tokens, prompt_source=source)
    if plan.too_slow and not plan.problems:
        raise ConfigError(f"{'; '.join(plan.too_slow)}; resources.check_memory=false starts the run all the same")
    if not plan.fits:
        raise ConfigError(render_refusal(plan))
    return None
