"""schemathesis against a real service: no 5xx, no status or body that the description doesn't have."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.support.dashboards import Dashboard, Place, dashboard, write_run

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
]

FUZZ = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def service(shared_place: Place) -> Iterator[Dashboard]:
    for name in ("0", "one"):
        write_run(shared_place, name)
    with dashboard(shared_place) as service:
        yield service


@pytest.fixture(scope="module")
def operations(service: Dashboard) -> list[APIOperation]:
    """All but the stream, which never ends."""
    document = service.get("/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "run_id":  # two runs are there, or nearly everything would be a 404
                    parameter["schema"] = {"anyOf": [{"enum": ["one", "0"]}, parameter["schema"]]}
    del document["paths"]["/api/v1/stream"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=service.url)
    return [found.ok() for found in schema.get_all_operations()]


def fuzz(operation: APIOperation, mode: GenerationMode, **headers: str) -> None:
    # A function a time: hypothesis keeps its state in it. The pytest plugin of schemathesis 4.32 can't do pytest 9.2.
    @FUZZ
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, headers=headers, timeout=30)

    try:
        run()
    except Unsatisfiable:  # there is no wrong way to ask for this
        assert mode is GenerationMode.NEGATIVE


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_route_answers_as_described(operations: list[APIOperation], mode: GenerationMode) -> None:
    assert len(operations) >= 15
    for operation in operations:
        fuzz(operation, mode)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_actions_with_the_token_answer_as_described(
    operations: list[APIOperation], mode: GenerationMode, service: Dashboard
) -> None:
    """Not submissions, which would start real jobs."""
    (operation,) = [one for one in operations if one.method == "post" and one.path.endswith("/actions")]
    fuzz(operation, mode, Authorization=f"Bearer {service.token}")


def test_a_status_that_is_not_described_is_found(service: Dashboard) -> None:
    """The control: the same check on a description that lacks the 404."""
    document = service.get("/openapi.json").json()
    path = "/api/v1/runs/{run_id}"
    del document["paths"][path]["get"]["responses"]["404"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=service.url)
    case = schema[path]["GET"].Case(path_parameters={"run_id": "none"})
    with pytest.raises(FailureGroup) as found:
        case.call_and_validate(checks=CHECKS)
    assert "Undocumented status code" in str(found.value.exceptions[0])
