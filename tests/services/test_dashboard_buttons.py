"""The buttons that control a run, in a real Chromium on a real run; without the token there are none."""

import signal
from pathlib import Path

import pytest

from services.dashboard import jobs
from tests.support.browsers import Watched, chromium, watched
from tests.support.dashboards import dashboard
from tests.support.real_runs import Runs, iterations, saved_iterations

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(900)]

BUTTONS = ".run-controls button"
ANSWER_MS = 120_000


def use_token(page: Watched, token: str) -> None:
    page.page.click("#token-button")
    page.page.fill("dialog input[name=token]", token)
    page.page.click("dialog button[type=submit]")


def press(page: Watched, action: str) -> None:
    page.page.click(f".run-controls [data-action={action}]", timeout=ANSWER_MS)


def told(page: Watched, action: str, status: str) -> str:
    """What the newest line says about an action, once it has come to this."""
    line = page.page.locator(f".control-lines li[data-action={action}]").first
    page.page.wait_for_selector(
        f".control-lines li[data-action={action}][data-status={status}]", timeout=ANSWER_MS, state="visible"
    )
    return str(line.text_content())


def test_buttons_do_what_they_say(runs: Runs, tmp_path: Path) -> None:
    settings = ("run.iterations=5000", "evaluation.every=0", "rollout.actors=2")  # it doesn't end by itself
    with chromium() as browser, dashboard(runs.folder) as service, runs.started("buttons", *settings) as run:
        run.wait_for_row(1)
        with watched(browser, service.url) as page:
            page.open("/run/buttons")
            page.shows(".run-head h1", "buttons")
            page.shows(".pill", "running")
            assert page.page.locator(BUTTONS).count() == 0, "buttons without a token"

            use_token(page, "not-the-token")
            page.shows("dialog .wrong", "this is not the token")
            assert page.page.locator(BUTTONS).count() == 0, "buttons for a wrong token"
            page.page.keyboard.press("Escape")
            assert service.api("runs/buttons/actions")["items"] == []
            page.expect_errors("401")

            use_token(page, service.token)
            press(page, "pause")
            text = told(page, "pause", "done")
            at = iterations(run.dir)[-1]
            assert f"paused after iteration {at}" in text
            page.shows(".pill", "paused")
            press(page, "checkpoint")
            assert f"saved after iteration {at}" in told(page, "checkpoint", "done")
            assert at in saved_iterations(run.dir)

            field = page.page.locator(".stepper input")
            page.wait_until("the number of actors", lambda: field.input_value() == "2")
            page.page.click(".stepper [aria-label='One actor fewer']")
            press(page, "set_actors")
            assert "now 1, before 2" in told(page, "set_actors", "done")
            page.wait_until("the new number", lambda: field.input_value() == "1")
            page.wait_until("the end of an actor", lambda: len(run.actors()) == 1)
            field.fill("9")
            press(page, "set_actors")
            assert "max_actors=9" in told(page, "set_actors", "refused")
            page.page.reload()
            assert "max_actors=9" in told(page, "set_actors", "refused"), "an answer is there after a reload too"
            assert service.api("runs/buttons/events", level="warning", kind="command")["items"] == []
            field = page.page.locator(".stepper input")
            page.page.screenshot(path=str(tmp_path / "paused.png"))

            press(page, "resume")
            assert f"goes on with iteration {at + 1}" in told(page, "resume", "done")
            page.shows(".pill", "running")
            assert page.page.evaluate("Object.keys(localStorage).filter((key) => key.includes('token')).length") == 0
            assert service.token not in page.page.url and not page.page.context.cookies()

            press(page, "stop")
            page.page.screenshot(path=str(tmp_path / "stop.png"))
            page.page.click("dialog [data-action=confirm-stop]")
            assert "resume=auto goes on there" in told(page, "stop", "done")
            assert run.wait() == 128 + signal.SIGTERM, run.output()
            assert "asked to stop by dashboard at 127.0.0.1" in run.output()
            page.shows(".pill", "stopped")
            asked = ", ".join(
                f".run-controls button[data-action={each}]" for each in ("stop", "pause", "resume", "checkpoint")
            )
            followed = page.page.locator(f"{asked}, .run-controls .stepper")
            page.wait_until("no buttons that a run that is over can't follow", lambda: followed.count() == 0)
        trail = [(each["action"], each["status"]) for each in service.api("runs/buttons/actions")["items"]]
        assert ("set_actors", "refused") in trail and ("stop", "done") in trail


def test_new_run_is_checked_and_the_token_forgotten(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with chromium() as browser, dashboard(tmp_path / "runs") as service, watched(browser, service.url) as page:
        page.open("/runs")
        page.shows("h1", "Runs")
        new_run = page.page.get_by_role("button", name="New run")
        assert not new_run.is_visible()
        use_token(page, service.token)
        new_run.click()
        page.shows("dialog", "without --ray-address")
        assert page.page.locator("dialog option").count() == len(jobs.recipes())
        page.page.select_option("dialog select", "smoke")
        page.page.fill("dialog [name=overrides]", "learner.lr=0.5\n# a remark\nlearner.lrr=1")
        page.page.click("dialog [data-action=check]")
        page.shows(".submit-answer[data-status=refused]", "did you mean 'learner.lr'")
        page.page.fill("dialog [name=overrides]", "learner.lr=0.5")
        page.page.click("dialog [data-action=check]")
        page.shows(".submit-answer[data-status=done]", "The settings are sound")
        assert page.page.locator("dialog [data-action=submit]").count() == 0, "a button that can't work"
        page.page.screenshot(path=str(tmp_path / "new-run.png"))
        page.page.keyboard.press("Escape")
        page.page.click("#token-button")
        page.page.get_by_role("button", name="Forget it").click()
        page.wait_until("read-only again", lambda: not new_run.is_visible())
        assert len(page.errors) == 1
        page.expect_errors("422")
