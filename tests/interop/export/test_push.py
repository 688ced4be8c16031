"""Uploading, against a server on the loopback that answers as the hub does; the hub itself has not been tried."""

import pytest
from huggingface_hub import constants

import clip_train
from clip_train.errors import UserError
from clip_train.interop.export.push import push
from tests.interop import files
from tests.interop.export.test_export import export, same
from tests.interop.hub_server import serve

TOKEN = "hf_loopback"


@pytest.fixture
def connect(monkeypatch):
    """Let the hub's client in this process talk to an address; it read its settings when it was imported."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("CLIP_TRAIN_WEIGHTS", raising=False)

    def use(endpoint, *, token):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return use


@pytest.mark.slow
def test_an_export_is_committed_whole_and_loads_by_its_name(connect, tmp_path, capsys):
    model = files.small_model(seed=3)
    source = files.write_open_clip_folder(model, tmp_path / "source")
    repositories = {}
    with serve(repositories, token=TOKEN, new=tmp_path / "hub") as (endpoint, _):
        connect(endpoint, token=TOKEN)
        assert export(source, out=tmp_path / "out", repository="me/mine") == 0
        assert f"uploaded to {endpoint}/me/mine" in capsys.readouterr().out
        push(tmp_path / "out", repository="me/mine")  # now the repository is there
        back, _ = clip_train.load("hf-hub:me/mine", device="cpu", download_root=str(tmp_path / "cache"))
    assert same(back.state_dict(), model.state_dict())
    sent, kept = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
                  for f in (repositories["me/mine"], tmp_path / "out"))  # fmt: skip
    assert sent == kept and len(sent) == 12


def test_what_keeps_an_upload_away_is_one_line(connect, tmp_path):
    (tmp_path / "README.md").write_text("mine")

    def message(repository):
        with pytest.raises(UserError) as caught:
            push(tmp_path, repository=repository)
        assert f"--push {repository}: not uploaded" in str(caught.value)
        assert f"the export itself is in {tmp_path}" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    with serve({}, token=TOKEN, new=tmp_path) as (endpoint, _):
        connect(endpoint, token="hf_another")
        assert "401" in message("me/mine") and "HF_TOKEN" in message("me/mine")
        message("not a name")
    message("me/mine")  # nobody answers there any more
