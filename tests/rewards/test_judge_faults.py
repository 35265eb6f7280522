"""A judge whose server fails in every way that is known of servers: what is asked again, what ends at once, how long it
takes, and that nothing shows the key."""

import gzip
import json
import logging
import multiprocessing
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import ConfigError
from rewards.judge.client import MAX_BODY
from rewards.judge.judge import Judge
from rewards.judge.reply import JudgeFailed
from rewards.judge.settings import JudgeSettings
from tests.support.judges import Behaviour, JudgeServer, body, chat, closes, drip, echoes, hang, judge_server, slowly
from tests.support.judges import settings as quick

PROMPT = [{"role": "user", "content": "Why is 6 * 7 = 42?"}]
KEY = "sk-very-secret-1234"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.judge.client._FIRST_PAUSE_S", 0.02)
    with judge_server() as judge:
        yield judge


def score(settings: JudgeSettings, completion: str = "Six sevens.") -> float:
    return Judge(settings).score(PROMPT, {}, completion)


def test_the_number_written_is_the_score(server: JudgeServer) -> None:
    assert score(quick(server)) == 4.0
    (asked,) = server.asked
    assert asked["model"] == "tiny" and asked["temperature"] == 0 and asked["top_logprobs"] == 20
    assert "Authorization" not in server.headers[0]


ONCE: list[tuple[Behaviour, str]] = [  # a fault, and what is told of it when it stays
    (body(b"busy", 429), "status 429: 'busy'"),
    (body(b"busy", 429, Retry_After="0"), "status 429"),
    (body(b"busy", 429, Retry_After="soon"), "status 429"),
    (body(b"busy", 503, Retry_After=format_datetime(datetime.now(UTC) - timedelta(days=1))), "status 503"),
    (body(b"busy", 503, Retry_After=f"Mon, 01 Jan {10**20} 00:00:00 GMT"), "status 503"),
    (body(b"oh", 500), "status 500: 'oh'"),
    (body(b"<html>", 502), "status 502"),
    (closes, "RemoteProtocolError"),
    (body(b"{"), "not JSON: '{'"),
    (body(b"[" * 100_000), "not JSON"),
    (body(b"\xff\xfe"), "not JSON"),
    (body(gzip.compress(chat("4")), Content_Encoding="gzip"), "not JSON"),
    (body(b"[]"), "holds no choices"),
    (body(b'{"choices": []}'), "holds no choices: {'choices': []}"),
    (body(b'{"choices": [null]}'), "holds no choices"),
    (body(b'{"choices": {"0": {}}}'), "holds no choices"),
    (body(chat("4"), length=len(chat("4")) + 50), "RemoteProtocolError"),
    (body(chat("4"), length=len(chat("4")) - 5), "not JSON"),
    (body(chat("4"), length=0), "not JSON: ''"),
    (body(b" " * (MAX_BODY + 1)), "longer than"),
    (lambda handler: handler.wfile.write(b"SMTP ready\r\n\r\n"), "RemoteProtocolError"),
]


@pytest.mark.parametrize(("fault", "told"), ONCE)
def test_a_fault_of_the_server_is_asked_again(server: JudgeServer, fault: Behaviour, told: str) -> None:
    server.faults = [fault, fault]
    assert score(quick(server)) == 4.0 and len(server.asked) == 3
    assert server.asked[0] == server.asked[2]
    server.faults = [fault] * 9
    with pytest.raises(JudgeFailed, match="judge tiny at http://127.0.0.1:.*try 3 of 3") as failed:
        score(quick(server, tries=3))
    assert told in str(failed.value) and len(server.asked) == 6 and len(str(failed.value)) < 400


