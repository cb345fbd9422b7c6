import json
from pathlib import Path

import numpy as np
import pytest

from blip2x.data.sources.digits import Digits
from blip2x.data.tokenize import TextTokenizer, build_tokenizer, clean_caption, clean_question, train_tokenizer
from blip2x.errors import UserError

TEXTS = ["a red 3 and a blue 7\nquestion: which digit is red ? short answer: 3", "two digits : a red 3 and a blue 7"]


def words(tokenizer, ids):
    return [tokenizer.tokenizer.id_to_token(int(i)) for i in ids]


@pytest.fixture(params=["bert", "opt", "t5"])
def tokenizer(request):
    return train_tokenizer(TEXTS, request.param)


def test_texts_come_back(tokenizer):
    ids_BL, _ = tokenizer.encode(["A blue 7", "two digits : a red 3"], max_length=16)
    assert [tokenizer.decode(row) for row in ids_BL] == ["a blue 7", "two digits : a red 3"]


def test_special_tokens_of_each_family():
    expected = {
        "bert": ["[CLS]", "a", "red", "3", "[SEP]"],
        "opt": ["</s>", "a", "red", "3", "\n"],
        "t5": ["a", "red", "3", "</s>"],
    }
    for family, tokens in expected.items():
        tokenizer = train_tokenizer(TEXTS, family)
        ids_BL, mask_BL = tokenizer.encode(["a red 3"], max_length=None)
        assert words(tokenizer, ids_BL[0]) == tokens and mask_BL.tolist() == [[1] * len(tokens)]


def test_published_places_of_special_tokens():
    opt, t5, bert = (train_tokenizer(TEXTS, family) for family in ("opt", "t5", "bert"))
    assert (opt.pad_id, opt.bos_id, opt.eos_id) == (1, 2, 2) and opt.end_id not in (opt.eos_id, opt.pad_id)
    assert (t5.pad_id, t5.eos_id, t5.end_id, t5.bos_id) == (0, 1, 1, None)
    assert bert.pad_id == 0 and bert.dec_id == bert.vocab_size - 1
    assert opt.dec_id is None


def test_the_end_survives_truncation(tokenizer):
    ids_BL, mask_BL = tokenizer.encode([" ".join(["red"] * 50), "red"], max_length=8)
    assert ids_BL.shape == (2, 8) and mask_BL[0].all()
    assert ids_BL[0, -1] == tokenizer.end_id
    assert ids_BL[1, mask_BL[1].sum() - 1] == tokenizer.end_id and (ids_BL[1][mask_BL[1] == 0] == tokenizer.pad_id).all()


def test_left_padding_and_no_end_for_prompts():
    tokenizer = train_tokenizer(TEXTS, "opt")
    ids_BL, mask_BL = tokenizer.encode(["a red 3", "a"], max_length=9, padding_side="left", add_end=False)
    assert words(tokenizer, ids_BL[1]) == ["<pad>", "<pad>", "</s>", "a"]
    assert mask_BL.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_padding_to_the_longest(tokenizer):
    longest = tokenizer.encode(["a red 3"], max_length=20)[0].shape[1]
    assert tokenizer.encode(["a", "a red 3"], max_length=20)[0].shape[1] == longest < 20


def test_line_breaks_are_tokens_of_opt_only():
    opt, bert = train_tokenizer(TEXTS, "opt"), train_tokenizer(TEXTS, "bert")
    assert words(opt, opt.tokens("red\nblue")) == ["red", "\n", "blue"]
    assert words(bert, bert.tokens("red\nblue")) == ["red", "blue"]


def test_training_is_repeatable_and_covers_the_evaluation(digits_config, tokenizer):
    digits = Digits(digits_config)
    first, second = (train_tokenizer(digits.texts(), tokenizer.family) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert train_tokenizer(reversed(digits.texts()), tokenizer.family).tokenizer.to_str() == first.tokenizer.to_str()
    unknown = first.tokenizer.token_to_id({"bert": "[UNK]"}.get(tokenizer.family, "<unk>"))
    said = [caption for sample in digits.captions("eval") for caption in sample.captions]
    said += [f"Question: {q.question} Short answer: {q.answers[0]}" for q in digits.questions("eval")]
    assert not any(unknown in first.tokens(text) for text in said)
    assert first.vocab_size < 70


def test_saved_tokenizers_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    loaded = TextTokenizer.load(tmp_path / "tok")
    assert (loaded.family, loaded.vocab_size, loaded.dec_id) == (tokenizer.family, tokenizer.vocab_size, tokenizer.dec_id)
    assert np.array_equal(loaded.encode(TEXTS, max_length=30)[0], tokenizer.encode(TEXTS, max_length=30)[0])


def test_a_short_limit_is_refused(tokenizer):
    with pytest.raises(UserError, match="texts of 1 tokens have no room"):
        tokenizer.encode(["a"], max_length=1)


def build(name, family, root):
    return build_tokenizer(str(name), family, locate=Path(root).joinpath, dataset_texts=lambda: TEXTS)


def test_dataset_is_a_name_for_the_texts(tmp_path):
    assert build("dataset", "opt", tmp_path).tokens("a red 3") == train_tokenizer(TEXTS, "opt").tokens("a red 3")


def test_bert_vocabulary_files_get_dec_as_last_row(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "photo", "##s", "a"]))
    tokenizer = build("bert", "bert", tmp_path)
    assert tokenizer.dec_id == 8 and tokenizer.vocab_size == 9
    ids_BL, _ = tokenizer.encode(["A photos"], max_length=None)
    assert ids_BL.tolist() == [[2, 7, 5, 6, 3]]
    assert tokenizer.decode(ids_BL[0]) == "a photos"
    # special tokens are one token each where a text has them, and ours among them
    assert tokenizer.tokens("a[SEP] [MASK] photo [DEC]") == [7, 3, 4, 5, 8]
    assert tokenizer.decode([7, 4, 5, 1]) == "a photo [UNK]"  # an unknown word stays visible


