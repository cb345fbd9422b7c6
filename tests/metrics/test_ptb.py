"""The PTB tokenizer in Python against Java's, on real captions and on odd texts."""

from __future__ import annotations

import random
import re

import pytest

from blip2x.metrics import java, ptb


def hard_ones(*groups: dict[int, list[str]]) -> list[str]:
    """Distinct captions with more in them than words, blanks and a final period."""
    texts = dict.fromkeys(text for captions in groups for own in captions.values() for text in own)
    return [text for text in texts if not re.fullmatch(r"[a-z ]*\.?\s*", text, re.IGNORECASE)]


def differing(texts: list[str]) -> list[str]:
    """The texts whose words, as metrics take them, are not those of Java."""
    python, reference = ptb.tokenize(texts), java.tokenize(texts)
    return [text for text, ours, true in zip(texts, python, reference, strict=True) if ptb.words(ours) != ptb.words(true)]


def test_hard_captions_of_coco(coco_val):
    """3,000 of val; all of val and train are a slow test."""
    sample = random.Random(0).sample(hard_ones(coco_val), 3000)
    assert differing(sample) == []


@pytest.mark.slow
def test_all_captions_of_coco(coco_val, coco_train):
    hard = hard_ones(coco_val, coco_train)
    assert len(hard) == 47_323
    assert len(differing(hard)) <= len(hard) / 1000
    texts = [text for captions in (coco_val, coco_train) for own in captions.values() for text in own]
    assert len(texts) == 616_767
    assert len(differing(texts)) <= len(texts) / 10_000


ODD = """
cannot gonna wanna gotta lemme gimme dunno 'tis 'twas 'twasn't d'ye more'n
he's dogs' it's IT'S O'Brien rock'n'roll rock 'n' roll fish'n chips o'clock ma'am y'all you'all y's 'em 'til goin' ol' jus' an'd
don't DON'T dont can't won't isn't-it it's-a they're we've I'd I'll I'm he'sa men's/women's a's/b's shouldn't've t-shirt's
d'oeuvres l'oreal L'a D'Artagnan c'est j'aime Xi'an Ho'ohu Pe'e B'day b'day Qur'an o'a e'en
t-shirt black-and-white black -- white --- a--b ---- ----- -a a- 3-d 5-year-old 10-12-2010 -5 +5 1-800-555-1234
a_b _a a_ U.S.-based
1/2 1 1/2 1/2-eaten 3-1/2 50/50 and/or a/b/ w/ c/o a//b 24/7 12/25/2010
5:30 10:10pm 10PM 12:30am-1pm 5 p.m. 3:a a:b :5 1980s '80s '90 '47 '9 '47s 1950's 5'6 5'6" 20" 1st 2x4s 1,000 1,00 .5 5. 1.2.3
$5.99 US$5 C$ 5$ $a 5c 100% #5 #tag #a-b a#b @ @a @1 a@b.c
"hello" ''hello'' ``hello'' `hello' 'hello' ""x"" dog"cat dog'cat
.. ... .... a...b a..b a.b hello.world dog.Cat dog.1 1.dog .dog dog.? dog?! !! a!b a? dog., dog.; dog." (dog.) t-shirt., 50.,
U.S. U.S.A's a.m. p.m, T.V. T.V.s b.b.q. D.C. Ph.D. x.y i.e. J.R. 5a.m.
Mr. St. st. Ave. Blvd. rd. Mt. ft. in. oz. Co. Inc. etc. etc, vs. No. 5 no. 5 No. five No.5 fig. 5
Ill. ill. Wash. wash. Mass. pic.
Plan B. The man z. Mr. A x y. Yes it w. THE
www.a.com http://a.b/c a.org flickr.com/photos yahoo.com's
(a) [a] {a} (a)(b) dog(s) <a> </a> < > >> << -> --> <3 a>b
AT&T B&B A&b a&b m&m's M&M's Q&A A & B &amp; &quot;
:) :-) ;) :( :D's :P. :d ;p :o :O :a :)a :)) a:) :( :o) :'( :| :] ^_^ o_o >_< text:(note)
a*b ** a\\b a+b c++ C# a#b = == ~ a|b ## @@ %%
’s dog’s don’t “dog” – — … café é. ½ 1½ £5 5¢ © 😀 a😀
"""  # noqa: RUF001


@pytest.mark.parametrize("text", ["", *ODD.strip().splitlines()])
def test_odd_texts(text, odd_by_java):
    assert ptb.words(ptb.tokenize([text])[0]) == odd_by_java[text]


@pytest.fixture(scope="module")
def odd_by_java():
    texts = ["", *ODD.strip().splitlines()]
    spaced = [line for text in texts for line in (text, "x")]  # a text alone has no next one to look at
    return dict(zip(texts, map(ptb.words, java.tokenize(spaced)[::2]), strict=True))


def test_the_next_text_tells_whether_a_letter_is_an_initial():
    texts = ["plan b.", "the man", "plan b.", "The man", "plan b.", "", "The man"]
    assert differing(texts) == []
    assert ptb.tokenize(texts) == ["plan b.", "the man", "plan b .", "the man", "plan b .", "", "the man"]


def test_punctuation_is_left_out_as_in_cocos_evaluation():
    line = ptb.tokenize(["A man's \"dog\", isn't (very) big?"])[0]
    assert line == "a man 's '' dog '' , is n't -lrb- very -rrb- big ?"
    assert ptb.words(line) == "a man 's dog is n't -lrb- very -rrb- big"  # brackets stay: its list has them in upper case only
