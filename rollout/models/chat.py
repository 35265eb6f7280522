"""Renders a conversation by a model's chat template, which may be anybody's program.

Jinja's sandbox keeps a template from files and from Python's insides, but not from looping for hours or from a text of
gigabytes, whatever the conversation. So a template that isn't ours is rendered by a helper process
(``rollout.template_worker``), every conversation anew: it may behave otherwise for each. The helper takes a second to
start, once for a process that renders, and about a tenth of a millisecond for a conversation.
"""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rewards.errors import ConfigError, first_line
from rewards.helper import Helper
from rollout.models.tokenizer import CHAT_TEMPLATE

CPU_LIMIT_S = 10.0
MEMORY_BYTES = 2**30
MAX_CHARACTERS = 64 * 2**20
"""Of a rendered conversation."""
_WALL_LIMIT_S = 120.0
"""For a helper that gets no CPU time, or whose answer is lost."""

_helper = Helper("rollout.template_worker", str(CPU_LIMIT_S), str(MEMORY_BYTES), str(MAX_CHARACTERS))


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    """The conversation as ``tokenizer.apply_chat_template`` writes it.

    Raises ConfigError, naming the model, when its template fails on these messages or needs more than the limits.
    """
    model = tokenizer.name_or_path or "the tokenizer"
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several by name, and no default
        raise ConfigError(f"{model} has no chat template to take: {first_line(error)}") from error
    if template == CHAT_TEMPLATE:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text
    question = {
        "conversations": [list(messages)],
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    if not _helper.start():
        raise ConfigError(f"the process that renders the chat template of {model} can't be started on this machine")
    reply = json.loads(_helper.ask(json.dumps(question).encode(), _WALL_LIMIT_S) or '{"fault": null}')
    if "text" in reply:
        return reply["text"]
    remedy = "give the model another (chat_template.jinja or tokenizer_config.json in its folder)"
    if reply["fault"] is None:
        raise ConfigError(
            f"the chat template of {model} needs more than {CPU_LIMIT_S:g} s of CPU time, {MEMORY_BYTES >> 20} MiB or "
            f"{MAX_CHARACTERS} characters for one conversation; {remedy}"
        )
    raise ConfigError(f"the chat template of {model} fails on a conversation ({reply['fault']}); {remedy}")
