"""Who may reach the dashboard, and who may write: a real service each time."""

import os
import socket
import stat
from pathlib import Path

import httpx
import pytest

from rewards.errors import ConfigError
from services.dashboard.security import Security
from services.dashboard.settings import Settings, check_binding
from tests.support.dashboards import Dashboard, dashboard, refused, write_run
from tests.support.real_runs import command_line

GOOD_TOKEN = "a-token-of-more-than-thirty-two-characters"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    runs = tmp_path_factory.mktemp("runs")
    write_run(runs, "one", iterations=2)
    with dashboard(runs) as service:
        yield service


# ---- the token


def test_token_file_is_made_once_for_the_owner_only(tmp_path: Path) -> None:
    with dashboard(tmp_path) as first:
        path = tmp_path / ".dashboard-token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        token = first.token
        assert len(token) >= 43  # 32 random bytes
    with dashboard(tmp_path) as second:
        assert second.token == token
    assert [entry.name for entry in tmp_path.iterdir()] == [".dashboard-token"]  # and no draft is left


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [(GOOD_TOKEN, 0o644, "can be read by others"), ("tiny", 0o600, "shorter than 32"), ("", 0o600, "shorter than 32")],
)
@pytest.mark.slow
def test_an_unsafe_token_file_is_refused(tmp_path: Path, content: str, mode: int, sentence: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    status, said = refused("--runs", str(tmp_path), "--port", "0", "--token-file", str(path))
    assert status == 2 and sentence in said and str(path) in said
    assert not content or content not in said.replace(str(path), "")


@pytest.mark.parametrize("umask", ["0000", "0077", "0777"])
def test_umask_neither_opens_nor_spoils_the_token_file(tmp_path: Path, umask: str) -> None:
    path = tmp_path / "token"
    before = os.umask(int(umask, 8))
    try:
        Security(Settings(runs_dir=tmp_path, token_file=path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) > 43


def test_a_token_file_that_somebody_else_may_know_is_refused(tmp_path: Path) -> None:
    settings = Settings(runs_dir=tmp_path, token_file=tmp_path / "token")
    other = tmp_path / "other"
    other.write_text(GOOD_TOKEN)
    other.chmod(0o644)
    settings.token_path.symlink_to(other)
    with pytest.raises(ConfigError, match="can be read by others"):
        Security(settings)
    other.chmod(0o600)
    assert Security(settings).authorised(GOOD_TOKEN), "the control: a link to a good file is good"
    if os.geteuid() == 0:
        os.chown(other, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to another user"):
            Security(settings)
    other.unlink()
    with pytest.raises(ConfigError, match="can't be used: No such file"):
        Security(settings)
    settings.token_path.unlink()
    os.mkfifo(settings.token_path, 0o600)
    with pytest.raises(ConfigError, match="no regular file"):
        Security(settings)


@pytest.mark.parametrize("token", ["", "a" * 31, "a" * 32 + " ", "\u00e4" * 32, "a" * 40 + "\n"])
def test_a_token_that_nobody_can_send_or_everybody_guess_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="UNMASK_DASHBOARD_TOKEN") as caught:
        check_binding(Settings(runs_dir=tmp_path), token)
    assert not token or token not in str(caught.value)
    check_binding(Settings(runs_dir=tmp_path), "a" * 32)


@pytest.mark.slow
def test_neither_token_nor_password_is_in_a_command_line(service: Dashboard, tmp_path: Path) -> None:
    with dashboard(tmp_path, UNMASK_DASHBOARD_TOKEN=GOOD_TOKEN) as other:
        assert "services.dashboard" in command_line(other.process.pid)
        assert GOOD_TOKEN not in command_line(other.process.pid)
    assert service.token not in command_line(service.process.pid)
    for url in ("postgresql://u:geheim@h/d", "postgresql:///d?password=geheim"):
        status, said = refused("--runs", str(tmp_path), "--store", url)
        assert status == 2 and "PGPASSWORD" in said and "geheim" not in said


def test_token_appears_nowhere_but_in_its_file(service: Dashboard) -> None:
    token = service.token
    wrong = {"Authorization": "Bearer wrong-and-noticeable"}
    right = {"Authorization": f"Bearer {token}"}
    paths = ("/", "/api/v1/runs", "/nope", "/openapi.json", "/metrics")
    answers = [service.client.get(path, headers=headers) for path in paths for headers in (wrong, right)]
    answers.append(service.client.post("/api/v1/runs/one/config", headers=right))
    for answer in answers:
        assert token not in answer.text and token not in str(answer.headers)
    assert token not in service.log() and "wrong-and-noticeable" not in service.log()
    # The control: the same request is seen where it should be.
    assert answers[-1].status_code == 405


# ---- addresses


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
@pytest.mark.slow
def test_other_addresses_than_loopback_need_a_token_of_the_environment(tmp_path: Path, host: str) -> None:
    options = ("--runs", str(tmp_path), "--port", "0", "--host", host)
    status, said = refused(*options)
    assert status == 2 and "UNMASK_DASHBOARD_TOKEN" in said and host in said
    status, said = refused(*options, UNMASK_DASHBOARD_TOKEN="short-and-noticeable")
    assert status == 2 and "at least 32" in said and "short-and-noticeable" not in said
    assert not (tmp_path / ".dashboard-token").exists()


def test_all_addresses_with_a_good_token_start(tmp_path: Path) -> None:
    with dashboard(tmp_path, "--host", "0.0.0.0", UNMASK_DASHBOARD_TOKEN=GOOD_TOKEN) as service:
        assert httpx.get(f"http://127.0.0.1:{service.port}/healthz", trust_env=False).status_code == 200
    assert not (tmp_path / ".dashboard-token").exists()


def test_the_loopback_of_ipv6_needs_no_token_of_the_environment(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with dashboard(tmp_path, "--host", "::1") as service:
        assert service.url.startswith("http://[::1]:") and service.get("/api/v1/runs").status_code == 200
        assert service.client.get("/api/v1/runs", headers={"Host": "evil.example"}).status_code == 400
        headers = {"Authorization": f"Bearer {service.token}", "Origin": service.url.rstrip("/")}
        asked = service.client.post("/api/v1/runs/none/actions", json={"action": "stop"}, headers=headers)
        assert asked.status_code == 404, "past the guard: there is no such run"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "192.0.2.7"])
def test_a_foreign_host_name_is_refused_on_loopback(service: Dashboard, host: str) -> None:
    answer = service.client.get("/api/v1/runs", headers={"Host": host})
    assert answer.status_code == 400
    if host:  # an empty one is refused by the HTTP parser already, or by us
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:80", "LOCALHOST:99"])
def test_own_host_names_are_served(service: Dashboard, host: str) -> None:
    assert service.client.get("/api/v1/runs", headers={"Host": host}).status_code == 200


@pytest.mark.slow
def test_a_port_in_use_is_said_or_passed_over(service: Dashboard, tmp_path: Path) -> None:
    options = ("--runs", str(tmp_path), "--port", str(service.port))
    status, said = refused(*options)
    assert status == 2 and f"127.0.0.1:{service.port} can't be listened on" in said
    with dashboard(tmp_path, "--port", str(service.port), "--any-port") as other:
        assert other.port != service.port and other.get("/healthz").status_code == 200


# ---- headers


def test_every_answer_forbids_what_the_page_does_not_need(service: Dashboard) -> None:
    for path in ("/", "/static/app.js", "/api/v1/runs", "/nope", "/api/v1/runs/none/config", "/metrics"):
        headers = service.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers and "set-cookie" not in headers
        assert "server" not in headers


def test_plotly_comes_from_the_installed_package_and_may_be_kept(service: Dashboard) -> None:
    answer = service.get("/static/vendor/plotly.min.js")
    assert answer.status_code == 200 and len(answer.content) > 1_000_000
    assert "max-age" in answer.headers["cache-control"]
    again = service.client.get(
        "/static/app.js", headers={"If-None-Match": service.get("/static/app.js").headers["etag"]}
    )
    assert again.status_code == 304


def test_the_page_names_no_other_machine(service: Dashboard) -> None:
    page = service.get("/").text
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