def test_bert_joins_words_at_an_apostrophe(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "dog", "'", "s", "t", "don", ",", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = build(tmp_path, "bert", tmp_path)
    assert tokenizer.decode(tokenizer.tokens("the dog's, don't.")) == "the dog's, don't."


def test_lengths_in_a_published_file_do_not_cut_or_pad_texts(tmp_path):
    published = train_tokenizer(TEXTS, "t5")
    plain = published.encode(["a red 3", "a"], max_length=None)
    published.tokenizer.enable_truncation(2)
    published.tokenizer.enable_padding(length=5)
    published.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = build(tmp_path, "t5", tmp_path)
    assert len(loaded.tokens("a red 3 and a blue 7")) == 7
    assert np.array_equal(loaded.encode(["a red 3", "a"], max_length=None), plain)


@pytest.fixture
def byte_level(tmp_path):
    """An OPT folder with the vocabulary of single bytes, which has a line break under its byte-level name."""
    folder = tmp_path / "opt"
    folder.mkdir()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz:?", "Ġ", "Ċ", "Ġa"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    return folder


def test_opt_files_know_the_line_break(byte_level):
    tokenizer = build(byte_level, "opt", "/nowhere")
    assert tokenizer.tokenizer.id_to_token(tokenizer.end_id) == "Ċ"
    ids_BL, _ = tokenizer.encode(["it is a cat "], max_length=None)
    assert ids_BL[0, 0] == 2 and ids_BL[0, -1] == tokenizer.end_id and ids_BL[0, -2] == tokenizer.tokens("t")[0]
    assert tokenizer.decode(ids_BL[0]) == "it is a cat"
    assert tokenizer.tokens("a</s><pad>") == [*tokenizer.tokens("a"), 2, 1]
    assert tokenizer.tokens("<s>") == tokenizer.tokens("s")  # no special token in published settings; "<" is unknown here


def test_bad_folders_are_explained(byte_level, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*: it needs tokenizer.json or vocab.txt"):
        build(byte_level, "bert", tmp_path)
    (byte_level / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match=r"cannot be read|has no token '<pad>'"):
        build(byte_level, "opt", tmp_path)
    (byte_level / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        build(byte_level, "opt", tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    with pytest.raises(UserError, match=r"it needs tokenizer.json \(spiece.model alone does not do\)"):
        build(tmp_path, "t5", tmp_path)
    train_tokenizer(TEXTS, "t5").save(tmp_path / "mine")
    with pytest.raises(UserError, match="is of the family 't5', not 'opt'"):
        build("mine", "opt", tmp_path)
    with pytest.raises(UserError, match="is no tokenizer of blip2x"):
        TextTokenizer.load(tmp_path)


def test_clean_caption_is_blips():
    assert clean_caption('  A "big"  DOG; (brown) runs!\n') == "a big dog brown runs"
    assert clean_caption("one two three four", max_words=3) == "one two three"
    assert clean_caption("dog's, cat-like") == "dog's, cat-like"
    assert clean_caption("a dog.\n\n") == "a dog" and clean_caption("a  dog ; runs") == "a dog runs"
    assert clean_caption("&/?-_=+[]{}<>@%^|\\`'") == "&/?-_=+[]{}<>@%^|\\`'"  # these marks stay
    assert len(clean_caption("w " * 60).split()) == 50
    assert clean_caption("...") == ""


def test_a_line_break_inside_a_caption_does_not_stay():
    """The one difference from LAVIS, which keeps single ones, and OPT learns to stop there."""
    assert clean_caption("\nA dog\truns\nfast") == "a dog runs fast"


def test_questions_are_cleaned_as_in_lavis():
    texts = ['Is it the "U.S." (or #1)!?', "  What's  left-hand?  ", " ".join(["Word"] * 60)]
    assert [clean_question(text) for text in texts] == ["is it the us or 1?", "  what's  left-hand?", " ".join(["word"] * 50)]
