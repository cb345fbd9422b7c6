from pathlib import Path

import pytest

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.gqa import Gqa
from blip2x.errors import UserError

TYPES = {"structural": "verify", "semantic": "attr"}


def rows(path):
    return list(Gqa(AnnotationFiles(questions=path), Path("images")).questions())


def test_questions_by_structure_and_meaning(write):
    content = {
        "201307251": {"question": "Is it red?", "answer": "yes", "imageId": "n161313", "types": TYPES},
        "02930152": {"question": "Who?", "imageId": "2405722"},
    }
    first, second = rows(write("g.json", content))
    assert (first.image, first.answers, first.question_id, first.number) == ("n161313.jpg", ("yes",), 201307251, 161313)
    assert (first.question_type, first.answer_type) == ("verify", "attr")
    assert (second.answers, second.question_id) == ((), 2930152)
    with pytest.raises(UserError, match=r"g.json, '5': 'types' must be an object with .* got 'verify'"):
        rows(write("g.json", {"5": {"question": "Who?", "imageId": "1", "types": "verify"}}))
    with pytest.raises(UserError, match=r"g.json, '9+': the key must be a number below 2\*\*63"):
        rows(write("g.json", {"9" * 20: {"question": "Who?", "imageId": "1"}}))
    with pytest.raises(UserError, match=r"g.json, '5' must be an object"):
        rows(write("g.json", {"5": []}))
