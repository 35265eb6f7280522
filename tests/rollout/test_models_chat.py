"""Chat templates of strangers: rendered as transformers does, in bounded time and memory, whatever they do."""

from collections.abc import Iterator

import pytest

from learner.finetuning.data import turn_end
from rewards.errors import ConfigError
from rewards.helper import Helper
from rollout.models import chat
from rollout.models.encoding import encode_prompt
from rollout.models.tokenizer import build_tokenizer
from tests.support.published import _DREAM_TEMPLATE, _LLADA_TEMPLATE

MESSAGES = [{"role": "system", "content": "Be \u00e9xact. \ud800"}, {"role": "user", "content": " 1 + 1?\n"}]
CONTENTS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LONG = "{{ 'a' * 300000000 }}"


def helper(*, cpu_s: float = 0.5, memory_mib: int = 256, characters: int = 10_000) -> Helper:
    return Helper("rollout.template_worker", str(cpu_s), str(memory_mib << 20), str(characters))


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    low = helper()
    monkeypatch.setattr(chat, "_helper", low)
    yield
    low.stop()


def tokenizer(template: str | dict[str, str]):
    made = build_tokenizer()
    made.chat_template = template
    made.name_or_path = "models/foreign"
    return made


@pytest.mark.parametrize("template", [_LLADA_TEMPLATE, _DREAM_TEMPLATE, CONTENTS, "{{ messages | tojson }}{{ tools }}"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_foreign_template_is_rendered_as_transformers_does(template: str, add_generation_prompt: bool) -> None:
    foreign = tokenizer(template)
    expected = foreign.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert chat.render_chat(foreign, MESSAGES, add_generation_prompt=add_generation_prompt) == expected
    assert chat.render_chat(
        tokenizer({"default": template, "tool_use": "x"}), MESSAGES, add_generation_prompt=add_generation_prompt
    ) == (expected)


def test_our_own_template_needs_no_process(low_limits: None) -> None:
    encode_prompt(build_tokenizer(), MESSAGES[1:])
    assert chat._helper._popen is None
    encode_prompt(tokenizer(_DREAM_TEMPLATE), MESSAGES[1:])
    assert chat._helper._popen is not None


ENDLESS = {
    "loops": LOOPS,
    "a long text": LONG,
    "a long text, folded when the template is compiled": "{% set x = 'a' * 30000000000 %}{{ x | length }}",
    "a long list": "{{ ([1] * 300000000) | length }}",
    "a large number": "{{ (2 ** 9999999999) % 7 }}",
    "a wide field": "{{ '%30000000000d' % 3 }}",
    "more text than a prompt has": "{{ 'a' * 20000 }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
@pytest.mark.slow
def test_a_template_that_needs_too_much_is_named(low_limits: None, template: str) -> None:
    with pytest.raises(ConfigError, match="chat template of models/foreign needs more than .* CPU time") as caught:
        encode_prompt(tokenizer(template), MESSAGES[1:])
    assert "\n" not in str(caught.value)
    assert encode_prompt(tokenizer(CONTENTS), MESSAGES[1:])  # the next one is rendered


def test_where_a_turn_ends_is_found_under_the_limits_too(low_limits: None) -> None:
    assert turn_end(tokenizer(_LLADA_TEMPLATE)) != []
    with pytest.raises(ConfigError, match="chat template of models/foreign needs more than"):
        turn_end(tokenizer(LOOPS))


def test_a_template_that_waits_for_a_certain_prompt_is_caught_there(low_limits: None) -> None:
    trap = tokenizer(CONTENTS + "{% if 'now' in messages[0]['content'] %}" + LOOPS + "{% endif %}")
    for content, fails in (("then", False), ("now", True), ("then", False)):
        messages = [{"role": "user", "content": content}]
        if fails:
            with pytest.raises(ConfigError, match="needs more than"):
                encode_prompt(trap, messages)
        else:
            assert trap.decode(encode_prompt(trap, messages)) == content


@pytest.mark.slow
def test_the_limits_are_what_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same templates are rendered where the limits are higher."""
    loops = tokenizer("{% for a in range(20000) %}{% for b in range(200) %}{% endfor %}{% endfor %}x")
    long = tokenizer("{{ (messages[1]['role'] * 10000000) | length }}")
    outcomes = []
    for limits in ({"cpu_s": 0.05, "memory_mib": 16}, {"cpu_s": 100, "memory_mib": 1024}):
        monkeypatch.setattr(chat, "_helper", helper(**limits))
        for foreign in (loops, long):
            try:
                outcomes.append(chat.render_chat(foreign, MESSAGES, add_generation_prompt=True)[-10:])
            except ConfigError:
                outcomes.append(None)
        chat._helper.stop()
    assert outcomes == [None, None, "x", "40000000"]


FAULTS = {
    "{{ raise_exception('no system\nprompt') }}": "TemplateError: no system prompt",
    "{% if %}": "TemplateSyntaxError",
    "{{ a.b.c }}": "UndefinedError: 'a' is undefined",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "RecursionError",
}


@pytest.mark.parametrize(("template", "fault"), FAULTS.items(), ids=FAULTS.values())
def test_a_template_that_fails_is_named(template: str, fault: str) -> None:
    with pytest.raises(ConfigError, match="the chat template of models/foreign fails on a conversation") as caught:
        encode_prompt(tokenizer(template), MESSAGES[1:])
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="models/foreign has no chat template to take"):
        encode_prompt(tokenizer({"rag": template}), MESSAGES[1:])


def test_a_helper_that_was_killed_is_started_anew(low_limits: None) -> None:
    assert encode_prompt(tokenizer(CONTENTS), MESSAGES[1:])
    assert chat._helper._popen is not None
    first = chat._helper._popen
    first.kill()
    first.wait()
    assert encode_prompt(tokenizer(CONTENTS), MESSAGES[1:])
    assert chat._helper._popen is not first
