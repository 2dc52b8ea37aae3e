"""A model reaches the Hugging Face Hub whole, and nothing else does."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import PurePath

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download

import efae
from efae.config import Config
from efae.config import forms as configuration
from efae.exchange.hub import HubFolder, push_folders
from efae.model.autoencoder import Autoencoder
from efae.web_page import publication
from jobs import export
from tests.integration.hub_server import LARGE_BYTES, TOKEN, Hub, Repository, serve_hub
from tests.unit.report.test_model_card import SIZES

# Of huggingface_hub itself, as it sends an LFS object.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> Hub:
    """An empty Hub that this process may write to."""
    server.repositories.clear()
    server.objects.clear()
    server.tokens.clear()
    # As HF_ENDPOINT would set them in a new process.
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    files = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # as it is without that package
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(configuration.with_overrides(Config(), SIZES)).eval().requires_grad_(False)


def list_sizes(files: dict[str, bytes]) -> dict[str, int]:
    return {path: len(data) for path, data in files.items()}


def test_every_byte_arrives_and_the_copy_is_the_model(hub, model, tmp_path):
    sent = model.push_to_hub(
        "me/drawings",
        credit="Drawings by everybody.",
        licence="cc-by-sa-4.0",
        onnx=False,
        private=True,
        commit_message="The first",
    )
    repository = hub.repositories["model/me/drawings"]
    assert repository.settings["visibility"] == "private"
    assert [commit["summary"] for commit in repository.commits] == ["initial commit", "The first"]
    files = repository.branches["main"]
    del files[".gitattributes"]
    assert {file.path: file.bytes for file in sent} == list_sizes(files)
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert files.pop(path.name) == path.read_bytes()
    assert len(hub.objects) == 1  # the weights; the others are small
    assert list(files) == ["README.md"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-sa-4.0"
    assert "Drawings by everybody." in card.text
    assert 'snapshot_download("me/drawings")' in card.text
    assert "None" not in card.text
    assert TOKEN not in repr(repository)
    assert hub.tokens - {None} == {TOKEN}
    files |= {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    image, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    expected = model.decode(model.encode(image), noise=noise)
    folder = snapshot_download("me/drawings", cache_dir=tmp_path / "cache")
    for uri in (folder, f"{hub.endpoint}/me/drawings/resolve/main"):
        copy = efae.load(uri)
        torch.testing.assert_close(copy.decode(copy.encode(image), noise=noise), expected)


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--format", "hub", "--output", "me/drawings"]
    arguments += ["--hub.no-onnx"]
    monkeypatch.delenv("HF_TOKEN")
    assert export.main([*arguments, "--hub.dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "would be sent" in listed
    assert (hub.repositories, hub.tokens) == ({}, set())
    assert export.main(arguments) == 1
    assert "no token for the Hub: set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert export.main(arguments) == 0
    told = capsys.readouterr()
    assert told.out == listed.replace("would be sent", "sent")
    assert TOKEN not in told.out + told.err
    rows = re.findall(r"^  me/drawings  (\S+) +([\d,]+) bytes$", listed, re.MULTILINE)
    files = hub.repositories["model/me/drawings"].branches["main"]
    del files[".gitattributes"]
    assert {path: int(size.replace(",", "")) for path, size in rows} == list_sizes(files)


def test_a_report_card_gives_the_numbers(hub, model, tmp_path):
    """The job that writes it is `jobs/evaluate.py`; here its two files are enough."""
    from efae.evaluation.evaluate import evaluate
    from efae.model.pretrained import hash_tensors
    from efae.report.card import summarize

    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    numbers = evaluate(model, images).numbers()
    facts = {"steps": 12, "credits": ["By them."], "tensors_sha256": ""}
    facts |= {"train_data": "s3://secret/set (9 images, id ab1)"}
    facts |= {"held_out_data": "/home/secret (4 images, id ab2)", "data": "s3://secret/other"}
    facts |= {"preset": "quickstart; start.model:  -> diffusers:/home/secret; model.depth: 4 -> 1"}

    def write(**changes: str) -> None:
        (tmp_path / "evaluation.json").write_text(json.dumps(numbers))
        (tmp_path / "summary.json").write_text(json.dumps(summarize(numbers, facts | changes)))

    def push(**changes: str) -> ModelCard:
        write(tensors_sha256=hash_tensors(model.state_dict()), **changes)
        model.push_to_hub("me/drawings", credit="By me.", **options)
        files = hub.repositories["model/me/drawings"].branches["main"]
        return ModelCard(files["README.md"].decode())

    options = {"report": str(tmp_path), "onnx": False}
    numbers["protocol"]["precision"] = "bf16; measures in fp32"
    card = push()
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["psnr"] == pytest.approx(numbers["psnr"], rel=1e-3)
    assert "worst gap" in card.text
    for text in ("By them.", "By me.", "A set of 9 images, id ab1.", "| steps | 12 |"):
        assert text in card.text
    for text in ("a set of 4 images, id ab2", "Precision: bf16", "quickstart; model.depth"):
        assert text in card.text
    assert "secret" not in card.content
    # The credit of images on which a model was only measured is none of its training images.
    assert "By them." not in push(train_data="").text
    half = copy.deepcopy(model).half()  # a load widens its weights, and so jobs/evaluate.py does
    write(tensors_sha256=hash_tensors(copy.deepcopy(half).float().state_dict()))
    half.push_to_hub("me/drawings", **options)
    write()
    with pytest.raises(ValueError, match="is not the report card of these weights"):
        model.push_to_hub("me/drawings", **options)
    numbers["protocol"]["symmetrize"] = True
    with pytest.raises(ValueError, match="another setting of symmetrize"):
        push()
    numbers["multiplicities"]["a1"] += 1
    with pytest.raises(ValueError, match="is the report card of another model: its latents are"):
        push()
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"summary\.json is missing or not JSON"):
        model.push_to_hub("me/drawings", **options)


def test_a_second_upload_replaces_the_first_and_leaves_the_rest(hub, model):
    model.push_to_hub("me/drawings", onnx=False)
    files = hub.repositories["model/me/drawings"].branches["main"]
    first = dict(files)
    mine = {"onnx/mine.onnx": b"mine", "efae.json": b"mine", "samples/mine.png": b"mine"}
    manifest = json.dumps({"files": {"act-old.onnx": {}, "../config.json": {}}}).encode()
    files |= mine | {"onnx/act-old.onnx": b"old", "onnx/export.json": manifest}
    model.push_to_hub("me/drawings", onnx=False)
    assert hub.repositories["model/me/drawings"].branches["main"] == first | mine


def test_a_branch_is_made_and_main_stays(hub, model):
    model.push_to_hub("me/drawings", onnx=False)
    main = hub.repositories["model/me/drawings"].branches["main"]
    model.push_to_hub("me/drawings", onnx=False, revision="v2", licence="mit")
    branches = hub.repositories["model/me/drawings"].branches
    assert branches["main"] == main
    assert b'license: "mit"' in branches["v2"]["README.md"]
    assert b'snapshot_download("me/drawings", revision="v2")' in branches["v2"]["README.md"]


def test_a_space_receives_the_page(hub, tmp_path):
    def describe(models: int) -> bytes:
        entries = [{"folder": f"models/{number}"} for number in range(models)]
        page = {"models": entries, "samples": [{"file": "a.png"}], "webgpu": False}
        return json.dumps(page).encode()

    page = {"index.html": b"<p>", "page.json": describe(1), "samples/a.png": b"a"}
    page |= {"runtime/ort.wasm": bytes(LARGE_BYTES), "README.md": b"---\nsdk: static\n---\n"}
    page |= {"models/0/encode.onnx": b"1", "models/0/export.json": b'{"files": {"encode.onnx": 1}}'}
    mine = {"samples/mine.png": b"mine", "models/1/mine.onnx": b"mine"}
    for name, data in page.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for kept in ({}, mine):
        push_folders([HubFolder("me/page", "space", tmp_path)], TOKEN, "Upload")
        space = hub.repositories["space/me/page"]
        assert space.settings["sdk"] == "static"
        files = dict(space.branches["main"])
        assert (files.pop("style.css"), files.pop(".gitattributes") != b"") == (b"new", True)
        assert files == page | kept
        space.branches["main"] |= mine | {  # and a second model
            "page.json": describe(2),
            "models/1/encode.onnx": b"2",
            "models/1/export.json": page["models/0/export.json"],
        }


def test_the_card_of_a_space_is_yaml(hub, model, monkeypatch):
    def write_page(_models, destination, credit: str) -> None:
        assert credit == "By me."
        (destination / "index.html").write_text("<p>")

    monkeypatch.setattr(publication, "write_page", write_page)
    model.push_to_hub("me/drawings", credit="By me.", space="me/page", onnx=False)
    files = hub.repositories["space/me/page"].branches["main"]
    assert ModelCard(files["README.md"].decode()).data.to_dict()["emoji"] == "🪞"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_and_page_are_sent(hub, tmp_path):
    """Needs npm, for the first page, and a minute of CPU for the export."""
    arguments = ["--model", "builtin:openmoji-32", "--format", "hub", "--output", "me/drawings"]
    arguments += ["--hub.space", "me/page", "--credit", "By OpenMoji.", "--hub.licence", "mit"]
    assert export.main(arguments) == 0
    files = hub.repositories["model/me/drawings"].branches["main"]
    page = hub.repositories["space/me/page"].branches["main"]
    programs = {name.removeprefix("onnx/"): files[name] for name in files if "onnx/" in name}
    assert {"encode.onnx", "decode.onnx", "act-rot90.onnx", "export.json"} < set(programs)
    assert programs == {
        name.removeprefix("models/0/"): page[name] for name in page if "models/0/" in name
    }
    settings = json.loads(page["page.json"])
    assert settings["credit"].startswith("By OpenMoji.")
    assert settings["models"][0]["name"] == "me/drawings"
    assert b'models: ["me/drawings"]' in page["README.md"]
    assert b"(https://huggingface.co/spaces/me/page)" in files["README.md"]
    kinds = {PurePath(name).suffix for name in {*files, *page}}
    assert kinds <= {*("", ".json", ".safetensors", ".onnx", ".md", ".html", ".css", ".js")} | {
        *(".mjs", ".wasm", ".png", ".jpg")
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    efae.load(tmp_path)


@pytest.mark.parametrize("kind", ["model", "space"])
def test_what_others_hold_is_left_alone(hub, model, kind, tmp_path):
    held = {"pytorch_model.bin": b"theirs", "README.md": b"theirs"}
    hub.repositories[f"{kind}/me/taken"] = Repository({}, {"main": dict(held)})
    (tmp_path / "page.json").write_text("{}")
    folders = [HubFolder("me/new", "model", tmp_path), HubFolder("me/taken", kind, tmp_path)]
    refusal = r"^me/taken already holds pytorch_model\.bin, which this package did not send"
    with pytest.raises(ValueError, match=refusal):
        push_folders(folders, TOKEN, "Upload")
    names = (
        {"repo_id": "me/taken"} if kind == "model" else {"repo_id": "me/new", "space": "me/taken"}
    )
    with pytest.raises(ValueError, match=refusal):  # before the programs are exported
        model.push_to_hub(**names)
    assert [*hub.repositories] == [f"{kind}/me/taken"]
    assert hub.repositories[f"{kind}/me/taken"].branches["main"] == held


@pytest.mark.parametrize("kind", ["model", "space"])
@pytest.mark.parametrize(
    "held",
    [
        {"README.md": b"theirs"},
        {"index.html": b"theirs", "style.css": b"theirs"},
        {"manifest.json": b'{"name": "app"}', "onnx/model.onnx": b"theirs"},
        {"page.json": b'{"models": [], "samples": 1}'},
    ],
)
def test_files_of_common_names_are_left_alone(hub, kind, held, tmp_path):
    commits = [{"summary": "initial commit"}, {"summary": "My work"}]
    hub.repositories[f"{kind}/me/taken"] = Repository({}, {"main": dict(held)}, commits)
    (tmp_path / "page.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^me/taken already holds {sorted(held)[0]}"):
        push_folders([HubFolder("me/taken", kind, tmp_path)], TOKEN, "Upload")
    assert hub.repositories[f"{kind}/me/taken"].branches["main"] == held
    hub.repositories[f"{kind}/me/taken"].branches["main"] = {".gitattributes": b""}  # emptied
    push_folders([HubFolder("me/taken", kind, tmp_path)], TOKEN, "Upload")


def test_a_gitignore_leaves_out_no_file(hub, model):
    model.push_to_hub("me/drawings", onnx=False)
    files = hub.repositories["model/me/drawings"].branches["main"]
    files[".gitignore"] = b"config.json\n"
    before = dict(files)
    with pytest.raises(ValueError, match=r"^me/drawings has a \.gitignore"):
        model.push_to_hub("me/drawings", onnx=False)
    assert hub.repositories["model/me/drawings"].branches["main"] == before


def test_bad_input_gets_a_sentence(hub, model, monkeypatch):
    def push(repo_id: str, **options) -> str:
        with pytest.raises((ValueError, ConnectionError)) as caught:
            model.push_to_hub(repo_id, **{"onnx": False} | options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("drawings", "me/a/b", "me/--", "me/../x", "me/drawings.git", "", "me/ä"):
        assert push(name).startswith(f"{name!r} names no repository of the Hub: write USER/NAME")
    assert "'page' names no repository" in push("me/drawings", space="page")
    assert "licence 'CC BY'" in push("me/drawings", licence="CC BY")
    assert "you/drawings: http" in (told := push("you/drawings"))
    assert "answers 403 (You don't have the rights to create" in told
    assert "answers 401 (" in (told := push("me/drawings", token="hf_wrong"))
    assert "use a token that may write there" in told
    assert "hf_wrong" not in told
    for token in ("hf_SECRET\nX: y", "hf_SECRET hf_x", "hf_SECRÉT"):
        told = push("me/drawings", token=token)
        assert told.startswith("the token for the Hub has a space, a line break")
        assert "SECR" not in told
    for option in ("revision", "commit_message"):
        assert "must not be empty" in push("me/drawings", dry_run=True, **{option: " "})
    assert hub.repositories == {}
    with pytest.raises(TypeError, match="license"):
        model.push_to_hub("me/drawings", license="mit")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told = push("me/drawings")
    assert told.startswith("me/drawings: the upload to http://127.0.0.1:9 failed (")
    assert "refused" in told
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in push("me/drawings")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//me:hunter2@"))
    told = push("you/drawings")
    assert "answers 40" in told
    assert "hunter2" not in told


def test_the_line_break_behind_a_token_is_no_part_of_it(hub, model):
    model.push_to_hub("me/drawings", token=f"{TOKEN}\n", onnx=False)
    assert "model/me/drawings" in hub.repositories
