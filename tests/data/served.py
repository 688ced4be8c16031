"""A folder behind a real HTTP server on the loopback, which fails as it is told."""

import threading
import time
from collections import Counter, defaultdict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Served:
    """Serves a folder. `faults[path]` is what goes wrong at the next requests for a path, one each.

    `drop` sends half of the announced bytes, `short` announces and sends half, `slow` trickles, `stall` waits for
    `go_on`; a number is a status. Faults are those of whole files; with `ranges` pieces are given, and counted apart.
    """

    def __init__(self, folder: Path, *, ranges: bool = False) -> None:
        self.ranges = ranges
        self.pieces: Counter[str] = Counter()
        self.go_on = threading.Event()
        self.faults: dict[str, list] = defaultdict(list)
        self.heads: dict[str, list[int]] = defaultdict(list)  # statuses of the next questions for a size
        self.requests: Counter[str] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(folder))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Served":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(served, folder: Path) -> type:  # noqa: N805
        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *_: object) -> None:
                pass

            def send_piece(self, path: Path, wanted: str) -> None:
                served.pieces[self.path] += 1
                first, last = wanted.removeprefix("bytes=").split("-")
                content = path.read_bytes()
                piece = content[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(piece)))
                self.end_headers()
                self.wfile.write(piece)

            def do_HEAD(self) -> None:
                if served.heads[self.path]:
                    self.send_error(served.heads[self.path].pop(0))
                else:
                    super().do_HEAD()

            def do_GET(self) -> None:
                if served.ranges and "Range" in self.headers:
                    self.send_piece(Path(self.translate_path(self.path)), self.headers["Range"])
                    return
                served.requests[self.path] += 1
                fault = served.faults[self.path].pop(0) if served.faults[self.path] else None
                path = Path(self.translate_path(self.path))
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                if fault is None or not path.is_file():
                    super().do_GET()
                    return
                content = path.read_bytes()
                half = content[: len(content) // 2]
                self.send_response(200)
                self.send_header("Content-Length", str(len(half if fault == "short" else content)))
                self.end_headers()
                if fault == "stall":
                    served.go_on.wait(60)
                    self.wfile.write(content)
                elif fault == "slow":
                    for start in range(0, len(content), 4096):
                        self.wfile.write(content[start : start + 4096])
                        time.sleep(0.02)
                else:
                    self.wfile.write(half)
                self.close_connection = True

        return Handler
