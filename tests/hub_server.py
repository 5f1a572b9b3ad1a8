# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""
A Hugging Face Hub on the loopback interface, for tests: the real `huggingface_hub` client creates repositories,
commits and downloads through it (`HF_ENDPOINT=server.url`, `HF_HUB_DISABLE_XET=1`).

Blobs and repositories are files under `root`. A repository belongs to the namespace before its slash, a token to one
namespace. Everybody reads public repositories; only the owner's token reads private ones, and writes. A commit is
there as a whole or not at all. `drop` and `heal` break and mend connections in the middle of an upload or a download.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".png")
CHUNK = 1 << 14


class HubError(Exception):
    """An answer that is no success; `code` is the header by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class ConnectionDropped(Exception):
    """The connection ends here: a test asked for it, or the client hung up."""


class HubServer:
    """
    Serves from a thread inside `with HubServer(root, tokens) as server:`.

    Args:
        root (`Path`): Where the files are kept. A server on the same folder continues where another ended.
        tokens (`dict[str, str]`): Namespace by token.

    `requests` lists `(method, path, status, range)` of all requests in the order of their ends; status 0 is a dropped
    connection.
    """

    def __init__(self, root: Path, tokens: dict[str, str]):
        self.root = Path(root)
        self.tokens = tokens
        self.requests: list[tuple[str, str, int, str | None]] = []
        self.lock = threading.RLock()
        self._drops: list[dict] = []
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        (self.root / "repos").mkdir(exist_ok=True)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """Environment variables for a client in another process, whose cache is in `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }

    def drop(self, method: str, pattern: str, after: int, times: int | None = None):
        """
        Hangs up on requests, `after` bytes into the body; shorter bodies pass. A client in another process asks for
        it by `POST /faults` with these arguments as JSON.

        Args:
            method (`str`): `"PUT"` for uploads, `"GET"` for downloads.
            pattern (`str`): Regular expression that the path has to contain.
            after (`int`): Bytes of the body that still pass.
            times (`int`, *optional*): On how many requests; on all until `heal` if not given.
        """
        with self.lock:
            self._drops.append({"method": method, "pattern": pattern, "after": after, "times": times})

    def heal(self):
        """Forgets all faults; by `POST /faults` with an empty body from another process."""
        with self.lock:
            self._drops.clear()

    def _next_drop(self, method: str, path: str) -> int | None:
        with self.lock:
            for fault in self._drops:
                if fault["method"] == method and re.search(fault["pattern"], path) and fault["times"] != 0:
                    if fault["times"] is not None:
                        fault["times"] -= 1
                    return fault["after"]
        return None

    def load(self, repo_id: str) -> dict | None:
        """A repository: `{"private", "refs": {name: sha}, "commits": {sha: {"title", "date", "parent", "files"}}}`."""
        path = self.root / "repos" / f"{repo_id.replace('/', '--')}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _save(self, repo_id: str, repo: dict):
        path = self.root / "repos" / f"{repo_id.replace('/', '--')}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(repo))
        partial.replace(path)

    def create(self, repo_id: str, private: bool, space_sdk: str | None = None):
        repo = {"private": private, "refs": {}, "commits": {}, "space_sdk": space_sdk}
        files = {".gitattributes": self._add_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        self._add_commit(repo, "main", "initial commit", files)
        self._save(repo_id, repo)

    def _add_commit(self, repo: dict, branch: str, title: str, files: dict[str, dict]) -> str:
        parent = repo["refs"].get(branch)
        sha = hashlib.sha1(json.dumps([parent, title, len(repo["commits"]), files]).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        repo["commits"][sha] = {"title": title, "date": date, "parent": parent, "files": files}
        repo["refs"][branch] = sha
        return sha

    def _blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def _add_blob(self, content: bytes) -> dict:
        sha256 = hashlib.sha256(content).hexdigest()
        self._blob(sha256).write_bytes(content)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": oid, "sha256": sha256, "size": len(content), "lfs": False}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision with their contents."""
        repo = self.load(repo_id)
        entries = repo["commits"][resolve(repo, revision)]["files"]
        return {path: self._blob(entry["sha256"]).read_bytes() for path, entry in entries.items()}


def resolve(repo: dict, revision: str) -> str:
    """The commit of a branch, a tag or a commit."""
    sha = repo["refs"].get(revision, revision)
    if sha not in repo["commits"]:
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
    return sha


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _dispatch(self):
        path = urlsplit(self.path).path
        self.status = 0
        self.drop_after = self.hub._next_drop(self.command, path)
        try:
            body = b"".join(self._body()) if self.command == "POST" else b""
            for methods, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    arguments = {name: unquote(value) for name, value in match.groupdict().items()}
                    handle(self, **arguments, **({"body": body} if self.command == "POST" else {}))
                    break
            else:
                raise HubError(404, f"No route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), "X-Error-Code": error.code, "X-Repo-Commit": error.commit}
            if self.command == "PUT":
                # Its body may still be on its way. Announced, or the client would send its next request here.
                headers["Connection"] = "close"
            self._answer({"error": str(error)}, error.status, {k: v for k, v in headers.items() if v})
        except (ConnectionDropped, ConnectionError):
            self.status = 0
            self.close_connection = True
        finally:
            with self.hub.lock:
                self.hub.requests.append((self.command, path, self.status, self.headers.get("Range")))

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _body(self) -> Iterator[bytes]:
        """The body in pieces, whether its length is announced or not."""
        received = 0
        for chunk in self._chunks():
            received += len(chunk)
            if self.drop_after is not None and received > self.drop_after:
                raise ConnectionDropped
            yield chunk

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        remaining = int(self.headers.get("Content-Length", 0))
        while remaining:
            chunk = self.rfile.read(min(CHUNK, remaining))
            if not chunk:
                raise ConnectionDropped
            remaining -= len(chunk)
            yield chunk

    def _answer(self, content: dict | list, status: int = 200, headers: dict[str, str] | None = None):
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
        self._send_headers(status, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_headers(self, status: int, headers: dict[str, str | int]):
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _namespace(self) -> str | None:
        """Whose token came with the request."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        namespace = self.hub.tokens.get(authorization.removeprefix("Bearer "))
        if namespace is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return namespace

    def _require_owner(self, repo_id: str):
        namespace = self._namespace()
        if namespace != repo_id.split("/")[0]:
            raise HubError(403 if namespace else 401, f"You don't have the rights to write to {repo_id}")

    def _repo(self, repo_id: str) -> dict:
        """A repository that whoever asks may see. The Hub does not tell a hidden one from none."""
        namespace = self._namespace()
        repo = self.hub.load(repo_id)
        if repo is None or (repo["private"] and namespace != repo_id.split("/")[0]):
            raise HubError(404 if namespace else 401, "Repository not found", code="RepoNotFound")
        return repo

    def set_faults(self, body: bytes):
        if body:
            self.hub.drop(**json.loads(body))
        else:
            self.hub.heal()
        self._answer({})

    def whoami(self):
        namespace = self._namespace()
        if namespace is None:
            raise HubError(401, "Invalid username or password.")
        self._answer({"type": "user", "name": namespace, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repo(self, body: bytes):
        request = json.loads(body)
        repo_id = f"{request.get('organization') or self._namespace()}/{request['name']}"
        self._require_owner(repo_id)
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if self.hub.load(repo_id) is not None:
                # Of this error the client reads the body.
                self._answer({"error": "You already created this model repo", **answer}, status=409)
                return
            private = request.get("visibility") == "private" or bool(request.get("private"))
            self.hub.create(repo_id, private, space_sdk=request.get("sdk"))
        self._answer(answer)

    def create_branch(self, repo_id: str, branch: str, body: bytes):
        self._require_owner(repo_id)
        with self.hub.lock:
            repo = self._repo(repo_id)
            if branch in repo["refs"]:
                raise HubError(409, f"Reference already exists: {branch}")
            repo["refs"][branch] = resolve(repo, json.loads(body or b"{}").get("startingPoint", "main"))
            self.hub._save(repo_id, repo)
        self._answer({})

    def create_tag(self, repo_id: str, revision: str, body: bytes):
        self.create_branch(repo_id, json.loads(body)["tag"], json.dumps({"startingPoint": revision}).encode())

    def validate_yaml(self, body: bytes):
        content = json.loads(body)["content"]
        warnings = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
        self._answer({"errors": [], "warnings": warnings})

    def preupload(self, repo_id: str, revision: str, body: bytes):
        self._require_owner(repo_id)
        repo = self._repo(repo_id)
        files = repo["commits"][resolve(repo, revision)]["files"]
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 << 20
            entry = files.get(file["path"])
            oid = entry and entry["sha256" if entry["lfs"] else "oid"]
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def lfs_batch(self, repo_id: str, body: bytes):
        self._require_owner(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub._blob(wanted["oid"]).exists():
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def put_blob(self, sha256: str):
        digest = hashlib.sha256()
        partial = self.hub.root / f"{sha256}.{threading.get_ident()}"
        try:
            with open(partial, "wb") as file:
                for chunk in self._body():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise HubError(400, "The content does not match its sha256")
            partial.replace(self.hub._blob(sha256))
        finally:
            partial.unlink(missing_ok=True)
        self._answer({})

    def verify_blob(self, body: bytes):
        wanted = json.loads(body)
        blob = self.hub._blob(wanted["oid"])
        if not blob.exists() or blob.stat().st_size != wanted["size"]:
            raise HubError(422, f"Object {wanted['oid']} is not there")
        self._answer({})

    def commit(self, repo_id: str, revision: str, body: bytes):
        self._require_owner(repo_id)
        lines = [json.loads(line) for line in body.splitlines()]
        with self.hub.lock:
            repo = self._repo(repo_id)
            files = dict(repo["commits"][resolve(repo, revision)]["files"])
            title = ""
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[value["path"]] = self.hub._add_blob(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if not self.hub._blob(value["oid"]).exists():
                        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\n".encode()
                    oid = hashlib.sha1(pointer).hexdigest()
                    size = self.hub._blob(value["oid"]).stat().st_size
                    files[value["path"]] = {"oid": oid, "sha256": value["oid"], "size": size, "lfs": True}
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", code="EntryNotFound")
                else:
                    raise HubError(400, f"Operation {key} is not supported")
            if revision not in repo["refs"]:
                raise HubError(400, f"{revision} is not a branch")
            answer = {"success": True}
            if "create_pr" in parse_qs(urlsplit(self.path).query):
                number = 1 + sum(name.startswith("refs/pr/") for name in repo["refs"])
                repo["refs"][f"refs/pr/{number}"] = repo["refs"][revision]
                revision = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
            sha = self.hub._add_commit(repo, revision, title, files)
            self.hub._save(repo_id, repo)
        self._answer({**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def model_info(self, repo_id: str, revision: str = "main"):
        repo = self._repo(repo_id)
        sha = resolve(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo["commits"][sha]["files"])]
        info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo["private"]}
        self._answer({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, repo_id: str, revision: str):
        repo = self._repo(repo_id)
        entries = []
        for path, file in sorted(repo["commits"][resolve(repo, revision)]["files"].items()):
            entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
            if file["lfs"]:
                entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
            entries.append(entry)
        self._answer(entries)

    def refs(self, repo_id: str):
        refs = self._repo(repo_id)["refs"].items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs]
        self._answer({"branches": branches, "tags": [], "converts": []})

    def resolve_file(self, repo_id: str, revision: str, path: str):
        repo = self._repo(repo_id)
        sha = resolve(repo, revision)
        file = repo["commits"][sha]["files"].get(path)
        if file is None:
            raise HubError(404, "Entry not found", code="EntryNotFound", commit=sha)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file["oid"]}"', "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers |= {"X-Linked-ETag": f'"{file["sha256"]}"', "X-Linked-Size": file["size"]}

        start, end, status = 0, file["size"], 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, end) if wanted[2] else end
            if start >= end:
                raise HubError(416, "Requested range not satisfiable")
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file['size']}"
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": end - start}
        self._send_headers(status, headers)
        if self.command == "GET":
            self._send_content(self.hub._blob(file["sha256"]), start, end)

    def _send_content(self, blob: Path, start: int, end: int):
        stop = end if self.drop_after is None else min(end, start + self.drop_after)
        with open(blob, "rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(CHUNK, stop - start))
                self.wfile.write(chunk)
                start += len(chunk)
        if stop < end:
            raise ConnectionDropped


_MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
_SPACE = r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)"

# Methods, pattern of the path, handler. Parts of a path are quoted one by one: a slash in a name is %2F.
_ROUTES = [
    ("POST", r"/faults", _Handler.set_faults),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _MODEL, _Handler.model_info),
    ("GET", _MODEL + r"/revision/(?P<revision>[^/]+)", _Handler.model_info),
    ("GET", _MODEL + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", _SPACE + r"/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", _MODEL + r"/refs", _Handler.refs),
    ("POST", _MODEL + r"/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", _MODEL + r"/tag/(?P<revision>[^/]+)", _Handler.create_tag),
    ("POST", _MODEL + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _MODEL + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", _SPACE + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _SPACE + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", r"/(?:spaces/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", _Handler.put_blob),
    ("POST", r"/lfs-verify", _Handler.verify_blob),
    ("GET HEAD", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve_file),
]
