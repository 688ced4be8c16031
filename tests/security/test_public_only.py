"""With `data.public_only` no connection is made to an address that is not public, whoever names it and how."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clip_train.config import load
from clip_train.data.remote.cache import ShardCache
from clip_train.data.source import open_source
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
from clip_train.storage import public, remote
from tests.data.made import numbered_shards
from tests.data.served import Served


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


def opened(folder, url, *, public_only=True):
    cache = ShardCache(folder=folder / "cache", max_bytes=10**9, public_only=public_only)
    return open_source(url, name="train", world=World(), field="data.train", cache=cache)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("pattern", ["s-000.tar", ""])
def test_a_server_on_this_machine_is_never_reached(tmp_path, host, pattern):
    numbered_shards(tmp_path / "origin", [3])
    with Served(tmp_path / "origin") as server:
        url = f"{server.url.replace('127.0.0.1', host)}/{pattern}"
        with pytest.raises(UserError, match=r"is no public address, and data\.public_only=true"):
            opened(tmp_path, url)
        assert not server.requests
        if pattern:
            assert opened(tmp_path, url, public_only=False).counts == [3]


def test_an_evaluation_of_the_held_out_pairs_of_such_a_run_reaches_none_either(tmp_path):
    numbered_shards(tmp_path / "origin", [3])
    with Served(tmp_path / "origin") as server:
        run = ["data.train=x", "steps=5", "optim.warmup=0", "data.public_only=true", "evaluation=[val]"]
        config = load("train", [*run, f"data.val={server.url}/s-000.tar", f"data.cache.dir={tmp_path / 'cache'}"])
        val = config.evaluation["val"]
        with pytest.raises(UserError, match=r"is no public address, and data\.public_only=true"):
            open_captioned_shards(val.shards, caption=val.caption, split=val.split, cache=val.cache.build())
        assert not server.requests


def test_a_redirect_to_such_an_address_is_not_followed(tmp_path, monkeypatch):
    real, asked = public.require_public, []

    def first_is_public(address):
        asked.append(address)
        if address != "127.0.0.1":
            real(address)

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{inner.server_port}/secret.tar")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    class Inner(Redirecting):
        def do_GET(self):
            reached.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

    reached = []
    monkeypatch.setattr(public, "require_public", first_is_public)
    with HTTPServer(("127.0.0.1", 0), Redirecting) as outer, HTTPServer(("127.0.0.2", 0), Inner) as inner:
        for server in (outer, inner):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            with pytest.raises(UserError, match=r"127\.0\.0\.2 is no public address"):
                opened(tmp_path, f"http://127.0.0.1:{outer.server_port}/a.tar")
        finally:
            outer.shutdown()
            inner.shutdown()
    assert reached == [] and {"127.0.0.1", "127.0.0.2"} <= set(asked)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "::1", "::", "fe80::1%eth0", "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    ],
)  # fmt: skip
def test_addresses_with_a_special_use_are_refused(address):
    with pytest.raises(public.PrivateAddress):
        public.require_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses_are_not(address):
    public.require_public(address)


def test_places_whose_host_cannot_be_checked_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ftp://h/.*: with data\.public_only=true"):
        opened(tmp_path, "ftp://h/a.tar")
    streaming = ["data.train=x", "steps=5", "optim.warmup=0", "data.reader=streaming", "data.num_samples=9"]
    with pytest.raises(UserError, match=r"data\.public_only=True needs data\.reader=indexed"):
        load("train", [*streaming, "data.public_only=true"])
    with pytest.raises(UserError, match=r"for training it is data\.public_only=true"):
        load("train", [*streaming[:3], "data.cache.public_only=true"])
