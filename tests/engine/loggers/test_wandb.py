"""Weights & Biases with the real client: what it writes offline, read back; and a server that is down or hangs."""

from __future__ import annotations

import json
import socket
import time

import pytest

from blip2x.engine.loggers import Loggers
from blip2x.engine.loggers.wandb import build
from blip2x.errors import Interrupted
from tests.engine.loggers.wandb_files import read
from tests.engine.loggers.wandb_server import serve

KEY = "0123456789abcdef0123456789abcdef01234567"
RUN = {"task": {"kind": "caption"}, "seed": 1, "dataset": {"url": "https://ann:pass@host/x"}, "said": f"key {KEY}"}
SOON = 60  # seconds: far more than is waited for the server here, far less than W&B's own limits


@pytest.fixture(autouse=True)
def own_client(monkeypatch, tmp_path):
    """No settings but the tests' own, and a client that has read them."""
    import wandb

    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # is set by the logger; put back afterwards
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "sweeps" / "rates" / "lr=1"
    path.mkdir(parents=True)
    return path


def start(folder, cfg, *, goes_on=False, said=None):
    return build(cfg, folder=folder, config=RUN, goes_on=goes_on, say=(said if said is not None else []).append)


def written(folder, kind="offline-run"):
    return [read(path) for path in sorted(folder.glob(f"wandb/{kind}-*/*.wandb"))]


