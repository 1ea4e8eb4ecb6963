"""A test server for the Hub's routes of publishing; what is read goes through olah, a real mirror.

Both work on the same git repositories, one per dataset, under a folder. Objects in LFS lie where
git-lfs keeps them. The rest of the real Hub (accounts, Xet, checks of content) is not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_goodtokenofthetestserver"
_WHO = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "test"), ("EMAIL", "test@example.org"))
}


def git(repo: Path, *arguments: str, **options) -> str:
    """Run git in a repository and return what it prints."""
    env = os.environ | _WHO | options.pop("env", {})
    command = ["git", "-C", str(repo), *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, env=env, **options)
    return answer.stdout.decode().strip()


def create(repo: Path) -> Path:
    """Create a dataset with a first commit on main, as the Hub does."""
    repo.mkdir(parents=True)
    git(repo, "init", "-q", "-b", "main")
    (repo / ".gitattributes").write_text("*.parquet filter=lfs\n")
    git(repo, "-c", "core.hooksPath=/dev/null", "add", ".gitattributes")
    git(repo, "commit", "-q", "-m", "initial commit")
    return repo


def commit_folder(repo: Path, folder: Path, tag: str | None = None) -> str:
    """Commit a folder's files to main as plain blobs, without the test server."""
    for path in repo.iterdir():
        if path.name not in (".git", ".gitattributes"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # With times of their own: git takes files of the same size and second for unchanged.
    shutil.copytree(folder, repo, dirs_exist_ok=True, copy_function=shutil.copyfile)
    git(repo, "-c", "filter.lfs.clean=", "-c", "filter.lfs.required=false", "add", "-A")
    git(repo, "commit", "-q", "-m", "files")
    if tag is not None:
        git(repo, "tag", tag)
    return git(repo, "rev-parse", "HEAD")


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        root: Folder of datasets/OWNER/NAME.
        failing: Requests to fail: parts of "METHOD path" to the status, 0 to hang up.
        before: Called with "METHOD path" before each request is answered.
        loses_answers: Hang up after a commit.
        requests: What was asked, "METHOD path".
    """

    daemon_threads = True

    def __init__(self, root: Path, mirror: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.mirror = root, mirror
        self.reset()

    def reset(self) -> None:
        self.failing: dict[str, int] = {}
        self.before = lambda request: None
        self.requests: list[str] = []
        self.loses_answers = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # clients are killed on purpose
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def handle_one_request(self) -> None:
        for method in ("GET", "HEAD", "POST", "PUT"):
            setattr(self, f"do_{method}", self._do)
        super().handle_one_request()

    def _do(self) -> None:
        request = f"{self.command} {urlsplit(self.path).path}"
        self.server.requests.append(request)
        self.server.before(request)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        for part, status in self.server.failing.items():
            if part in request:
                if not status:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                return self._answer(status, {"error": "made to fail"})
        token = self.headers.get("authorization")
        write = self.command in ("POST", "PUT") and "/paths-info/" not in self.path
        if (token is None and write and self.command == "POST") or (
            token not in (None, f"Bearer {TOKEN}")
        ):
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if not write:
            return self._mirror(body)
        with self.server.lock:
            return self._write(body)

    def _write(self, body: bytes) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-1] == "validate-yaml":  # of the card
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":
            return self._put_object(Path(*parts[1:4]), parts[4], body)
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(Path(*parts[:3]).with_suffix(""), json.loads(body))
        repo, route, revision = self.server.root / Path(*parts[1:4]), parts[4], parts[5]
        if not repo.exists():
            return self._answer(404, {"error": "no repository"}, "RepoNotFound")
        if route == "preupload":
            files = [
                {"path": f["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if f["path"].endswith(".parquet") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if route == "tag":
            name = json.loads(body)["tag"]
            if git(repo, "tag", "--list", name):
                return self._answer(409, {"error": "the tag exists"})
            git(repo, "tag", name, revision)
            return self._answer(200, {})
        if route == "commit":
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": "no such route"})

    def _object(self, repo: Path, oid: str) -> Path:
        return self.server.root / repo / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def _batch(self, repo: Path, content: dict) -> None:
        objects = []
        for entry in content["objects"]:
            oid = entry["oid"]
            if not self._object(repo, oid).exists():
                href = f"{self.server.url}/lfs/{repo.as_posix()}/{oid}"
                entry = entry | {"actions": {"upload": {"href": href}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put_object(self, repo: Path, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "the content is not the object"})
        self._object(repo, oid).parent.mkdir(parents=True, exist_ok=True)
        self._object(repo, oid).write_bytes(body)
        return self._answer(200, {})

    def _commit(self, repo: Path, lines: list[dict]) -> None:
        """Build the commit in an index of its own and move the ref at the end."""
        header, *operations = [line["value"] | {"key": line["key"]} for line in lines]
        head = git(repo, "rev-parse", "refs/heads/main")
        if header.get("parentCommit", head) != head:
            return self._answer(412, {"error": "A commit has happened since"})
        env = {"GIT_INDEX_FILE": str(repo / ".git" / "index.upload")}
        git(repo, "read-tree", head, env=env)
        for op in operations:
            if op["key"] == "deletedFile":
                git(repo, "update-index", "--force-remove", op["path"], env=env)
                continue
            content = base64.b64decode(op.get("content", ""))
            if op["key"] == "lfsFile":
                if not self._object(repo.relative_to(self.server.root), op["oid"]).exists():
                    return self._answer(400, {"error": "an object was not uploaded"})
                pointer = "version https://git-lfs.github.com/spec/v1"
                content = f"{pointer}\noid sha256:{op['oid']}\nsize {op['size']}\n".encode()
            blob = git(repo, "hash-object", "-w", "--stdin", input=content)
            info = f"100644,{blob},{op['path']}"
            git(repo, "update-index", "--add", "--cacheinfo", info, env=env)
        tree = git(repo, "write-tree", env=env)
        commit = git(repo, "commit-tree", tree, "-p", head, "-m", header["summary"])
        place = f"{self.server.url}/{repo.relative_to(self.server.root).as_posix()}"
        answer = {"commitUrl": f"{place}/commit/{commit}", "commitOid": commit}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            git(repo, "update-ref", "refs/pr/1", commit)
            return self._answer(200, answer | {"pullRequestUrl": f"{place}/discussions/1"})
        git(repo, "update-ref", "refs/heads/main", commit, head)
        if self.server.loses_answers:
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self._answer(200, answer)

    def _mirror(self, body: bytes) -> None:
        """Let olah answer."""
        request = urllib.request.Request(
            self.server.mirror + self.path, body or None, method=self.command
        )
        for name, value in self.headers.items():
            if name.lower() in ("content-type", "range", "accept-encoding"):
                request.add_header(name, value)
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.headers.get("content-length") if self.command == "HEAD" else None
        self.send_header("content-length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, status: int, content: dict, code: str | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if code is not None:
            self.send_header("x-error-code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run olah and the test server, on loopback, over a folder's repositories."""
    root = folder / "mirror"
    root.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{folder / "cache"}"\n'
        f'mirrors-path = ["{root}"]\n[accessibility]\noffline = true\n'
    )
    code = "from olah.server import cli; cli()"
    command = [sys.executable, "-c", code, "--config", str(config), "--log-path", str(folder)]
    with (folder / "olah.out").open("w") as log:
        olah = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        mirror = f"http://127.0.0.1:{port}"
        _wait(olah, mirror, folder / "olah.out")
        hub = Hub(root, mirror)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
    finally:
        olah.terminate()
        olah.wait()


def _wait(olah: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/repos", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            if olah.poll() is not None:
                break
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"olah did not start: {log.read_text()[-2000:]}")
