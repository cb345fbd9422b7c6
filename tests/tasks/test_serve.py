"""The API and the page in front of a model that is made up, the task with a small one that learned nothing."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import requests
from paddle import nn
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import Interrupted, UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.models.language.opt import OptLanguageModel
from blip2x.tasks.common.captioning import write_texts
from blip2x.tasks.common.launch import launch
from blip2x.tasks.serve import Serve, _AnsweringModel, _look_often
from blip2x.tasks.serving.app import Written, build_app
from blip2x.tasks.serving.images import Encoded, KeptImages
from blip2x.tasks.serving.jobs import Abandoned, Jobs
from blip2x.tasks.serving.server import address_of, bind, is_this_machine, serving


def png(width=40, height=30) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 90).save(buffer, "PNG")
    return buffer.getvalue()


class MadeUp:
    """A model that says what it was asked, and waits where it is told to."""

    def __init__(self, jobs: Jobs, answers: bool):
        self.jobs, self.answers = jobs, answers
        self.asked, self.encoded = [], 0
        self.began, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.ended_early = threading.Event()

    def encode(self, picture):
        self.encoded += 1
        assert picture.mode == "RGB"
        return picture.size, 1000

    def fits(self, prompt, settings):
        return len(prompt) <= 200

    def write(self, queries, prompt, settings):
        self.asked.append((queries, prompt, settings))
        self.began.set()
        if "bug" in prompt:
            raise ZeroDivisionError
        try:
            while not self.go.wait(0.005):
                self.jobs.look()
        except Abandoned:
            self.ended_early.set()
            raise
        return [Written(f"[{prompt or 'a caption'}] {n}", -0.5 - n, 3) for n in range(settings.num_return_sequences)]


class Client(requests.Session):
    """Asks one server, whatever proxies the environment names."""

    def __init__(self, address: str):
        super().__init__()
        self.address, self.trust_env = address, False

    def request(self, method, path, **options):
        return super().request(method, self.address + path, timeout=20, **options)


class Served:
    """A server whose model works in a thread."""

    def __init__(self, *words: str):
        cfg = compose_config(["task=serve", *words])
        self.jobs, self.stop = Jobs(cfg.task.max_queue), threading.Event()
        self.model = MadeUp(self.jobs, answers=cfg.task.stage == 2)
        named = {"name": "tiny_opt", "checkpoint": "run/pretrain_stage2"}
        app = build_app(cfg.task, self.model, self.jobs, **named, max_pixels=100 * 100)
        self.thread = threading.Thread(target=self.jobs.work, args=(self.stop.is_set,), daemon=True)
        self.thread.start()
        sock = bind("127.0.0.1", 0)
        self.address = address_of(sock)
        self.server = serving(app, sock)
        self.server.__enter__()
        self.client = Client(self.address)

    def image(self, content: bytes | None = None, kind="image/png", **options):
        data = png() if content is None else content
        return self.client.post("/api/images", data=data, headers={"Content-Type": kind}, **options)

    def caption(self, image: str, **options):
        return self.client.post("/api/caption", json={"image": image, **options})

    def ask(self, image: str, question: str, **options):
        return self.client.post("/api/ask", json={"image": image, "question": question, **options})

    def end_work(self):
        self.stop.set()
        self.thread.join(5)

    def end(self):
        self.client.close()
        self.end_work()
        self.server.__exit__(None, None, None)


@pytest.fixture
def serve():
    """`serve(*overrides)` -> a `Served`, which ends with the test."""
    with ExitStack() as stack:

        def make(*words: str) -> Served:
            served = Served(*words)
            stack.callback(served.end)
            return served

        yield make


def error(response, status: int) -> str:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def eventually(holds) -> None:
    until = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_an_image_is_encoded_once_and_then_described_and_asked_about(serve):
    served = serve()
    answer = served.image()
    assert answer.status_code == 201 and (answer.json()["width"], answer.json()["height"]) == (40, 30)
    image = answer.json()["id"]
    caption = served.caption(image).json()
    assert caption["text"] == "[a caption] 0" and caption["texts"] == [{"text": "[a caption] 0", "score": -0.5, "tokens": 3}]
    assert caption["seconds"].keys() == {"waited", "worked"} and caption["image"] == image
    answer = served.ask(image, " what is {} ? ", num_return_sequences=2).json()
    assert answer["prompt"] == "Question: what is {} ? Short answer:"
    assert [text["text"][-1] for text in answer["texts"]] == ["0", "1"]
    assert served.model.encoded == 1 and [asked[0] for asked in served.model.asked] == [(40, 30)] * 2
    assert served.image().json()["id"] != image and len(image) >= 20


def test_decoding_is_the_tasks_where_a_request_does_not_say_and_answers_are_short(serve):
    served = serve("task.num_beams=3", "task.answer_max_new_tokens=7", "task.min_new_tokens=8", "task.top_k=4")
    image = served.image().json()["id"]
    served.caption(image)
    served.ask(image, "what?")
    served.ask(image, "what?", num_beams=1, do_sample=True, top_k=0, temperature=2, max_new_tokens=9, length_penalty=1)
    caption, answer, chosen = (asked[2] for asked in served.model.asked)
    assert (caption.num_beams, caption.max_new_tokens, caption.min_new_tokens, caption.length_penalty) == (3, 30, 8, 1.0)
    assert (answer.num_beams, answer.max_new_tokens, answer.min_new_tokens, answer.length_penalty) == (3, 7, 7, -1.0)
    assert (chosen.num_beams, chosen.do_sample, chosen.top_k, chosen.temperature) == (1, True, 0, 2)
    assert (chosen.max_new_tokens, chosen.length_penalty) == (9, 1) and caption.top_k == answer.top_k == 4
    info = served.client.get("/api/info").json()
    assert info["decoding"]["caption"]["num_beams"] == 3 and info["decoding"]["answer"]["max_new_tokens"] == 7


def test_earlier_questions_are_read_before_the_question(serve):
    served = serve("task.question_prompt='Q: {} A:'")
    history = [{"question": "how many?", "answer": "two"}, {"question": " {}? ", "answer": "A dog. "}]
    image = served.image().json()["id"]
    answer = served.ask(image, "why?", history=history).json()
    assert answer["prompt"] == "Q: how many? A: two. Q: {}? A: A dog. Q: why? A:" and answer["earlier"] == 2
    history += [{"question": "more?", "answer": "x" * 150}]  # the model has room for 200 characters
    answer = served.ask(image, "why?", history=history).json()
    assert answer["prompt"] == f"Q: {{}}? A: A dog. Q: more? A: {'x' * 150}. Q: why? A:" and answer["earlier"] == 2
    assert served.ask(image, "why?", history=[{"question": "?", "answer": "x" * 2000}]).json()["earlier"] == 0
    assert "history" in error(served.ask("x", "why?", history=[*history] * 21), 422)


WRONG = [
    ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
    ({"num_beams": 11}, "num_beams=11 is more than this server allows: task.limit_beams=10"),
    ({"num_return_sequences": 6}, "num_return_sequences=6 is more than num_beams=5 can return"),
    (
        {"num_beams": 1, "do_sample": True, "num_return_sequences": 11},
        "num_return_sequences=11 is more than this server allows",
    ),
    ({"max_new_tokens": 201}, "max_new_tokens=201 is more than this server allows: task.limit_new_tokens=200"),
    ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens must lie in 0 to max_new_tokens=3, got 4"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"num_beams": 2.5}, "num_beams: Input should be a valid integer"),
    ({"do_sample": "yes"}, "do_sample: Input should be a valid boolean"),
    ({"length_penalty": 1e308}, "length_penalty: Input should be less than or equal to 10"),
    ({"temperature": 1e-300}, "temperature: Input should be greater than or equal to 0.01"),
    ({"beams": 2}, "beams: Extra inputs are not permitted"),
    ({"prompt": "a" * 2001}, "prompt: String should have at most 2000 characters"),
]


def test_wrong_options_are_named(serve):
    served = serve()
    image = served.image().json()["id"]
    for options, sentence in WRONG:
        assert error(served.caption(image, **options), 422).startswith(sentence)
    assert not served.model.asked


def test_what_is_no_request_is_told_in_a_sentence(serve):
    served = serve()
    json_only = "the body has to be a JSON object, with Content-Type: application/json"
    for body, kind in ((b"{", "application/json"), (b"[]", "application/json"), (b'{"image": "x"}', "text/plain")):
        assert error(served.client.post("/api/caption", data=body, headers={"Content-Type": kind}), 422) == json_only
    nan = b'{"image": "x", "temperature": NaN}'
    assert "finite" in error(served.client.post("/api/caption", data=nan, headers={"Content-Type": "application/json"}), 422)
    assert "65536 bytes" in error(served.client.post("/api/caption", data=b" " * 70_000), 413)
    assert error(served.ask(served.image().json()["id"], "  "), 422) == "the question is empty"
    assert "send it again" in error(served.caption("guessed"), 404)
    error(served.client.get("/nothing"), 404)


def test_bad_pictures_are_told_in_a_sentence_and_leave_nothing(serve):
    served = serve("task.max_upload_mb=0.01")
    assert "image/*" in error(served.image(kind="text/plain"), 415)
    named = {"params": {"name": "cat.png"}}
    assert error(served.image(b"no picture", **named), 422).startswith("cat.png is not an image that Pillow can read")
    assert error(served.image(png()[:300], **named), 422).startswith("image cat.png is corrupt or truncated")
    assert error(served.image(b"", **named), 422) == "image cat.png is empty (0 bytes)"
    buffer = io.BytesIO()
    Image.new("RGB", (101, 100)).save(buffer, "PNG")
    assert "101 x 100 pixels, more than" in error(served.image(buffer.getvalue()), 422)
    assert "more than 0.01 MB" in error(served.image(b"x" * 10_001), 413)
    health = served.client.get("/api/health").json()
    assert (health["requests"], health["images"]) == (0, 0) and served.model.encoded == 0


def test_an_upload_without_end_is_broken_off(serve):
    served, sent = serve("task.max_upload_mb=0.01"), []

    def endless():
        while len(sent) < 100_000:
            sent.append(1)
            yield b"x" * 1000

    with suppress(requests.ConnectionError):  # it had not finished sending when the answer came
        assert "more than 0.01 MB" in error(served.image(endless()), 413)
    eventually(lambda: served.jobs.taken == 0)
    assert len(sent) < 100_000 and served.image().status_code == 201


def test_where_all_places_are_taken_a_request_is_sent_away(serve):
    served = serve("task.max_queue=2")
    image = served.image().json()["id"]
    served.model.go.clear()
    with ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(served.caption, image) for _ in range(2)]
        eventually(lambda: served.jobs.taken == 2)
        for refused in (served.caption(image), served.image()):
            assert "(task.max_queue)" in error(refused, 503) and int(refused.headers["Retry-After"]) > 0
        assert served.client.get("/api/health").json()["requests"] == 2  # which needs no place
        served.model.go.set()
        assert [response.result().status_code for response in inside] == [200, 200]
    assert served.caption(image).status_code == 200 and len(served.model.asked) == 3


def test_a_request_that_takes_too_long_is_ended_and_the_next_one_served(serve):
    served = serve("task.max_seconds=0.2")
    image = served.image().json()["id"]
    served.model.go.clear()
    refused = served.caption(image)
    assert "more than 0.2 seconds (task.max_seconds)" in error(refused, 503)
    assert served.model.ended_early.wait(5)  # the model does not work on for nobody
    served.model.go.set()
    assert served.caption(image).status_code == 200


def post(address: str, path: str, body: bytes, kind="application/json", *, missing=0) -> socket.socket:
    """A client that sends a request, but for `missing` bytes, and does not wait for the answer."""
    host, port = address.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) + missing}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_a_picture_that_does_not_arrive_gives_up_its_place(serve):
    served = serve("task.max_seconds=0.2", "task.max_queue=1")
    with closing(post(served.address, "/api/images", png(), "image/png", missing=1)) as slow:
        eventually(lambda: served.jobs.taken == 1)
        slow.settimeout(5)
        assert b"408" in slow.recv(100)
    assert served.image().status_code == 201 and served.model.encoded == 1


def test_clients_that_went_away_free_their_places(serve):
    served = serve("task.max_queue=3")
    image = served.image().json()["id"]
    served.model.go.clear()
    body = json.dumps({"image": image}).encode()
    worked_on = post(served.address, "/api/caption", body)
    assert served.model.began.wait(5)
    waiting = post(served.address, "/api/caption", body)
    sending = post(served.address, "/api/images", png(), "image/png")
    eventually(lambda: served.jobs.taken == 3)
    for client in (waiting, sending, worked_on):
        client.close()
    eventually(lambda: served.jobs.taken == 0)
    assert served.model.ended_early.wait(5)
    served.model.go.set()
    assert served.caption(image).status_code == 200
    assert len(served.model.asked) == 2 and served.model.encoded == 1  # nobody worked for those that waited


def test_a_stopping_server_tells_those_who_wait(serve):
    served = serve()
    image = served.image().json()["id"]
    served.model.go.clear()
    with ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(served.caption, image) for _ in range(2)]
        eventually(lambda: served.jobs.taken == 2)
        served.end_work()
        assert [error(response.result(), 503) for response in inside] == ["the server is about to stop"] * 2
    assert error(served.caption(image), 503) == "the server is about to stop"


def test_a_bug_is_an_answer_and_the_next_request_is_served(serve):
    served = serve()
    image = served.image().json()["id"]
    assert error(served.caption(image, prompt="bug"), 500) == "the server failed; its terminal says why"
    assert served.caption(image).status_code == 200 and served.jobs.taken == 0


def test_images_are_forgotten_by_number_and_by_memory():
    kept = KeptImages(3, 100)
    first, second, third = (kept.add(Encoded(n, 10, 1, 1)) for n in range(3))
    assert kept.get(first).queries == 0  # now the second is the one that nobody asked about for longest
    fourth = kept.add(Encoded(3, 10, 1, 1))
    assert kept.get(second) is None and all(map(kept.get, (first, third, fourth))) and kept.memory == 30
    fifth = kept.add(Encoded(4, 85, 1, 1))
    assert len(kept) == 2 and kept.get(fourth) and kept.get(fifth)
    alone = kept.add(Encoded(5, 1000, 1, 1))
    assert len(kept) == 1 and kept.get(alone)


def test_kept_images_are_bounded_by_the_config(serve):
    served = serve("task.max_images=2")
    first, *others = (served.image().json()["id"] for _ in range(3))
    error(served.caption(first), 404)
    assert [served.caption(image).status_code for image in others] == [200, 200]


def test_stage_1_describes_and_answers_no_questions(serve):
    served = serve("task.stage=1")
    image = served.image().json()["id"]
    assert served.caption(image).json()["text"] == "[a caption] 0"
    assert "stage 1" in error(served.ask(image, "what?"), 422)
    assert "takes no prompt" in error(served.caption(image, prompt="a"), 422)
    assert served.client.get("/api/info").json()["answers"] is False
    page = served.client.get("/").text
    assert "answers no questions" in page and "Question" not in page


def test_nothing_comes_from_elsewhere_and_nobody_else_may_look(serve):
    served = serve()
    page = served.client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"https?://", page.text.replace("http://www.w3.org", ""))
    assert served.client.get("/docs").status_code == 404  # FastAPI's own loads from a CDN
    described = served.client.get("/openapi.json").json()["paths"]
    assert {"/api/images", "/api/caption", "/api/ask", "/api/health", "/api/info"} == set(described)
    foreign = served.client.get("/api/info", headers={"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in foreign.headers)
    assert foreign.headers["X-Content-Type-Options"] == "nosniff"
    refused = served.client.options(
        "/api/images",
        headers={
            "Origin": "https://evil.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        },
    )
    assert refused.status_code == 405  # so that a browser sends no image/* and no JSON for another site


def test_only_this_machines_names_are_answered_unless_it_serves_others(serve):
    served = serve()
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "127.1.2.3:1"):
        assert served.client.get("/api/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil"):
        response = served.client.get("/api/health", headers={"Host": host})
        assert "answers to localhost" in error(response, 403) and "Content-Security-Policy" in response.headers
    opened = serve("task.host=0.0.0.0")
    assert opened.client.get("/api/health", headers={"Host": "lab.example"}).status_code == 200


def test_addresses():
    assert is_this_machine("127.0.0.1") and is_this_machine("::1") and not is_this_machine("0.0.0.0")
    with closing(bind("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert address_of(sock) == f"http://127.0.0.1:{port}"
    with closing(bind("0.0.0.0", 0)) as sock:
        assert address_of(sock).startswith("http://127.0.0.1:")
    with pytest.raises(UserError, match=r"task\.host=192\.0\.2\.1 task\.port=0 cannot be served on"):
        bind("192.0.2.1", 0)  # an address that is nobody's


MISTAKES = {
    "task.port=70000": "task.port must be from 0 to 65535, got 70000",
    "task.max_queue=0": "task.max_queue must be at least 1",
    "task.max_upload_mb=0": "task.max_upload_mb must be above 0",
    "task.max_seconds=inf": "task.max_seconds must be above 0 and finite",
    "task.stage=3": "task.stage: unknown value 3",
    "task.host=''": "task.host is empty",
    "task.question_prompt=what": "task.question_prompt='what' has no {}",
    "task.max_new_tokens=201": "task.max_new_tokens=201 is more than task.limit_new_tokens=200",
    "task.answer_max_new_tokens=201": "task.answer_max_new_tokens=201 is more than task.limit_new_tokens=200",
    "task.num_beams=11": "task.num_beams=11 is more than task.limit_beams=10",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_in_the_config(word):
    with pytest.raises(UserError, match=f"^{re.escape(MISTAKES[word])}"):
        compose_config(["task=serve", word])


@pytest.mark.parametrize(("positions", "room"), [(math.inf, 7), (20, 7), (14, 5)])
def test_a_prompt_is_bounded_by_the_config_and_by_what_the_language_model_has_room_for(positions, room):
    class Words:
        def tokens(self, text):
            return text.split()

    model = _AnsweringModel(None, Words(), None, positions, queries=6, limit=7)
    settings = GenerationSettings(max_new_tokens=3)
    assert model.fits("word " * room, settings) and not model.fits("word " * (room + 1), settings)
    sentence = "allows: task.limit_prompt_tokens=7" if room == 7 else "6 tokens and max_new_tokens=3 make more than the 8 "
    with pytest.raises(UserError, match=sentence):
        model.write(None, "word " * (room + 1), settings)


def test_an_images_queries_are_read_once_for_all_that_is_asked():
    words, query_1QD = train_tokenizer(["which digit is it", "two"], "opt"), paddle.randn([1, 3, 8])
    sizes = {"width": 8, "depth": 2, "num_heads": 2, "mlp_width": 8, "max_positions": 30}
    language = OptLanguageModel(**sizes, vocab_size=words.vocab_size, dropout=0.0)
    network = SimpleNamespace(language=language, encode=lambda image_1CHW: query_1QD)
    model = _AnsweringModel(network, words, lambda picture: np.zeros(1), positions=30, queries=3, limit=20)
    queries, memory = model.encode(None)
    assert memory == 4 * (3 * 8 + 2 * 2 * 3 * 8)  # queries, keys and values of two layers; 4 bytes each
    settings, read = GenerationSettings(max_new_tokens=4, num_beams=2), [pair[0].numpy() for pair in queries.read]
    for prompt in ("which digit", "is it"):
        ((expected,),) = write_texts(network, words, query_1QD, [prompt], settings)
        (written,) = model.write(queries, prompt, settings)
        assert written.text == expected.text and written.score == pytest.approx(expected.score, abs=1e-5)
    for (key, _), before in zip(queries.read, read, strict=True):
        np.testing.assert_array_equal(key.numpy(), before)


def test_the_model_is_left_as_soon_as_nobody_waits():
    seen = []

    def look():
        seen.append(1)
        if len(seen) == 3:
            raise Abandoned

    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    _look_often(model, look)
    with pytest.raises(Abandoned):
        model(paddle.ones([1, 2]))
    assert len(seen) == 3


@pytest.fixture
def words(small, trained, tmp_path):
    """`words(stage, port)` -> the overrides of a command with the small model."""

    def make(stage, port):
        weights = trained / f"pretrain_stage{stage}" / "checkpoint"
        own = ["task.num_beams=2", "task.max_new_tokens=4", f"paths.outputs={tmp_path}/outputs", "run_name=s"]
        return ["task=serve", f"task.stage={stage}", f"task.port={port}", f"model.weights={weights}", *small, *own]

    return make


def free_port() -> int:
    with closing(bind("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_port_that_is_taken_is_told_before_anything_is_made(words, tmp_path):
    with closing(bind("127.0.0.1", 0)) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=rf"task\.port={port} cannot be served on: .* task\.port=0 for any that is free"):
            launch(compose_config(words(2, port)), ["test"])
    assert not (tmp_path / "outputs").exists()


def test_several_processes_are_refused(words, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match="task=serve is one process, not 2"):
        Serve.check(compose_config(words(2, 0)))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_task_serves_what_predict_writes_until_it_is_stopped(words, pictures, tmp_path, stage, capsys):
    port = free_port()
    found = {}

    def visit():
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                requests.get(f"{address}/api/health")
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        found["files before"] = sorted(path.name for path in (tmp_path / "outputs/s").rglob("*"))
        try:
            image = requests.post(
                f"{address}/api/images", data=(pictures / "b.jpg").read_bytes(), headers={"Content-Type": "image/jpeg"}
            ).json()["id"]
            found["caption"] = requests.post(f"{address}/api/caption", json={"image": image}).json()
            found["answer"] = requests.post(f"{address}/api/ask", json={"image": image, "question": "which digit?"}).json()
            found["long"] = requests.post(f"{address}/api/caption", json={"image": image, "max_new_tokens": 200}).json()
            found["files"] = sorted(path.name for path in (tmp_path / "outputs/s").rglob("*"))
        finally:
            if callable(signal.getsignal(signal.SIGTERM)):  # else the tests would be what ends
                os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with pytest.raises(Interrupted, match="SIGTERM; the server has ended"):
        launch(compose_config(words(stage, port)), ["test"])
    visitor.join(5)
    assert f"serving on http://127.0.0.1:{port}" in capsys.readouterr().out
    assert found["files"] == found["files before"]

    same = [word for word in words(stage, port) if "task.port" not in word and "run_name" not in word]
    launch(compose_config(["task=predict", *same[1:], f"task.inputs={pictures}/b.jpg", "run_name=p"]), ["test"])
    (row,) = map(json.loads, (tmp_path / "outputs/p/predictions.jsonl").read_text().splitlines())
    assert found["caption"]["text"] == row["texts"][0]
    assert found["caption"]["texts"][0]["score"] == pytest.approx(row["scores"][0], abs=1e-5)
    if stage == 2:
        assert found["answer"]["prompt"] == "Question: which digit? Short answer:" and found["answer"]["texts"][0]["score"] < 0
        assert "make more than the" in found["long"]["error"]
    else:
        assert "stage 1" in found["answer"]["error"] and "more than the Q-Former's" in found["long"]["error"]


@pytest.fixture
def page(serve, browser):
    """`page(*overrides, **options)` -> (a page in a real browser that shows the server, the server)."""
    with ExitStack() as stack:

        def make(*words: str, **options):
            served = serve(*words)
            tab = browser.new_page(**options)
            stack.callback(tab.close)
            tab.set_default_timeout(10_000)
            tab.said, tab.asked = [], []
            tab.on("console", lambda message: tab.said.append(message.text))
            tab.on("pageerror", lambda error: tab.said.append(str(error)))
            tab.on("request", lambda request: tab.asked.append(request.url))
            tab.goto(served.address)
            return tab, served

        yield make


def test_in_a_browser_a_picture_is_described_and_asked_about(page, pictures):
    tab, served = page()
    assert tab.title() == "tiny_opt · blip2x" and tab.locator("#question").is_disabled()
    tab.set_input_files("#file", pictures / "a.png")
    tab.wait_for_selector("#talk li")
    assert tab.locator("#talk .said").all_inner_texts() == ["[a caption] 0"]
    assert "a.png, 48 \u00d7 48 pixels" in tab.inner_text("#facts")
    assert tab.evaluate("document.querySelector('#picture').naturalWidth") == 48
    assert tab.evaluate("document.activeElement.id") == "question"  # so that one can type on
    tab.keyboard.type("which digit?")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#talk li:nth-child(2)")
    assert tab.locator("#talk .said").nth(1).inner_text() == "[Question: which digit? Short answer:] 0"
    assert tab.input_value("#question") == "" and served.model.encoded == 1

    tab.check("#remember")
    tab.click("summary")
    tab.fill("#num_beams", "4")
    tab.fill("#num_return_sequences", "2")
    tab.fill("#question", "why?")
    tab.click("#send")
    tab.wait_for_selector("#talk > li:nth-child(3)")
    (_, prompt, settings) = served.model.asked[-1]
    assert prompt.startswith("Question: which digit? Short answer: [Question") and prompt.endswith(
        "Question: why? Short answer:"
    )
    assert (settings.num_beams, settings.num_return_sequences, settings.temperature) == (4, 2, 1.0)
    assert tab.locator("#talk .more li").count() == 2
    assert "; read 1 of 1 earlier answers" in tab.inner_text("#talk > li:nth-child(3) .cost")
    long = """Array.from({length: 30}, () => history.push({question: "q", answer: "ä".repeat(3000)})) && readable(history)
        .map((turn) => turn.answer.length)"""
    assert tab.evaluate(long) == [2000] * 8  # of 32 KB of JSON
    tab.evaluate("history.splice(2)")

    tab.fill("#num_beams", "99")
    tab.click("#caption")
    tab.wait_for_selector("#error:not(:empty)")
    assert "task.limit_beams=10" in tab.inner_text("#error")
    tab.click("[type=reset]")
    tab.click("#caption")
    tab.wait_for_selector("#talk > li:nth-child(4)")
    assert tab.inner_text("#error") == ""
    assert all(url.startswith(("blob:", "data:", tab.url)) for url in tab.asked)
    assert all("422" in text for text in tab.said), tab.said  # the browser's own word on the refused one


def test_in_a_browser_what_is_no_picture_or_too_large_is_told_and_what_was_there_stays(page, pictures, tmp_path):
    tab, served = page("task.max_upload_mb=0.5")
    (tmp_path / "notes.txt").write_text("no picture")
    tab.set_input_files("#file", tmp_path / "notes.txt")
    tab.wait_for_selector("#error:not(:empty)")
    assert tab.inner_text("#error").startswith("notes.txt is not an image that Pillow can read")
    assert tab.locator("#question").is_disabled() and served.model.encoded == 0
    tab.set_input_files("#file", pictures / "a.png")
    tab.wait_for_selector("#talk li")
    (tmp_path / "large.png").write_bytes(b"x" * 600_000)
    tab.set_input_files("#file", tmp_path / "large.png")
    tab.wait_for_selector("#error:not(:empty)")
    assert "large.png has 0.6 MB; at most 0.5 MB" in tab.inner_text("#error")
    assert tab.locator("#talk li").count() == 1 and tab.locator("#question").is_enabled()


def test_in_a_browser_a_picture_is_dropped_a_request_stopped_and_a_forgotten_image_sent_again(page, pictures):
    tab, served = page("task.max_images=1")
    drop = """([bytes]) => {
      const carried = new DataTransfer();
      carried.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
      document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));
    }"""
    tab.evaluate(drop, [list((pictures / "a.png").read_bytes())])
    tab.wait_for_selector("#talk li")
    assert "dropped.png" in tab.inner_text("#facts")
    served.image()  # of somebody else, for which the first is forgotten
    tab.click("#caption")
    tab.wait_for_selector("#talk li:nth-child(2)")
    assert served.model.encoded == 3
    served.model.go.clear()
    tab.click("#caption")
    tab.click("#stop")
    assert served.model.ended_early.wait(5)
    tab.wait_for_selector("#stop", state="hidden")
    assert tab.inner_text("#error") == "" and tab.locator("#talk li").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_fits_a_phone_by_day_and_night_and_has_names_for_all(page, pictures, scheme):
    tab, _ = page(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    tab.set_input_files("#file", pictures / "a.png")
    tab.wait_for_selector("#talk li")
    tab.click("summary")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    red, green, blue = map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue < 200) == (scheme == "dark")
    unnamed = """[...document.querySelectorAll('input, button')].filter(
        (one) => !(one.labels && one.labels.length) && !one.textContent.trim()).map((one) => one.outerHTML)"""
    assert tab.evaluate(unnamed) == []
    small = """[...document.querySelectorAll('button, input[type=text], input[type=number]')].filter(
        (one) => one.offsetParent && one.getBoundingClientRect().height < 44).map((one) => one.outerHTML)"""
    assert tab.evaluate(small) == []
    assert tab.get_attribute("#error", "role") == "alert" and tab.get_attribute("#talk", "aria-live") == "polite"
    assert tab.said == []
