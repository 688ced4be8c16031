"""Uploading, against a server on the loopback that answers as the hub does; the hub itself has not been tried."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from clip_train.errors import UserError
from clip_train.interop.export.push import push


@pytest.fixture
def hub(monkeypatch):
    """Return the requests that reach the server, as (path, body)."""
    seen = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            seen.append((self.path.partition("?")[0], body))
            files = json.loads(body).get("files", []) if "preupload" in self.path else []
            answers = {
                "create": {"url": "http://127.0.0.1/me/mine", "name": "me/mine"},
                "validate-yaml": {},
                "preupload": {
                    "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                },
                "commit": {"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/mine/commit/0"},
            }
            self.answer(200, next(value for name, value in answers.items() if name in self.path))

        def do_GET(self):
            self.answer(200, {"id": "me/mine", "sha": "0" * 40, "siblings": []})

        def answer(self, status, values):
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_whole_folder_is_committed(hub, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "README.md").write_text("---\ntags: [clip]\n---\n# mine\n")
    (tmp_path / "onnx" / "image.onnx").write_bytes(b"graph")
    assert push(tmp_path, repository="me/mine").endswith("/me/mine")
    commit = next(body for path, body in hub if path == "/api/models/me/mine/commit/main")
    operations = [json.loads(line) for line in commit.splitlines()]
    sent = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in operations if o["key"] == "file"}
    assert sent == {
        "README.md": (tmp_path / "README.md").read_bytes(),
        "onnx/image.onnx": b"graph",
    }


def test_no_network_and_no_such_name_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for repository in ("me/mine", "not a name"):
        with pytest.raises(UserError, match=rf"--push {repository}: not uploaded .*the export itself is in") as caught:
            push(tmp_path, repository=repository)
        assert len(str(caught.value).splitlines()) == 1
