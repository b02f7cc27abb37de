"""The two servers, the Hub and its CDN, and what can go wrong with them."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .repositories import Blob, HubError, Repository

# user by token; a repository is its creator's, who alone writes to it and reads it when it is private
TOKENS = {"hf_owner": "owner", "hf_other": "other"}
REPOSITORY = "(datasets/|spaces/)?([^/]+/[^/]+?)"
WRITES = ("preupload", "commit", "branch", "tag", "super-squash", "settings")


@dataclass
class Fault:
    """See `FakeHub.fault`; `hits` counts the requests that failed."""

    pattern: str
    status: int | None
    keep: float | None
    change: Callable[[bytes], bytes] | None
    times: float
    hits: int = 0


class FakeHub:
    """The server; a context manager.

    Args:
        card_errors: what is wrong with a README.md, by its content and the type of its repository. Without it, every
            card is fine: the standard library does not read YAML.

    Attributes:
        url: what HF_ENDPOINT must be.
        requests: `"GET /api/models/org/name"`, ... of everything that was asked for.
        repositories: by type ("model", "dataset", "space") and id.
    """

    def __init__(self, card_errors: Callable[[str, str], list[str]] = lambda content, repo_type: []):
        self.card_errors = card_errors
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads, server.hub = True, self
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> "FakeHub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """Variables for a process that uses this Hub, with its caches under `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        # an empty token is none, also where the machine has one
        return {**variables, **quiet, "HF_TOKEN": token or "", "HF_TOKEN_PATH": f"{home}/token"}

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Content by path at a revision."""
        commit = self.repositories[repo_type, repo_id].at(revision)
        return {path: blob.content for path, blob in commit.files.items()}

    def overwrite(self, repo_id: str, path: str, content: bytes, repo_type: str = "model", revision: str = "main"):
        """Change a file under its commit's hash, ETag and all: what a dishonest server could do."""
        files = self.repositories[repo_type, repo_id].at(revision).files
        files[path] = Blob(content, files[path].is_lfs)

    @contextlib.contextmanager
    def fault(
        self,
        pattern: str,
        *,
        status: int | None = None,
        keep: float | None = None,
        change: Callable[[bytes], bytes] | None = None,
        times: float = float("inf"),
    ) -> Iterator[Fault]:
        """Let requests fail whose "METHOD /path" matches the regular expression.

        Args:
            status: answer with this HTTP status.
            keep: send this part of the body, 0.5 say, then drop the connection.
            change: send what this makes of the body, under the old ETag.
            times: how many requests fail.
        """
        fault = Fault(pattern, status, keep, change, times)
        self._faults.append(fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    def hit(self, request: str) -> Fault | None:
        """Note a request; the fault that it meets."""
        with self.lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.hits < fault.times and re.search(fault.pattern, request):
                    fault.hits += 1
                    return fault
        return None

    def find(self, kind: str, repo_id: str, user: str | None, write: bool = False) -> Repository:
        """A repository that `user` may see, or change with `write`."""
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and repository.owner != user):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and repository.owner != user:
            raise HubError(403, f"You don't have the rights to write to {repo_id} as {user}")
        return repository

    def create(self, user: str | None, body: dict) -> dict:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        kind, repo_id = body.get("type") or "model", f"{body.get('organization') or user}/{body['name']}"
        url = f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.repositories:
            raise HubError(409, "You already created this repo", url=url)
        private = bool(body.get("private")) or body.get("visibility") == "private"
        self.repositories[kind, repo_id] = Repository(repo_id, user, private, url)
        return {"url": url, "name": repo_id, "id": repo_id}

    def delete(self, user: str | None, body: dict) -> dict:
        kind, repo_id = body.get("type") or "model", f"{body.get('organization') or user}/{body['name']}"
        self.find(kind, repo_id, user, write=True)
        del self.repositories[kind, repo_id]
        return {}


class Handler(BaseHTTPRequestHandler):
    """Turns requests into calls of `FakeHub` and `Repository`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub: FakeHub = self.server.hub
        content = self._read()
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.fault = hub.hit(f"{self.command} {urllib.parse.unquote(url.path)}")
        try:
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, "asked for by a test")
            with hub.lock:
                answer = self._route(hub, url.path, content)
            if answer is not None:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._send(error.status, json.dumps(error.body).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _route(self, hub: FakeHub, path: str, content: bytes) -> dict | list | None:
        """The JSON to answer with, or None when the answer has been sent."""
        if match := re.fullmatch(r"/upload/(\w{64})", path):
            if hashlib.sha256(content).hexdigest() != match[1]:
                raise HubError(400, "The content is not that of this hash")
            hub.uploads[match[1]] = content
            return self._send(200, b"", {"ETag": match[1]})
        if match := re.fullmatch(r"/cdn/(\w{64})", path):
            blobs = (repository.lfs_blob(match[1]) for repository in hub.repositories.values())
            blob = next(blob for blob in blobs if blob)
            return self._send_file(blob, {"ETag": f'"{blob.etag}"'})
        user = self._user()
        if path == "/api/repos/create":
            return hub.create(user, json.loads(content))
        if path == "/api/repos/delete":
            return hub.delete(user, json.loads(content))
        if path == "/api/whoami-v2":
            if user is None:
                raise HubError(401, "Invalid username or password.")
            return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return self._validate_card(hub, json.loads(content))
        if match := re.fullmatch(f"/{REPOSITORY}\\.git/info/lfs/objects/batch", path):
            repository = hub.find((match[1] or "models/")[:-2], match[2], user, write=True)
            return repository.lfs_batch(json.loads(content)["objects"], f"{hub.cdn_url}/upload")
        if match := re.fullmatch(f"/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            repository = hub.find((match[1] or "models/")[:-2], match[2], user)
            return self._resolve(repository, *map(urllib.parse.unquote, match.groups()[2:]), hub.cdn_url)
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(.+))?", path):
            what, *rest = [urllib.parse.unquote(part) for part in (match[3] or "revision/main").split("/")]
            repository = hub.find(match[1], match[2], user, write=what in WRITES)
            return self._repository_api(repository, user, what, rest, content)
        raise HubError(404, f"{self.command} {path} is not part of the fake Hub")

    def _repository_api(
        self, repository: Repository, user: str | None, what: str, rest: list[str], content: bytes
    ) -> dict | list:
        if what == "revision":
            return repository.info(rest[0])
        if what == "refs":
            return repository.list_refs()
        if what == "commits":
            return repository.history(rest[0])
        if what == "tree":
            flags = [self.query.get(name, "").lower() == "true" for name in ("recursive", "expand")]
            return repository.tree(rest[0], "/".join(rest[1:]), *flags)
        if what == "paths-info":
            form = urllib.parse.parse_qs(content.decode())
            return repository.paths_info(rest[0], form["paths"], form.get("expand", [""])[0].lower() == "true")
        if what == "preupload":
            return repository.preupload(rest[0], json.loads(content)["files"])
        if what == "commit":
            lines = [json.loads(line) for line in content.splitlines()]
            return repository.commit(user, rest[0], lines, self.server.hub.uploads, "create_pr" in self.query)
        if what == "settings":
            settings = json.loads(content)
            repository.private = settings.get("private", settings.get("visibility") == "private")
            return {"private": repository.private}
        if what == "branch" and self.command == "POST":
            return repository.set_ref(f"refs/heads/{rest[0]}", json.loads(content).get("startingPoint") or "main")
        if what == "tag" and self.command == "POST":
            return repository.set_ref(f"refs/tags/{json.loads(content)['tag']}", rest[0])
        if what == "super-squash":
            return repository.squash(rest[0], json.loads(content)["message"])
        if what in ("branch", "tag"):
            return repository.delete_ref(f"refs/{'heads' if what == 'branch' else 'tags'}/{rest[0]}")
        raise HubError(404, f"{what} is not part of the fake Hub")

    def _validate_card(self, hub: FakeHub, body: dict) -> dict | None:
        errors = hub.card_errors(body["content"], body["repoType"])
        if not errors:
            return {"errors": [], "warnings": []}
        answer = json.dumps({"errors": [{"message": message} for message in errors], "warnings": []})
        if self.headers.get("Accept") == "text/plain":
            answer = "\n".join(f"- Error: {message}" for message in errors)
        self._send(400, answer.encode(), {})

    def _resolve(self, repository: Repository, revision: str, path: str, cdn_url: str) -> None:
        sha = repository.resolve(revision)
        blob = repository.commits[sha].files.get(path)
        if blob is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self._send(404, b"Entry not found", headers)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'}
        if not blob.is_lfs:
            return self._send_file(blob, headers)
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
        self._send(302, b"", {**headers, **linked, "Location": f"{cdn_url}/cdn/{blob.sha256}"})

    def _send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        match, size = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), len(blob.content)
        if match is None:
            return self._send(200, blob.content, {**headers, "Accept-Ranges": "bytes"})
        start, stop = int(match[1]), min(int(match[2] or size), size - 1) + 1
        if start >= size:
            return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        self._send(206, blob.content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.change and status in (200, 206):
            body = self.fault.change(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.keep is not None:
            body = body[: int(len(body) * self.fault.keep)]
            self.close_connection = True
        self.wfile.write(body)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content
