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
        ("https://ann:pa/ss@host/x", "https://***@host/x"),
        ("https://host/x and me@home", "https://host/x and me@home"),
        ("s3://bucket/key?X-Amz-Signature=abc&b=2", "s3://bucket/key?***"),
        ("a 0123456789abcdef b", "a *** b"),
        ("short", "short"),
        ("+dataset.api_key=abc", "+dataset.api_key=***"),
        ("TOKEN=abc", "TOKEN=***"),
        ("task.max_new_tokens=30", "task.max_new_tokens=30"),
        ("model.weights=/home/ann/w.pth", "model.weights=~/w.pth"),
        ("file:///home/ann/x", "file://~/x"),
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


def test_what_is_below_a_secret_s_key_is_hidden_and_a_tokenizer_s_tokens_are_not(secrets):
    config = {
        "credentials": {"user": "ann", "pins": [1234, True, None]},
        "private_key": "x",
        "passphrase": 1,
        "Authorization": "x",
    }
    shown = {"credentials": {"user": "***", "pins": ["***", True, None]}, **dict.fromkeys(list(config)[1:], "***")}
    assert secrets.clean(config) == shown
    plain = {"bos_token": "</s>", "tokenizer.mask_token": "<mask>"}
    assert secrets.clean(plain) == plain


def test_an_override_is_hidden_to_its_end(secrets):
    config = ["x.token=a b c", "+x.passphrase='a, b'", "x.token=null", "task.prompt=a token=b c"]
    assert secrets.clean(config) == ["x.token=***", "+x.passphrase=***", "x.token=null", "task.prompt=a token=*** c"]


def test_a_home_that_is_the_root_hides_nothing():
    assert Secrets({}, home="/").text("/data/x") == "/data/x"
