"""A small Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client to talk to.

It keeps repositories of models, data sets and Spaces with branches, tags and pull requests, takes files by commits and
by LFS, whole or in parts, and serves them. It knows who may do what by their tokens, and fails on demand. It does not
speak Xet, which the client chooses by itself unless `HF_HUB_DISABLE_XET=1` is in its environment.

The protocol is that of huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py, file_download.py).
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


WRITE_TOKEN, READ_TOKEN, STRANGERS_TOKEN = "hf_write", "hf_read", "hf_stranger"
USER = "someone"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".parquet")
TYPE_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
REPO = r"(?P<namespace>[\w.-]+)/(?P<name>[\w.-]+)"
API = rf"/api/(?P<type>model|dataset|space)s/{REPO}"
GIT = rf"/(?P<prefix>datasets/|spaces/)?{REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/collections", "create_collection"),
    ("GET", r"/api/collections/(?P<slug>[^?]+)", "get_collection"),
    ("POST", r"/api/collections/(?P<slug>[^?]+)/items", "add_to_collection"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/?]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/?]+)", "commit"),
    ("GET", rf"{API}/tree/(?P<revision>[^/?]+)(/(?P<path>[^?]+))?", "list_tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/?]+)", "paths_info"),
    ("GET", rf"{API}/refs", "list_refs"),
    ("GET", rf"{API}/commits/(?P<revision>[^/?]+)", "list_commits"),
    ("POST", rf"{API}/branch/(?P<branch>[^/?]+)", "create_branch"),
    ("POST", rf"{API}/tag/(?P<revision>[^/?]+)", "create_tag"),
    ("GET", rf"{API}(/revision/(?P<revision>[^/?]+))?", "repo_info"),
    ("POST", rf"{GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", rf"{GIT}/resolve/(?P<revision>[^/?]+)/(?P<path>[^?]+)", "resolve"),
]


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Fault:
    """What goes wrong with the requests that match, so many times.

    Attributes:
        status: Answered instead of doing anything; 0 to close the connection in the middle of a body.
        seconds: Waited before, whatever comes then.
        cut: Whether the connection closes in the middle of the answer's body.
        after: Whether the request is carried out before it fails, so that only its answer is lost.
        skip: Requests that match and are let through before.
    """

    pattern: str
    status: int | None = None
    seconds: float = 0.0
    cut: bool = False
    after: bool = False
    times: int = 1
    skip: int = 0


class File(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, File]
    parent: "Commit | None"


@dataclass
class Repo:
    """One repository: its commits by the names that lead to them."""

    id: str
    type: str
    private: bool
    sdk: str | None = None  # of a Space
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return names[revision]
        for commit in [*self.branches.values(), *self.pull_requests.values()]:
            while commit is not None:
                if commit.oid == revision:
                    return commit
                commit = commit.parent
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def append(self, revision: str, title: str, files: dict[str, File], create_pr: bool) -> tuple[Commit, str]:
        """The new commit and the reference that leads to it."""
        parent = self.find(revision)
        oid = hashlib.sha1(f"{self.type}/{self.id}/{parent.oid}/{title}/{time.time_ns()}".encode()).hexdigest()
        commit = Commit(oid, title, files, parent)
        if create_pr:
            reference = f"refs/pr/{len(self.pull_requests) + 1}"
            self.pull_requests[reference] = commit
        else:
            reference = revision
            names = self.pull_requests if revision.startswith("refs/pr/") else self.branches
            if revision not in names:
                raise Refusal(404, f"{revision} is no branch", "RevisionNotFound")
            names[revision] = commit
        return commit, reference


class LoopbackHub:
    """The server; use it as a context manager.

    Attributes:
        url: What `HF_ENDPOINT` is to be.
        requests: "METHOD /path -> status" of every request so far, in their order.
        chunk_size: LFS files above it are taken in parts.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by their sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.users = {WRITE_TOKEN: (USER, "write"), READ_TOKEN: (USER, "read"), STRANGERS_TOKEN: ("stranger", "write")}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.chunk_size = 2**20
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """What makes a client process talk to this Hub."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def fail(self, pattern: str, **fault) -> Fault:
        """Make the next request whose "METHOD /path" contains a regular expression fail; see `Fault`."""
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The contents of a repository."""
        files = self.repos[repo_type, repo_id].find(revision).files
        return {path: file.content for path, file in files.items()}

    # What requests do. `who` is a name and a role, or none; `groups` are the parts of the path, unquoted.

    def whoami(self, who, groups, query, body) -> dict:
        name, role = self._authenticated(who)
        return {
            "type": "user",
            "name": name,
            "fullname": name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def create_repo(self, who, groups, query, body) -> dict:
        name, _ = self._authenticated(who)
        request = json.loads(body)
        namespace, repo_type = request.get("organization") or name, request.get("type") or "model"
        repo_id = f"{namespace}/{request['name']}"
        url = f"{self.url}/{TYPE_PREFIXES[repo_type]}{repo_id}"
        self._check_right(who, namespace)
        if (repo_type, repo_id) in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        first = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {}, None)
        is_private = request.get("private") or request.get("visibility") == "private"
        self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, bool(is_private), request.get("sdk"), {"main": first})
        return {"url": url, "name": repo_id, "id": repo_id}

    def validate_card(self, who, groups, query, body) -> dict:
        errors = find_card_errors(json.loads(body)["content"])
        if errors:
            raise Refusal(400, "Invalid metadata in README.md.", errors=[{"message": error} for error in errors])
        return {"errors": [], "warnings": []}

    def preupload(self, who, groups, query, body) -> dict:
        repo = self._repo(groups, who, write=True)
        present = repo.find(groups["revision"]).files
        answers = []
        for each in json.loads(body)["files"]:
            old = present.get(each["path"])
            is_lfs = each["path"].endswith(LFS_SUFFIXES) and each["size"] > 0
            oid = None if old is None else old.sha256 if old.is_lfs else old.git_oid
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def commit(self, who, groups, query, body) -> dict:
        repo = self._repo(groups, who, write=True)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        header, parent = header["value"], repo.find(groups["revision"])
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(self.stored[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise Refusal(400, f"unknown operation {key}")
        create_pr = query.get("create_pr") == ["1"]
        commit, reference = repo.append(groups["revision"], header["summary"], files, create_pr)
        prefix = f"{self.url}/{TYPE_PREFIXES[repo.type]}{repo.id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{prefix}/commit/{commit.oid}"}
        number = reference.rpartition("/")[-1]
        return answer | ({"pullRequestUrl": f"{prefix}/discussions/{number}"} if create_pr else {})

    def repo_info(self, who, groups, query, body) -> dict:
        repo = self._repo(groups, who)
        commit = repo.find(groups["revision"] or "main")
        readme = commit.files.get("README.md")
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": read_metadata(readme.content.decode()) if readme else None,
            "siblings": [{"rfilename": path, **_describe(file, "blobId")} for path, file in commit.files.items()],
        }

    def list_tree(self, who, groups, query, body) -> list:
        files, prefix = self._repo(groups, who).find(groups["revision"]).files, groups["path"] or ""
        return [_entry(path, file) for path, file in files.items() if path.startswith(prefix)]

    def paths_info(self, who, groups, query, body) -> list:
        files = self._repo(groups, who).find(groups["revision"]).files
        asked = parse_qs(body.decode())["paths"]
        return [_entry(path, files[path]) for path in asked if path in files]

    def list_refs(self, who, groups, query, body) -> dict:
        repo = self._repo(groups, who)

        def describe(names: dict[str, Commit], kind: str) -> list[dict]:
            return [
                {"name": name, "ref": name if kind == "pr" else f"refs/{kind}/{name}", "targetCommit": commit.oid}
                for name, commit in names.items()
            ]

        references = {"branches": describe(repo.branches, "heads"), "tags": describe(repo.tags, "tags")}
        return references | {"converts": [], "pullRequests": describe(repo.pull_requests, "pr")}

    def list_commits(self, who, groups, query, body) -> list:
        commit, listed = self._repo(groups, who).find(groups["revision"]), []
        while commit is not None:
            listed.append(
                {"id": commit.oid, "title": commit.title, "message": "", "date": "2026-01-01T00:00:00.000Z"}
                | {"authors": [{"user": USER}]}
            )
            commit = commit.parent
        return listed

    def create_branch(self, who, groups, query, body) -> dict:
        repo = self._repo(groups, who, write=True)
        if groups["branch"] in repo.branches:
            raise Refusal(409, "Reference already exists")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repo.branches[groups["branch"]] = repo.find(start)
        return {}

    def create_tag(self, who, groups, query, body) -> dict:
        repo, tag = self._repo(groups, who, write=True), json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, "Tag reference exists already")
        repo.tags[tag] = repo.find(groups["revision"])
        return {}

    def create_collection(self, who, groups, query, body) -> dict:
        request = json.loads(body)
        self._check_right(who, request["namespace"])
        slug = f"{request['namespace']}/{request['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.collections:
            raise Refusal(409, "This collection exists already", slug=slug)
        self.collections[slug] = {
            "slug": slug,
            "title": request["title"],
            "owner": {"name": request["namespace"], "type": "user"},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": bool(request.get("private")),
            "theme": "blue",
            "upvotes": 0,
        }
        return self.collections[slug]

    def get_collection(self, who, groups, query, body) -> dict:
        if groups["slug"] not in self.collections:
            raise Refusal(404, "Collection not found")
        return self.collections[groups["slug"]]

    def add_to_collection(self, who, groups, query, body) -> dict:
        collection = self.get_collection(who, groups, query, body)
        self._check_right(who, groups["slug"].partition("/")[0])
        item = json.loads(body)["item"]
        if any(each["id"] == item["id"] for each in collection["items"]):
            raise Refusal(409, "This item is in the collection already")
        position = len(collection["items"])
        collection["items"].append(item | {"_id": f"{position:024x}", "position": position, "repoType": item["type"]})
        return collection

    def lfs_batch(self, who, groups, query, body) -> dict:
        self._repo(groups, who, write=True)
        answers = []
        for each in json.loads(body)["objects"]:
            answer = dict(each)
            if each["oid"] not in self.stored:
                href = f"{self.url}/lfs/{each['oid']}"
                upload = {"href": href}
                if each["size"] > self.chunk_size:
                    count = -(-each["size"] // self.chunk_size)
                    parts = {str(number): f"{href}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self.chunk_size), **parts}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def lfs_put(self, who, groups, query, body) -> dict:
        if groups["part"]:
            self.parts[groups["oid"], int(groups["part"])] = body
        else:
            self._store(groups["oid"], body)
        return {}

    def lfs_complete(self, who, groups, query, body) -> dict:
        if groups["oid"] in self.stored:  # the same file under another name, or a second try
            return {}
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self._store(groups["oid"], b"".join(self.parts.pop((groups["oid"], number)) for number in numbers))
        return {}

    def lfs_verify(self, who, groups, query, body) -> dict:
        if len(self.stored.get(groups["oid"], b"")) != json.loads(body)["size"]:
            raise Refusal(404, f"LFS object {groups['oid']} is not here")
        return {}

    def resolve(self, who, groups, query, body) -> tuple[bytes, dict[str, str]]:
        repo = self._repo(groups, who)
        commit = repo.find(groups["revision"])
        if groups["path"] not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit=commit.oid)
        file = commit.files[groups["path"]]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.sha256 if file.is_lfs else file.git_oid}"'}
        return file.content, headers | {"Accept-Ranges": "bytes"}

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content does not match its hash")
        self.stored[oid] = content

    def _authenticated(self, who: tuple[str, str] | None) -> tuple[str, str]:
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        return who

    def _check_right(self, who: tuple[str, str] | None, namespace: str) -> None:
        name, role = self._authenticated(who)
        if name != namespace or role != "write":
            raise Refusal(403, f"You don't have the rights to do this under the namespace {namespace!r}")

    def _repo(self, groups: dict[str, str], who: tuple[str, str] | None, write: bool = False) -> Repo:
        prefixes = {prefix: repo_type for repo_type, prefix in TYPE_PREFIXES.items()}
        repo_type = groups.get("type") or prefixes[groups.get("prefix") or ""]
        repo_id = f"{groups['namespace']}/{groups['name'].removesuffix('.git')}"
        repo = self.repos.get((repo_type, repo_id))
        is_owner = who is not None and who[0] == groups["namespace"]
        if repo is None or (repo.private and not is_owner):
            raise Refusal(401 if who is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_right(who, groups["namespace"])
        return repo


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        fault = self._find_fault()
        self.is_cut = fault is not None and fault.cut
        if fault is not None:
            time.sleep(fault.seconds)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status == 0 and not fault.after:
            self.rfile.read(length // 2)
            self._note(0)
            self.close_connection = True
            self.connection.close()
            return
        body = self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            if fault is not None and fault.status and not fault.after:
                raise Refusal(fault.status, f"made to fail with {fault.status}")
            with self.hub.lock:
                answer = self._answer(method, body)
            if fault is not None and fault.after:
                if fault.status == 0:
                    self._note(0)
                    self.close_connection = True
                    self.connection.close()
                    return
                raise Refusal(fault.status, f"made to fail with {fault.status}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            if "commit" in refusal.body:
                headers["X-Repo-Commit"] = refusal.body["commit"]
            content = json.dumps({"error": refusal.message, **refusal.body}).encode()
            self._send(refusal.status, content, {**headers, "Content-Type": "application/json"})
            return
        if isinstance(answer, tuple):
            self._send_file(*answer)
        else:
            etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'} if method == "PUT" else {}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json", **etag})

    def _find_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{self.command} {self.path}"):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _answer(self, method: str, body: bytes) -> Any:
        address = urlsplit(self.path)
        for route_method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, address.path)  # not unquoted yet: revisions may hold slashes
            if match and route_method == method:
                groups = {key: None if value is None else unquote(value) for key, value in match.groupdict().items()}
                return getattr(self.hub, name)(self._who(), groups, parse_qs(address.query), body)
        raise Refusal(404, f"this Hub knows no {method} {quote(address.path)}")

    def _who(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        self._send(206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._note(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.is_cut else content)
        if self.is_cut:
            self.close_connection = True
            self.connection.close()

    def _note(self, status: int) -> None:
        self.hub.requests.append(f"{self.command} {self.path} -> {status}")


def read_metadata(readme: str) -> dict | None:
    """The YAML block of a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def find_card_errors(readme: str) -> list[str]:
    """What the Hub would object to in a card's metadata, as far as its documentation says so."""
    try:
        metadata = read_metadata(readme)
    except yaml.YAMLError as error:
        return [f"bad indentation of a mapping entry: {error}"]
    if metadata is None:
        return []
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    errors = []
    for name in ("tags", "datasets", "metrics"):
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            errors.append(f'"{name}" must be an array of strings')
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for number, entry in enumerate(metadata.get("model-index", [])):
        if "name" not in entry:
            errors.append(f'"model-index[{number}].name" is required')
        for result in entry.get("results", []):
            for name in ("task", "dataset", "metrics"):
                if name not in result:
                    errors.append(f'"model-index[{number}].results[0].{name}" is required')
            for metric in result.get("metrics", []):
                if "type" not in metric or "value" not in metric:
                    errors.append(f'"model-index[{number}].results[0].metrics" needs a type and a value')
    return errors


def _describe(file: File, oid_name: str) -> dict:
    described = {"size": len(file.content), oid_name: file.git_oid}
    if file.is_lfs:
        described["lfs"] = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
    return described


def _entry(path: str, file: File) -> dict:
    return {"type": "file", "path": path, **_describe(file, "oid")}
