"""Problems from wherever a setting says: a file, or a data set of the Hugging Face hub by name.

A hub source reads ``hub:NAME[:CONFIG]:SPLIT``: ``hub:openai/gsm8k:main:train``, ``hub:HuggingFaceH4/MATH-500:test``,
``hub:Jiayi-Pan/Countdown-Tasks-3to4:train[:20000]`` (the split's first 20,000 rows). NAME may also be a local folder
laid out like a hub data set. The package ``datasets`` reads it; it is imported only then, keeps what it downloaded in
its cache (``HF_HOME``), and with ``HF_HUB_OFFLINE=1`` takes it from there. Loading scripts of a data set are not run;
tests and prompts of the code tasks are code of its rows, which runs in the sandbox (``rewards.sandbox``).
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewards.errors import ConfigError, DataError
from rewards.files import MAX_ROW, Row, characters, known_types, problems_from_file, problems_from_rows, too_long
from rewards.task import Problem, Split, Task

PREFIX = "hub:"
"""What tells a hub source from a path."""

_SOURCE = re.compile(r"hub:(?P<name>[^:\s]+)(:(?P<config>[^:\s\[\]]+))?:(?P<split>[\w.-]+(\[[-\d%:]*\])?)")


class DataTask(Task):
    """A task whose problems are rows of published data, or of a file of the user's."""

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        source = self.source(split, path)
        assert source is not None, "a task of real data has default sources"
        return problems_from_source(source, task=self.name, size=size, convert=self.fields_from_row)

    @abstractmethod
    def fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The task's fields from a row of the published files; None for a row to pass over, such as one without an
        answer in a test set."""


def problems_from_source(
    source: str, *, task: str, size: int, convert: Callable[[Row], dict[str, Any] | None]
) -> list[Problem]:
    """The first ``size`` usable rows of a file or a hub data set as problems, in its order.

    ``convert``: see ``rewards.files.problems_from_file``. Raises ConfigError for a source that can't be understood and
    when ``datasets`` is missing, DataError when the data can't be had or a row is wrong.
    """
    if not source.startswith(PREFIX):
        return problems_from_file(str(Path(source).expanduser()), task=task, size=size, convert=convert)
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise ConfigError(
            f"{source!r} is no data source; write hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT "
            f"(hub:openai/gsm8k:main:train), or the path of a file ({known_types()})"
        )
    stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{Path(found['name']).name}-{found['split']}").strip("-")
    return problems_from_rows(
        _hub_rows(source, found["name"], found["config"], found["split"]),
        source=source,
        stem=f"{task}-{stem}",
        task=task,
        size=size,
        convert=convert,
    )


def _hub_rows(source: str, name: str, config: str | None, split: str) -> Iterator[tuple[int, str, Row]]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package datasets ({error}); install it with `pip install datasets`, or give the path "
            "of a file"
        ) from error
    datasets.disable_progress_bars()  # a bar would tear the run's own output apart
    try:
        rows = datasets.load_dataset(name, config, split=split)
        for number, row in enumerate(rows, start=1):
            place = f"{source}, row {number}"
            if characters(row) > MAX_ROW:
                raise DataError(f"{place}: {too_long()}")
            yield number, place, dict(row)
    except DataError:
        raise
    except Exception as error:  # the package and what it calls raise errors of many unrelated classes
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source} can't be read ({type(error).__name__}: {reason}); check the name, the configuration, the split "
            "and the connection, or give the path of a file"
        ) from error