FINAL: list[tuple[Behaviour, str]] = [
    (body(b'{"error": "no such model"}', 404), 'status 404: \'{"error": "no such model"}\''),
    (body(b"logprobs are not served", 400), "status 400: 'logprobs"),
    (body(b"no", 401), "status 401: it wants a key"),
    (body(b"", 302, Location="http://127.0.0.1:1/"), "status 302"),
    (body(chat("7")), "wrote 7, which is not from 1 to 5"),
    (body(chat("0")), "wrote 0"),
    (body(chat("Score: 4")), "'Score: 4' and not one whole number"),
    (body(chat("4 or 5")), "and not one whole number"),
    (body(chat("4.5")), "and not one whole number"),
    (body(chat("-4")), "and not one whole number"),
    (body(chat("\u0664")), "and not one whole number"),
    (body(chat("")), "'' and not one whole number"),
    (body(chat("<think>4")), "and not one whole number"),
    (body(chat(None)), "no text but None"),
    (body(chat(["4"])), "no text but ['4']"),
    (body(chat("4", finish="length")), "cut off ('4'); give it more room"),
    (body(b'{"choices": [{"message": "4"}]}'), "no text"),
    (body(chat("4", logprobs={"4": float("nan")}).replace(b"NaN", b'"x"')), "log-probability 'x' is none"),
    (body(chat("4", logprobs={"4": 3.0})), "log-probability 3.0 is none"),
    (body(chat("4", logprobs={"4": -(10**400)})), "give no number of the scale any probability"),
    (body(chat("4", logprobs={"4": -1e6})), "give no number of the scale any probability"),
]


@pytest.mark.parametrize(("fault", "told"), FINAL)
def test_what_asking_again_would_not_change_ends_at_once(server: JudgeServer, fault: Behaviour, told: str) -> None:
    server.faults = [fault]
    with pytest.raises(JudgeFailed) as failed:
        score(quick(server))
    assert told in str(failed.value) and len(server.asked) == 1


@pytest.mark.parametrize("fault", [hang(9), drip(head=True), drip(head=False)], ids=["hangs", "head", "body"])
def test_an_answer_has_a_time_limit_as_a_whole(server: JudgeServer, fault: Behaviour) -> None:
    server.faults = [fault]
    begin = time.monotonic()
    assert score(quick(server, try_timeout_s=0.3)) == 4.0
    assert 0.3 <= time.monotonic() - begin < 2
    server.faults = [fault] * 9
    with pytest.raises(JudgeFailed, match="no score within 0.3 s; it has not answered"):
        score(quick(server, timeout_s=0.3))
    begin = time.monotonic()
    with pytest.raises(JudgeFailed, match=r"no score within 1 s; no answer within 0.3 s \(try"):
        score(quick(server, try_timeout_s=0.3, timeout_s=1.0, tries=9))
    assert 1.0 <= time.monotonic() - begin < 2


def test_a_pause_that_the_server_asks_for_is_kept(server: JudgeServer) -> None:
    server.faults = [body(b"", 429, Retry_After="1")]
    begin = time.monotonic()
    assert score(quick(server)) == 4.0
    assert time.monotonic() - begin >= 1
    later = format_datetime(datetime.now(UTC) + timedelta(minutes=5))
    for asked in ("60", later):
        server.faults = [body(b"", 429, Retry_After=asked)]
        begin = time.monotonic()
        with pytest.raises(JudgeFailed, match="asks for a pause of .* s are left"):
            score(quick(server))
        assert time.monotonic() - begin < 1, "more than there is time for isn't waited for"


def test_nobody_listens(server: JudgeServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(JudgeFailed, match=f"at {url}: ConnectError.*try 2 of 2"):
            score(quick(server, url=url, tries=2))
    for url in ("http://judge.invalid/v1", "http://a..b/v1", f"http://{'a' * 70}.invalid/v1"):
        with pytest.raises(JudgeFailed, match="ConnectError|InvalidURL"):
            score(quick(server, url=url, tries=1))


def test_what_is_left_of_a_lying_answer_is_not_the_next_one_s(server: JudgeServer) -> None:
    """Behind the length that it names, the server sends another whole answer."""
    trailing = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(chat("1")), chat("1"))
    server.faults = [body(chat("5") + trailing, length=len(chat("5")))]
    judge = Judge(quick(server))
    assert [judge.score(PROMPT, {}, text) for text in ("a", "b")] == [5.0, 4.0]


