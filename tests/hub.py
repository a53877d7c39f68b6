"""A hub on this machine: the few routes of Hugging Face's that a download asks for.

HEAD, GET /datasets/<repository>/resolve/<revision>/<path>      ETag, X-Repo-Commit, Range
GET /cdn/<sha256>                                               where a large file really is
"""

import hashlib
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c0" * 20


def git_name(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """files: content by (repository, path), all of one commit, whatever revision is asked for.

    cut: connections that are cut after so many bytes of a file, the next one first. status: what
    every request is answered with. etag: says the checksum of a content. large: files are on
    another host, as those in Git LFS are. requests: (method, path, headers), in order.
    """

    def __init__(self, files, commit=COMMIT, status=None, large=False, etag=git_name, ranges=True):
        self.files, self.commit, self.status, self.large = files, commit, status, large
        self.etag, self.ranges = etag, ranges
        self.cut, self.requests, self.at_cut = [], [], lambda: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                outer.answer(self, is_head=True)

            def do_GET(self):
                outer.answer(self, is_head=False)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def fetched(self):
        """The paths of the files whose content was asked for, with the Range of each."""
        return [
            (path.rpartition("/")[2], headers.get("range"))
            for method, path, headers in self.requests
            if method == "GET" and ("/cdn/" if self.large else "/resolve/") in path
        ]

    def answer(self, handler, is_head):
        path = unquote(handler.path)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append((handler.command, path, headers))
        if self.status is not None or path.startswith("/api/"):
            return self.reply(handler, self.status or 404, {}, b"", is_head)
        if path.startswith("/cdn/"):
            by_sum = {hashlib.sha256(c).hexdigest(): c for c in self.files.values()}
            return self.send_file(handler, by_sum[path.rpartition("/")[2]], {}, headers, is_head)
        _, _, rest = path.partition("/datasets/")
        repository, _, rest = rest.partition("/resolve/")
        content = next(
            (c for (r, p), c in self.files.items() if r == repository and rest.endswith("/" + p)),
            None,
        )
        if content is None:
            return self.reply(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"", is_head)
        says = {"ETag": f'"{self.etag(content)}"', "X-Repo-Commit": self.commit}
        if self.large:
            checksum = hashlib.sha256(content).hexdigest()
            says |= {"X-Linked-Etag": f'"{self.etag(content)}"', "X-Linked-Size": len(content)}
            says["Location"] = f"http://localhost:{self.http.server_port}/cdn/{checksum}"
            return self.reply(handler, 302, says, b"", is_head)
        return self.send_file(handler, content, says, headers, is_head)

    def send_file(self, handler, content, says, headers, is_head):
        status, rest = 200, content
        if self.ranges and headers.get("range"):
            start = int(headers["range"].removeprefix("bytes=").partition("-")[0])
            status, rest = 206, content[start:]
            says |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.reply(handler, status, says, rest, is_head)

    def reply(self, handler, status, says, body, is_head):
        handler.send_response(status)
        for name, value in says.items():
            handler.send_header(name, str(value))
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if is_head:
            return
        with suppress(ConnectionError):  # a client that was killed reads no answer
            if self.cut and body:
                handler.wfile.write(body[: self.cut.pop(0)])
                handler.wfile.flush()
                self.at_cut()
                handler.connection.close()
                handler.close_connection = True
            else:
                handler.wfile.write(body)
