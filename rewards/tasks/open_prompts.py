"""Prompts whose answers no parser can grade: a judge gives verdict and reward (``task.judge.*``)."""

from typing import Any, ClassVar

from rewards.errors import ConfigError, DataError
from rewards.parsing import shorten
from rewards.task import Grade, Problem, Split, Task
from rewards.tasks.hub import problems_from_source


class OpenPrompts(Task):
    """Fields: ``prompt``, and ``reference``, an answer to compare with or None, which ``task.judge.fields`` can show to
    the judge. It has no data set of its own."""

    name: ClassVar[str] = "open_prompts"
    components: ClassVar[tuple[str, ...]] = ()

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        if path is None:
            raise ConfigError(f"{self.name} has no problems of its own; set task.train_path and task.test_path")
        return problems_from_source(path, task=self.name, size=size, convert=self._fields_from_row)

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": fields["prompt"]}]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        return Grade(False, {}, "only a judge can tell")

    def validate_fields(self, fields: dict[str, Any]) -> None:
        prompt, reference = fields.get("prompt"), fields.get("reference")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"prompt must be a text, not {shorten(prompt)}")
        if reference is not None and not isinstance(reference, str):
            raise DataError(f"reference must be a text or null, not {shorten(reference)}")

    def expected(self, fields: dict[str, Any]) -> str | None:
        reference: str | None = fields.get("reference")
        return reference

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The prompt without case and spaces."""
        return "".join(fields["prompt"].casefold().split())

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = row.get("prompt", row.get("question", row.get("instruction")))
        if isinstance(prompt, str) and prompt == row.get("instruction") and isinstance(row.get("input"), str):
            prompt = f"{prompt}\n\n{row['input']}".rstrip()  # Alpaca's rows have what it is about there
        reference = row.get("reference", row.get("answer", row.get("output")))
        fields = {"prompt": prompt, "reference": reference}
        self.validate_fields(fields)
        return fields
