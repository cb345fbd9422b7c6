"""What is hidden of a config, and what is not."""

from __future__ import annotations

import pytest

from blip2x.engine.loggers._secrets import Secrets


@pytest.fixture
def secrets():
    return Secrets({"WANDB_API_KEY": "0123456789abcdef", "MY_TOKEN": "short", "PATH": "/usr/bin:/bin"}, home="/home/ann")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pass@host/x", "https://***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://bucket/key?X-Amz-Signature=abc&b=2", "s3://bucket/key?***"),
        ("a 0123456789abcdef b", "a *** b"),
        ("short", "short"),
        ("+dataset.api_key=abc", "+dataset.api_key=***"),
        ("TOKEN=abc", "TOKEN=***"),
        ("task.max_new_tokens=30", "task.max_new_tokens=30"),
        ("model.weights=/home/ann/w.pth", "model.weights=~/w.pth"),
        ("/home/ann", "~"),
        ("/home/anna/x", "/home/anna/x"),
        ("/data/home/ann/x", "/data/home/ann/x"),
        ("who? me@home: 1", "who? me@home: 1"),
        ("/usr/bin:/bin", "/usr/bin:/bin"),
    ],
)
def test_texts(secrets, text, shown):
    assert secrets.text(text) == shown


def test_configs_keep_their_shape(secrets):
    config = {"password": "x", "api_key": None, "num_query_tokens": 32, "a": [{"url": "https://u:p@h"}, 1.5, None, True]}
    shown = {"password": "***", "api_key": None, "num_query_tokens": 32, "a": [{"url": "https://***@h"}, 1.5, None, True]}
    assert secrets.clean(config) == shown


def test_a_home_that_is_the_root_hides_nothing():
    assert Secrets({}, home="/").text("/data/x") == "/data/x"
