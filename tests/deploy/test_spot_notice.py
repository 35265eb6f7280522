"""deploy/spot_notice.sh against a metadata service like AWS's: no notice is 404, and a token is wanted."""

import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "spot_notice.sh"
NOTICE = '{"action": "terminate", "time": "2026-11-30T12:00:00Z"}'


class Metadata(http.server.BaseHTTPRequestHandler):
    """IMDSv2, which has a notice from the second question on."""

    asked = 0

    def do_PUT(self) -> None:
        self.answer(200 if self.path == "/latest/api/token" else 404, "secret")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            return self.answer(401, "")
        assert self.path == "/latest/meta-data/spot/instance-action"
        Metadata.asked += 1
        self.answer(200 if Metadata.asked > 1 else 404, NOTICE)

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode() if status == 200 else b"")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    Metadata.asked = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def watch(folder: Path, url: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the script did, and what it told `ray`: a program of that name that writes down its arguments."""
    told = folder / "told"
    ray = folder / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    ray.chmod(0o700)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "METADATA_URL": url, "XDG_RUNTIME_DIR": str(folder)}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    return done, told.read_text().splitlines() if told.exists() else []


def test_a_notice_is_told_to_ray(tmp_path: Path, service: str) -> None:
    done, told = watch(tmp_path, service)
    assert done.returncode == 0 and NOTICE in done.stdout and Metadata.asked == 2
    assert told[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert told[-2:] == ["--deadline-remaining-seconds", "110"]


def test_where_no_notices_come_it_ends(tmp_path: Path) -> None:
    done, told = watch(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0 and "no notices come here" in done.stdout and not told
