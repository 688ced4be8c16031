"""A hub on the loopback: the endpoints through which huggingface_hub finds and downloads the files of a repository."""

import hashlib
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories, *, seconds_per_file=0.0):
    """Serve `{"ORG/NAME": folder}` at the yielded address, with a counter of the whole files sent."""
    sent = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            organisation, name, _, revision, *file = unquote(self.path).strip("/").split("/")
            folder = repositories.get(f"{organisation}/{name}")
            if folder is None:
                return self.reply(404, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v2", COMMIT):
                return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
            path = folder.joinpath(*file)
            if not path.is_file():
                return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if body:
                sent[path.name] += 1
                threading.Event().wait(seconds_per_file)
            return self.reply(200, headers, content, body=body)

        def reply(self, status, headers, content=b"", *, body=True):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
