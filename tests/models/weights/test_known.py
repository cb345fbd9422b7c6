import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from blip2x.errors import UserError
from blip2x.models.weights.known import ADDRESSES, is_known, known_names, locate
from tests.web_server import PIECE, WebFile, serve

KEY = "model.language.weights"
OPT = "/facebook/opt-2.7b/resolve/main/"
SHARDS = {f"model-0000{number}-of-00002.safetensors": bytes([number]) * (2 * PIECE) for number in (1, 2)}


@pytest.fixture(autouse=True)
def web(monkeypatch):
    """A server that all families come from."""
    with serve(monkeypatch) as server:
        for variable in ADDRESSES:
            monkeypatch.setenv(variable, server.url + "/")
        yield server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "weights"


def find(name, root, *, offline=False):
    return locate(name, root, offline=offline, key=KEY)


def put(web, folder, files):
    web.files |= {folder + name: WebFile(content) for name, content in files.items()}


def index(*names):
    return json.dumps({"metadata": {}, "weight_map": {str(number): name for number, name in enumerate(names)}}).encode()


def put_sharded(web):
    put(web, OPT, {"config.json": b"{}", "merges.txt": b"m", "model.safetensors.index.json": index(*SHARDS), **SHARDS})


def shown(folder):
    """The files that a user sees."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_paths_are_taken_as_they_are(web, root, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    file = tmp_path / "own.pth"
    file.touch()
    below = root / "facebook/opt-2.7b"
    below.mkdir(parents=True)
    assert find(str(own), root) == own
    assert find(str(file), root, offline=True) == file
    assert find("facebook/opt-2.7b", root, offline=True) == below
    assert web.asked == []


def test_a_hugging_face_repository_with_shards(web, root):
    put_sharded(web)
    folder = find("facebook/opt-2.7b", root)
    assert folder == root / "facebook/opt-2.7b"
    assert shown(folder) == {
        "config.json": b"{}",
        "merges.txt": b"m",
        "model.safetensors.index.json": index(*SHARDS),
        **SHARDS,
    }
    assert [path.name for path in folder.parent.iterdir()] == ["opt-2.7b"]
    assert all(path.name.endswith(".origin.json") for path in folder.glob(".*"))
    asked = len(web.asked)
    assert find("facebook/opt-2.7b", root) == folder and len(web.asked) == asked


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_one_file(web, root, weights):
    put(web, "/google/flan-t5-xl/resolve/main/", {"config.json": b"{}", "spiece.model": b"s", weights: b"w"})
    assert shown(find("google/flan-t5-xl", root)) == {"config.json": b"{}", "spiece.model": b"s", weights: b"w"}


def test_several_at_once_fetch_once(web, root):
    put_sharded(web)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: find("facebook/opt-2.7b", root), range(4)))
    assert set(folders) == {root / "facebook/opt-2.7b"} and len(web.asked) == len(set(web.asked))
    assert [path.name for path in folders[0].parent.iterdir()] == ["opt-2.7b"]


def test_safetensors_are_preferred(web, root):
    put_sharded(web)
    put(web, OPT, {"pytorch_model.bin": b"pickle"})
    assert "pytorch_model.bin" not in shown(find("facebook/opt-2.7b", root))


def test_bert_is_where_it_has_always_been(web, root):
    put(web, "/google-bert/bert-base-uncased/resolve/main/", {"config.json": b"{}", "model.safetensors": b"w"})
    assert find("google-bert/bert-base-uncased", root) == find("bert-base-uncased", root) == root / "bert-base-uncased"
    assert shown(root / "bert-base-uncased") == {"config.json": b"{}", "model.safetensors": b"w"}


def test_an_optional_file_that_cannot_be_fetched_is_not_left_out(web, root):
    put_sharded(web)
    web.files[OPT + "merges.txt"].status = 500
    with pytest.raises(
        UserError, match=r"merges.txt cannot be fetched: the server answers 500 .*\nIt can also be fetched by hand"
    ):
        find("facebook/opt-2.7b", root)
    assert not (root / "facebook/opt-2.7b").exists()


def test_a_checksum_on_a_redirect_is_checked(web, root):
    put_sharded(web)
    shard = web.files[OPT + "model-00002-of-00002.safetensors"]
    shard.redirect = {"X-Linked-Etag": f'"{hashlib.sha256(b"other").hexdigest()}"'}
    with pytest.raises(UserError, match=rf"^{KEY}=facebook/opt-2.7b: .*00002-of-00002.safetensors is not what it should be"):
        find("facebook/opt-2.7b", root)
    assert not (root / "facebook/opt-2.7b").exists()


def test_a_folder_that_was_interrupted_is_not_there_and_is_continued(web, root):
    put_sharded(web)
    second = web.files[OPT + "model-00002-of-00002.safetensors"]
    second.cuts = [PIECE, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="broke off at 65,536 of 131,072 bytes"):
        find("facebook/opt-2.7b", root)
    assert not (root / "facebook/opt-2.7b").exists()
    (root / "facebook/.opt-2.7b.partial/.merges.txt.lock").touch()  # as a killed process leaves it
    with pytest.raises(UserError, match="nothing may be fetched"):
        find("facebook/opt-2.7b", root, offline=True)
    web.asked.clear()
    folder = find("facebook/opt-2.7b", root)
    assert shown(folder).items() >= SHARDS.items()
    # what had come is not asked for again
    assert [ask for ask in web.asked if ask[0] in web.files] == [
        (OPT + "model-00002-of-00002.safetensors", f"bytes={PIECE}-", '"one"')
    ]
    assert not list(folder.glob(".*.lock"))


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "sub/evil", ".evil", "..", "", "a\\evil", "evil?x", "evil\n", 7, None]
)
def test_an_index_cannot_name_files_elsewhere(web, root, name):
    put(web, OPT, {"config.json": b"{}", "model.safetensors.index.json": index("model-1.safetensors", name)})
    with pytest.raises(UserError, match=r"lists .*, which is no plain file name"):
        find("facebook/opt-2.7b", root)
    assert not (root / "facebook/opt-2.7b").exists() and not any("evil" in path for path in web.paths())


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"weight_map": 3}'])
def test_a_damaged_index_is_fetched_anew_the_next_time(web, root, content):
    put_sharded(web)
    web.files[OPT + "model.safetensors.index.json"].content = content
    with pytest.raises(UserError, match="is no index of weights"):
        find("facebook/opt-2.7b", root)
    put_sharded(web)
    assert shown(find("facebook/opt-2.7b", root)).items() >= SHARDS.items()


def test_a_repository_without_weights_or_configuration(web, root):
    put(web, OPT, {"config.json": b"{}"})
    with pytest.raises(UserError, match=r"has no weights: none of model.safetensors.index.json, "):
        find("facebook/opt-2.7b", root)
    with pytest.raises(
        UserError, match=r"flan-t5-xxl/resolve/main/config.json does not exist .* if you have it from elsewhere"
    ):
        find("google/flan-t5-xxl", root)


@pytest.mark.parametrize("name", ["eva_vit_g", "eva_vit_g.pth", "eva_clip_g"])
def test_lavis_files_have_several_names(web, root, name):
    put(web, "/", {"eva_vit_g.pth": b"vit"})
    assert find(name, root) == root / "eva_vit_g.pth"
    assert (root / "eva_vit_g.pth").read_bytes() == b"vit"


def test_lavis_model_types(web, root):
    put(web, "/", {"blip2_pretrained_flant5xl_vitL.pth": b"t5"})
    assert find("blip2_t5/pretrain_flant5xl_vitL", root).name == "blip2_pretrained_flant5xl_vitL.pth"


def test_paddlemix_folders(web, root):
    put(web, "/paddlemix/blip2-stage1/", {"model_state.pdparams": b"p", "config.json": b"{}"})
    folder = find("paddlemix/blip2-stage1", root)
    assert folder == root / "paddlemix/blip2-stage1"
    assert shown(folder) == {"model_state.pdparams": b"p", "config.json": b"{}"}
    with pytest.raises(UserError, match=f"put it there as {root}/paddlemix/blip2_pretrained_flant5xl$"):
        find("paddlemix/blip2_pretrained_flant5xl", root)  # announced, but not published


def test_a_storage_that_refuses_what_it_has_not(web, root):
    put(web, "/paddlemix/blip2-stage2/", {"model_state.pdparams": b"p"})
    web.files["/paddlemix/blip2-stage2/config.json"] = WebFile(status=403)
    assert shown(find("paddlemix/blip2-stage2", root)) == {"model_state.pdparams": b"p"}


def test_offline_tells_what_to_put_where(web, root):
    with pytest.raises(UserError) as error:
        find("eva_vit_g", root, offline=True)
    assert str(error.value) == (
        f"{KEY}=eva_vit_g: there is no {root}/eva_vit_g.pth, and nothing may be fetched. "
        f"Put this file there as {root}/eva_vit_g.pth:\n  {web.url}/eva_vit_g.pth"
    )
    with pytest.raises(UserError) as error:
        find("bert-base-uncased", root, offline=True)
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"Put these files into {root}/bert-base-uncased:")
    url = f"  {web.url}/google-bert/bert-base-uncased/resolve/main/"
    assert {url + "config.json", url + "model.safetensors", url + "pytorch_model.bin.index.json", url + "vocab.txt"} <= set(
        lines
    )
    with pytest.raises(UserError, match=f"{web.url}/paddlemix/blip2-stage1/model_state.pdparams"):
        find("paddlemix/blip2-stage1", root, offline=True)
    assert web.asked == [] and not root.exists()


def test_unknown_names(web, root):
    with pytest.raises(UserError, match=rf"^{KEY}=facebok/opt2.7b: there is no .*; did you mean facebook/opt-2.7b"):
        find("facebok/opt2.7b", root)
    with pytest.raises(
        UserError, match=r"give the path of your own, or one of: Salesforce/blip2-opt-2.7b, .*, eva_vit_g.pth, "
    ):
        find("zzz", root)
    assert web.asked == []


def test_a_place_that_cannot_be_written(root):
    root.touch()
    with pytest.raises(UserError, match="cannot be written"):
        find("facebook/opt-2.7b", root)


def test_every_name_has_one_place(monkeypatch):
    assert len(known_names()) == len(set(known_names())) == 14 + 13 + 10
    assert all(map(is_known, known_names())) and is_known("clip_vit_L") and not is_known("gpt2")


def test_the_addresses_are_those_of_the_publishers(root, monkeypatch):
    for variable in ADDRESSES:
        monkeypatch.delenv(variable)
    for name, url in {
        "Salesforce/blip2-opt-2.7b": "https://huggingface.co/Salesforce/blip2-opt-2.7b/resolve/main/config.json",
        "blip2_opt/caption_coco_opt6.7b": "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
        "blip2_caption_opt6.7b.pth",
        "paddlemix/blip2-stage2": "https://bj.bcebos.com/paddlenlp/models/community/paddlemix/blip2-stage2/model_state.pdparams",
    }.items():
        with pytest.raises(UserError, match=f"\n  {url}"):
            find(name, root, offline=True)
