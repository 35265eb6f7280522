"""deploy/cluster.yaml: both its sections against Ray's own schema."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as it stands: for a cloud."""
    return yaml.safe_load(FILE.read_text())


def on_premises(command: str) -> dict[str, Any]:
    """What this shell command writes to the file that it names last."""
    program, _, _ = command.partition(" > ")
    made = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return yaml.safe_load(made.stdout)


def switch(text: str) -> str:
    """The command that text tells to make the file for machines of one's own."""
    (found,) = re.findall(r"^(?:# +)?(sed .* deploy/cluster\.yaml > .*)$", text, re.MULTILINE)
    return found


def check_with_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does to the file before it launches anything: fill in the provider's defaults, then validate."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_cluster_file_passes_rays_own_schema(cluster: dict[str, Any]) -> None:
    prepared = check_with_ray(cluster)
    assert prepared["head_node_type"] == "head"


def test_rays_schema_refuses_an_unknown_setting(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check_with_ray(cluster | {"available_node_typos": {}})


def test_rays_schema_refuses_more_workers_than_the_cluster_may_have(cluster: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_workers"):
        check_with_ray(cluster | {"max_workers": 1})


def test_head_gets_no_work_and_each_worker_type_has_bounds(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    for name in ("learner", "rollout"):
        assert 0 < types[name]["min_workers"] <= types[name]["max_workers"]
        assert types[name]["resources"]["GPU"] > 0
    assert sum(kind["max_workers"] for kind in types.values()) <= cluster["max_workers"]


def test_every_node_starts_with_a_token_and_the_environment_on_path(cluster: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        (start,) = (c for c in cluster[f"{role}_start_ray_commands"] if "ray start" in c)
        before = start.partition("ray start")[0]
        assert "RAY_AUTH_MODE=token" in before
        assert "PATH=$HOME/unmask-env/bin:$PATH" in before
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_spot_nodes_tell_ray_of_their_end(cluster: dict[str, Any]) -> None:
    last = cluster["worker_start_ray_commands"][-1]
    assert "~/unmask/deploy/spot_notice.sh" in last and "RAY_AUTH_MODE=token" in last and last.endswith("&")
    assert (ROOT / "deploy" / "spot_notice.sh").stat().st_mode & 0o100, "it can't be executed"


def test_machines_of_ones_own_have_a_section_that_passes_too(cluster: dict[str, Any]) -> None:
    made = on_premises(switch(FILE.read_text()))
    prepared = check_with_ray(made)
    assert made["provider"]["type"] == "local" and cluster["provider"]["type"] == "aws"
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(made["provider"]["worker_ips"])
    section = {"provider", "auth", "max_workers", "upscaling_speed", "idle_timeout_minutes"}
    section |= {"available_node_types", "head_node_type"}
    assert {key: made.get(key) for key in made.keys() - section} == {
        key: cluster[key] for key in cluster.keys() - section
    }


def test_ray_refuses_machines_of_ones_own_with_the_clouds_node_types(cluster: dict[str, Any]) -> None:
    made = on_premises(switch(FILE.read_text()))
    with pytest.raises(Exception, match="available_node_types"):
        check_with_ray(made | {"available_node_types": cluster["available_node_types"]})
    with pytest.raises(jsonschema.ValidationError):
        check_with_ray(made | {"auth": {"user": "ubuntu"}})


def test_the_docs_tell_the_same_command() -> None:
    assert switch((ROOT / "docs" / "cluster.md").read_text()) == switch(FILE.read_text())
