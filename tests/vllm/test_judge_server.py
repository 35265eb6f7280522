"""A judge behind vLLM's own server, with a model whose next-token law is known: scores, log-probabilities and keys."""

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewards.judge.judge import Judge, try_out
from rewards.judge.reply import JudgeFailed
from rewards.judge.settings import JudgeSettings
from rollout.grading import GraderPool
from rollout.models.tokenizer import build_tokenizer
from tests.support.real_runs import kill_session

pytestmark = pytest.mark.vllm

LAW = {"4": 0.5, "5": 0.3, "3": 0.2}
EXPECTED = sum(int(token) * share for token, share in LAW.items())
WIDTH = 128
KEY = "sk-very-secret-1234"
START_LIMIT_S = 300.0
"""On two busy cores; a quiet machine needs a minute, nearly all of it imports."""


def write_judge(folder: Path) -> None:
    """A Llama of one layer that does nothing: the last token alone says which one is next. A reply begins by ``LAW``,
    and ends behind its first number."""
    tokenizer = build_tokenizer()
    size, end = len(tokenizer), tokenizer.convert_tokens_to_ids("<|eot_id|>")
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config).float()
    logits = torch.full((size, size), -30.0)  # [last token, next token]
    for token, share in LAW.items():
        number = tokenizer.convert_tokens_to_ids(token)
        logits[tokenizer.convert_tokens_to_ids("\n\n"), number] = math.log(share)
        logits[number, end] = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :size].fill_diagonal_(1.0)
        model.lm_head.weight[:, :size] = logits.T / math.sqrt(WIDTH)  # the norm makes sqrt(WIDTH) of the one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge")
    write_judge(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": KEY,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager"]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "4"]
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not healthy(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        kill_session(server.pid)
        server.wait(timeout=60)


def healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def settings(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JudgeSettings:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    patient = {"timeout_s": 120.0, "try_timeout_s": 100.0, "cache_dir": str(tmp_path)}
    return JudgeSettings(model="tiny", url=url, rubric="It is clear.", key_variable="JUDGE_KEY", **patient)


def score(settings: JudgeSettings) -> float:
    return Judge(settings).score([{"role": "user", "content": "Why?"}], {}, "Because.")


def test_the_score_is_the_expectation_of_the_model_s_law(settings: JudgeSettings) -> None:
    found = try_out(settings)
    assert found.expected and found.value == pytest.approx(EXPECTED, abs=1e-5)
    written = try_out(settings.model_copy(update={"logprobs": False}))
    assert written == (4.0, False), "the control: the likeliest number"


def test_a_number_may_be_all_that_the_server_lets_through(settings: JudgeSettings) -> None:
    """Its own field of a request, passed on: the model's likeliest number is not among those that it may write."""
    only = settings.model_copy(update={"request": {"structured_outputs": {"choice": ["3", "5"]}}, "logprobs": False})
    assert score(only) == 5.0


def test_what_the_server_refuses(settings: JudgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeFailed, match="status 404: .*does not exist"):
        score(settings.model_copy(update={"model": "other"}))
    with pytest.raises(JudgeFailed, match="cut off"):
        score(settings.model_copy(update={"request": {"max_tokens": 1}}))
    with pytest.raises(JudgeFailed, match="status 400"):
        score(settings.model_copy(update={"request": {"top_logprobs": 1000}}))
    with pytest.raises(JudgeFailed, match="status 401: it wants a key"):
        score(settings.model_copy(update={"key_variable": None}))
    monkeypatch.setenv("JUDGE_KEY", "sk-another")
    with pytest.raises(JudgeFailed, match="status 401: it refuses the key in JUDGE_KEY"):
        score(settings)


def test_graders_ask_it_side_by_side(settings: JudgeSettings, capsys: pytest.CaptureFixture[str]) -> None:
    graders = GraderPool("gsm8k", workers=3, timeout_s=130.0, judge=settings)
    fields = {"question": "What is 6 * 7?", "answer": "42"}
    graders.collect([graders.submit(fields, f"{number}") for number in range(3)])
    begin = time.perf_counter()
    grades = graders.collect([graders.submit(fields, f"Six. <answer>{number}</answer>") for number in range(36, 48)])
    cost_s = (time.perf_counter() - begin) / len(grades)
    graders.close()
    assert [grade.correct for grade in grades] == [number == 42 for number in range(36, 48)]
    assert all(grade.components["judge"] == pytest.approx((EXPECTED - 1) / 4, abs=1e-5) for grade in grades)
    with capsys.disabled():
        print(f"\na completion judged by vLLM's server, three graders: {1000 * cost_s:.1f} ms")