# ---- the key


def test_the_key_is_sent_and_nowhere_to_be_seen(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    keyed = quick(server, key_variable="JUDGE_KEY", cache=True, tries=1)
    judge = Judge(keyed)
    assert judge.score(PROMPT, {}, "a") == 4.0
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    for status in (200, 400, 401, 403, 429, 500):
        server.faults = [echoes(status)]
        with pytest.raises(JudgeFailed) as failed:
            judge.score(PROMPT, {}, f"b{status}")
        shown = [str(failed.value), repr(failed.value), repr(failed.value.__context__), repr(failed.value.__cause__)]
        assert KEY not in "".join(shown), status
        assert ("repeats the key" in shown[0]) == (status not in (401, 403)), "what was sent is what came back"
    for padding in range(190, 200, 3):  # the key where a long answer is cut
        server.faults = [body(b"x" * padding + KEY.encode(), 400), body(chat("x" * (padding - 140) + KEY))]
        for number in range(2):
            with pytest.raises(JudgeFailed, match="repeats the key") as failed:
                judge.score(PROMPT, {}, f"c{padding}{number}")
            assert "sk" not in str(failed.value)
    assert KEY not in caplog.text and KEY not in repr(keyed) + keyed.model_dump_json() + repr(judge)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_key_that_comes_back_escaped_is_not_shown(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-ve/ry\"sec'ret\\" + "1" * 60
    monkeypatch.setenv("JUDGE_KEY", key)
    judge = Judge(quick(server, key_variable="JUDGE_KEY", tries=1))
    slashed = chat(key).replace(b"/", b"\\/")
    coded = chat("x").replace(b'"x"', b'"' + b"".join(b"\\u%04x" % ord(letter) for letter in key) + b'"')
    nested = json.dumps({"error": slashed.decode()}).encode()
    for data in (chat(key), slashed, coded, nested):
        for status in (200, 400, 500):
            server.faults = [body(data, status)]
            with pytest.raises(JudgeFailed) as failed:
                judge.score(PROMPT, {}, "a")
            told = str(failed.value)
            assert "repeats the key" in told or "holds no choices" in told and status == 200
            assert "sk-" not in told and "111111" not in told  # six: a port may have three
    server.faults = [body(chat("sk-another"))]
    with pytest.raises(JudgeFailed, match="the judge wrote 'sk-another'"):
        judge.score(PROMPT, {}, "a")


@pytest.mark.parametrize("value", [None, "", " \n", "sk-\u00e9", "sk two", "sk\x01"])
def test_a_key_that_cannot_be_sent(server: JudgeServer, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="JUDGE_KEY") as failed:
        Judge(quick(server, key_variable="JUDGE_KEY"))
    assert "sk" not in str(failed.value).replace("task", "") and not server.asked


# ---- scores on disk


def test_the_same_question_is_asked_once(server: JudgeServer, tmp_path: Path) -> None:
    kept = quick(server, cache=True)
    server.faults = [body(chat("2")), body(chat("3"))]
    assert [score(kept), score(kept), Judge(kept).score(PROMPT, {}, "another")] == [2.0, 2.0, 3.0]
    assert len(server.asked) == 2
    folder = tmp_path / "cache" / "judge"
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*")) if path.is_dir()} == {0o700}
    files = list((folder / "scores").rglob("*.json"))
    assert sorted(json.loads(path.read_text())["score"] for path in files) == [2.0, 3.0]


@pytest.mark.parametrize(
    "change",
    [
        *({"model": "other"}, {"rubric": "Another."}, {"highest": 6}, {"lowest": 0}, {"logprobs": False}),
        *({"request": {"seed": 1}}, {"url": "localhost"}),
    ],
    ids=repr,
)
def test_another_question_is_asked(server: JudgeServer, change: dict[str, Any]) -> None:
    if "url" in change:
        change = {"url": server.url.replace("127.0.0.1", "localhost")}
    score(quick(server, cache=True))
    score(quick(server, cache=True, **change))
    assert len(server.asked) == 2
    patient = {"timeout_s": 4.0, "tries": 2, "concurrency": 3, "weight": 2.0, "right_from": 3.0}
    score(quick(server, cache=True, **patient))
    assert len(server.asked) == 2, "patience, weight and verdict are no part of the question"


def test_failures_are_not_kept(server: JudgeServer) -> None:
    server.faults = [body(chat("none"))]
    with pytest.raises(JudgeFailed):
        score(quick(server, cache=True))
    assert score(quick(server, cache=True)) == 4.0


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"score": null}', b'{"score": NaN}', b'{"score": "4"}'])
def test_a_damaged_file_is_written_anew(server: JudgeServer, tmp_path: Path, damage: bytes) -> None:
    kept = quick(server, cache=True)
    score(kept)
    (path,) = (tmp_path / "cache" / "judge" / "scores").rglob("*.json")
    path.write_bytes(damage)
    assert score(kept) == 4.0 and len(server.asked) == 2
    assert json.loads(path.read_text()) == {"score": 4.0}


def test_a_folder_that_cannot_be_written(server: JudgeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file.*make room there, or name another folder with task.judge.cache_dir"):
        Judge(quick(server, cache_dir=str(tmp_path / "file")))


def _scores(settings: JudgeSettings, names: list[str]) -> list[float]:
    judge = Judge(settings)
    return [judge.score(PROMPT, {}, name) for name in names]


@pytest.mark.slow
def test_many_processes_share_a_folder_and_the_places_in_it(server: JudgeServer, tmp_path: Path) -> None:
    """Six processes, two places: never more than two questions at once, and all scores right. The control has six."""
    names = [f"completion {number}" for number in range(4)]
    server.usual = slowly(0.1, body(chat("3")))
    with multiprocessing.get_context("spawn").Pool(6) as pool:
        for count, most in ((2, 2), (6, 6)):
            server.most_at_once = 0
            shared = quick(server, cache=True, concurrency=count, timeout_s=30.0, cache_dir=str(tmp_path / str(count)))
            found = pool.starmap(_scores, [(shared, names)] * 6, chunksize=1)
            assert found == [[3.0] * 4] * 6
            assert server.most_at_once <= most and (count == 2 or server.most_at_once > 2)


def test_waiting_for_a_place_ends(server: JudgeServer) -> None:
    server.usual = slowly(1.5, body(chat("3")))
    single = quick(server, concurrency=1, timeout_s=0.8)
    with ThreadPoolExecutor(2) as threads:
        patient = threads.submit(score, quick(server, concurrency=1))
        time.sleep(0.3)
        with pytest.raises(JudgeFailed, match="no score within 0.8 s; no place was free"):
            score(single)
        assert patient.result(timeout=10) == 3.0
    assert len(server.asked) == 1


def test_what_a_judged_completion_costs(server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Printed with ``pytest -s``: the server answers at once, so this is what we add to the judge's own time."""
    judge, texts = Judge(quick(server, cache=True)), [f"{number} is a number. " * 40 for number in range(100)]
    costs: list[float] = []
    for _ in range(2):
        begin = time.perf_counter()
        for text in texts:
            judge.score(PROMPT, {}, text)
        costs.append(1000 * (time.perf_counter() - begin) / len(texts))
    with capsys.disabled():
        print(f"\na judged completion: {costs[0]:.2f} ms asked, {costs[1]:.2f} ms from disk")
    assert len(server.asked) == 100
