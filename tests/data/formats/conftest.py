"""Small files of the true layouts."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image


@pytest.fixture
def write(tmp_path):
    """Write an annotation file and give its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def shard(tmp_path):
    """`shard(name, members)`: a tar file of (name, content) pairs; the content may be a picture's colour."""

    def make(name, members):
        path = tmp_path / "shards" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                if isinstance(content, str):
                    file = io.BytesIO()
                    Image.new("RGB", (8, 8), content).save(file, "JPEG")
                    content = file.getvalue()
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make