def test_offline_run_has_everything_and_nothing_secret(folder, config, rows, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = start(folder, config("wandb", "mode=offline", "tags=[a,b]", "notes=why", "rows=2"))
    for step, cider in ((1, 0.5), (2, 0.75), (3, 0.25)):
        logger.log("s", step, {"loss": 4.0 - step, "lr": step / 10, "CIDEr": cider})
    logger.log("caption", 1, {"held_out/CIDEr": 1.0})  # another stage starts again at step 1
    logger.table("caption", 1, "predictions", *rows)
    logger.finish({"s": {"CIDEr": 0.25}, "seconds": 9})
    logger.close(failed=False)
    (found,) = written(folder)
    assert (found.run.project, found.run.display_name, found.run.run_group) == ("blip2x", "lr=1", "rates")
    assert (found.run.job_type, list(found.run.tags), found.run.notes) == ("caption", ["a", "b"], "why")
    assert found.config["seed"] == 1 and {"git_commit", "paddlepaddle"} <= set(found.config["versions"])
    assert found.config["dataset"] == {"url": "https://***@host/x"} and found.config["said"] == "key ***"
    assert found.history[:4] == [
        *({"s/step": n, "s/loss": 4.0 - n, "s/lr": n / 10, "s/CIDEr": c} for n, c in ((1, 0.5), (2, 0.75), (3, 0.25))),
        {"caption/step": 1, "caption/held_out/CIDEr": 1.0},
    ]
    assert found.summary["s/CIDEr"] == {"max": 0.75} and found.summary["s/loss"] == {"min": 1.0}
    assert found.summary["s/lr"] == 0.3 and found.summary["caption/held_out/CIDEr"] == {"max": 1.0}
    assert found.summary["results/s/CIDEr"] == 0.25 and found.summary["results/seconds"] == 9
    assert {name: metric.step_metric for name, metric in found.metrics.items() if metric.step_metric} == {
        "s/loss": "s/step", "s/lr": "s/step", "s/CIDEr": "s/step",
        "caption/held_out/CIDEr": "caption/step", "caption/predictions": "caption/step",
    }  # fmt: skip
    assert found.exit_code == 0
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/caption/predictions*.json")
    assert json.loads(table.read_text())["columns"] == ["image", "attention", "caption", "references", "scores/CIDEr"]
    assert found.history[4]["caption/predictions/nrows"] == 2
    staged = [path for path in (folder / "wandb/data").rglob("*") if path.is_file()]
    assert sum(path.read_bytes().startswith(b"\x89PNG") for path in staged) == 3  # below the run's folder, not in the home
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert KEY.encode() not in content and b"pass" not in content.replace(b"pass_", b""), path


def test_a_failed_run_is_marked_and_one_that_goes_on_is_the_same(folder, config):
    first = start(folder, config("wandb", "mode=offline"))
    first.log("s", 1, {"loss": 2.0})
    first.close(failed=True)
    second = start(folder, config("wandb", "mode=offline"), goes_on=True)
    second.log("s", 2, {"loss": 1.0})
    second.close(failed=False)
    before, after = sorted(written(folder), key=lambda found: found.history[0]["s/step"])
    assert before.run.run_id == after.run.run_id == (folder / "wandb_id.txt").read_text().strip()
    assert (before.exit_code, after.exit_code) == (1, 0)


def test_without_a_key_it_is_offline_and_says_how_to_send_it(folder, config):
    said = []
    logger = start(folder, config("wandb"), said=said)
    logger.close(failed=False)
    (line,) = said
    assert line.startswith(
        "note: Weights & Biases is kept offline (no key was found; `wandb login` saves one); later: wandb sync"
    )
    assert len(written(folder)) == 1
    assert list((folder.parents[2] / "home").rglob("settings")) == []


def test_online_without_a_key_is_a_warning(folder, config):
    said = []
    start(folder, config("wandb", "mode=online"), said=said).close(failed=False)
    assert said[0].startswith("warning: ") and len(written(folder)) == 1


def test_online_with_a_key_and_the_same_run_again_where_it_goes_on(folder, config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serve() as web:
        monkeypatch.setenv("WANDB_BASE_URL", web.url)
        said = []
        for goes_on in (False, True):
            logger = start(folder, config("wandb", "finish_seconds=20"), goes_on=goes_on, said=said)
            logger.log("s", 1, {"loss": 2.0})
            logger.close(failed=False)
    own = (folder / "wandb_id.txt").read_text().strip()
    named = [json.loads(body)["variables"]["name"] for body in web.bodies("UpsertBucket")]
    assert said == [] and len(named) > 2 and set(named) == {own}
    assert len(web.bodies("RunResumeStatus")) == 2
    assert any('\\"s/loss\\":2' in body for body in web.bodies("file_stream"))
    sent = "".join(body for _, body in web.asked)
    assert KEY not in sent and "ann:pass" not in sent and "https://***@host/x" in sent


def test_what_is_logged_is_soon_in_the_file_for_a_run_may_be_killed(folder, config):
    logger = start(folder, config("wandb", "mode=offline"))
    logger.log("s", 1, {"loss": 2.0})
    end = time.monotonic() + 12  # W&B's own interval is longer
    while not written(folder)[0].history and time.monotonic() < end:
        time.sleep(0.1)
    assert written(folder)[0].history == [{"s/step": 1, "s/loss": 2.0}]
    logger.close(failed=False)


@pytest.mark.parametrize("server", ["broken", "hanging", "absent"])
def test_a_server_that_does_not_answer_leaves_the_run_offline(server, folder, config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serve(status=500 if server == "broken" else 200, hangs=server == "hanging") as web:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}" if server == "absent" else web.url)
        said, began = [], time.monotonic()
        logger = start(folder, config("wandb", "start_seconds=1", "finish_seconds=1"), said=said)
        logger.log("s", 1, {"loss": 2.0})
        logger.close(failed=False)
        assert time.monotonic() - began < SOON
        assert web.asked or server == "absent"
    (line,) = said
    assert line.startswith("warning: Weights & Biases is kept offline (") and "<html" not in line and len(line) < 500
    (found,) = written(folder)
    assert found.history == [{"s/step": 1, "s/loss": 2.0}]


def test_a_server_that_hangs_in_the_middle_costs_a_warning(folder, config, rows, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serve() as web:
        monkeypatch.setenv("WANDB_BASE_URL", web.url)
        said, began = [], time.monotonic()
        cfg = config("wandb", "finish_seconds=1")
        loggers = Loggers({"wandb": start(folder, cfg, said=said)}, said.append)
        assert said == [] and web.bodies("UpsertBucket")  # online
        web.hangs.set()
        for step in range(200):
            loggers.log("s", step, {"loss": 2.0})
        loggers.table("s", 1, "predictions", *rows)
        loggers.close(failed=False)
        assert time.monotonic() - began < SOON
    assert "the server did not take everything within 1 s; send it later: wandb sync --include-online" in said[0]
    assert len(said) == 1
    assert len(written(folder, "run")[0].history) == 200


def test_ctrl_c_at_the_end_waits_for_a_hanging_server_no_longer(folder, config, monkeypatch):
    def stop(seconds):
        raise Interrupted("SIGINT")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serve() as web:
        monkeypatch.setenv("WANDB_BASE_URL", web.url)
        logger = start(folder, config("wandb", "finish_seconds=600"))
        web.hangs.set()
        logger.log("s", 1, {"loss": 2.0})
        monkeypatch.setattr(logger._worker, "close", stop)
        began = time.monotonic()
        with pytest.raises(Interrupted):
            logger.close(failed=False)
        assert time.monotonic() - began < SOON


def test_a_table_that_cannot_be_sent_is_left_out_and_the_rest_goes_on(folder, config, rows, monkeypatch):
    said = []
    logger = start(folder, config("wandb", "mode=offline"), said=said)
    monkeypatch.setattr("wandb.Table", lambda **named: object())  # which W&B cannot write
    said.clear()
    for step in (1, 2):
        logger.table("s", step, "predictions", *rows)
        logger.log("s", step, {"loss": 2.0})
    logger.close(failed=False)
    assert len(said) == 1 and said[0].startswith("warning: Weights & Biases lacks the table s/predictions of step 1 (")
    assert [line["s/step"] for line in written(folder)[0].history] == [1, 2]


def test_a_client_that_dies_costs_a_warning(folder, config, monkeypatch):
    said = []
    logger = start(folder, config("wandb", "mode=offline"), said=said)
    loggers = Loggers({"wandb": logger}, said.append)
    monkeypatch.setattr(logger, "_run", None)
    for step in range(3):
        loggers.log("s", step, {"loss": 2.0})
    loggers.close(failed=False)
    assert len(said) == 1 and said[0].startswith("warning: logger=wandb stopped (")


def test_the_next_run_of_the_process_is_its_own_where_one_has_failed(folder, config, monkeypatch):
    def fail(*arguments, **named):
        raise OSError("no space left")

    said = []
    broken = start(folder, config("wandb", "mode=offline"))
    loggers = Loggers({"wandb": broken}, said.append)
    monkeypatch.setattr(broken._run, "log", fail)
    loggers.log("s", 1, {"loss": 2.0})
    broken._worker._thread.join()
    loggers.log("s", 2, {"loss": 2.0})
    loggers.close(failed=False)
    assert len(said) == 1 and "no space left" in said[0] and written(folder)[0].exit_code == 1
    after = folder.with_name("lr=2")
    after.mkdir()
    logger = start(after, config("wandb", "mode=offline"))
    logger.log("s", 1, {"loss": 1.0})
    logger.close(failed=False)
    (found,) = written(after)
    assert found.run.display_name == "lr=2" and found.history == [{"s/step": 1, "s/loss": 1.0}]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
