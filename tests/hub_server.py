"""A Hugging Face Hub of a few routes on 127.0.0.1, for the real client: repositories in memory, downloads, pushes.

    with HubServer() as hub:
        hub.add("model", "org/tiny", {"config.json": b"...", "model.safetensors": b"..."})
        ...  # a client with HF_ENDPOINT=hub.url
        hub.requests  # what it asked for

Large files (`LARGE`) are served as the hub serves them: a redirect to a store, another host ("localhost", where the hub
is 127.0.0.1) that must not see the token and knows files by their sha256. The
answers hold the fields that `huggingface_hub` reads and no others. Tokens are plain words; `hub.users` has the owners.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Optional
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
REPO = r"(?:(?P<kind>datasets|models)/)?(?P<id>[\w.-]+(?:/[\w.-]+)?)"
ROUTES = [  # method, path, name of the handler
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", rf"/api/{REPO}/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/{REPO}", "info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/store/(?P<oid>\w+)", "lfs_put"),
    ("GET", r"/store/(?P<oid>\w+)", "stored"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Request(NamedTuple):
    method: str
    path: str
    range: Optional[str]
    token: Optional[str]


class Repo:
    """One repository: its commits, and who may read it."""

    def __init__(self, files: dict[str, bytes], gated: bool = False, readers: Optional[set[str]] = None):
        self.gated, self.readers = gated, readers  # `readers` None: everyone
        self.commits, self.branches, self.private = {}, {}, None
        self.commit(files)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> Optional[tuple[str, dict[str, bytes]]]:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class HubServer:
    """Runs while its `with` block does. `breaks[path]` cuts the next answer for that file after so many bytes; a number
    below 0 keeps the client waiting instead, until the server stops."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users, self.store, self.requests, self.breaks = {"good-token": "me"}, {}, [], {}
        self.stopping, self.waiting = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes], **access) -> Repo:
        self.repos[kind, name] = repo = Repo(files, **access)
        return repo

    def names(self) -> dict[str, str]:
        """{sha256: path} of every file of every repository."""
        return {hashlib.sha256(content).hexdigest(): path for repo in self.repos.values()
                for files in repo.commits.values() for path, content in files.items()}

    def downloaded(self, start: int = 0) -> list[str]:
        """Names of the files whose content was asked for, from request number `start` on."""
        names = self.names()
        parts = [r.path.split("/") for r in self.requests[start:] if r.method == "GET"]
        return [names[p[2]] for p in parts if p[1] == "store"] + \
            ["/".join(p[p.index("resolve") + 2:]) for p in parts if "resolve" in p and not p[-1].endswith(LARGE)]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do(self):
        path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), self.token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        if self.token is not None and self.token not in self.hub.users:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                groups = match.groupdict()
                if "id" in groups:
                    kind, self.name = (groups.pop("kind") or "models")[:-1], groups.pop("id")
                    self.repo = self.hub.repos.get((kind, self.name))
                    if not self.may_read(name):
                        return None
                return getattr(self, name)(**groups)
        return self.refuse(404, "", f"no route for {method} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do

    def may_read(self, action: str) -> bool:
        """As on the hub: what is hidden is as good as missing, and of what is gated only the files are kept back."""
        if self.repo is None or (self.repo.readers is not None and not self.repo.gated
                                 and self.hub.users.get(self.token) not in self.repo.readers):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return False
        if self.repo.gated and action == "resolve" and self.hub.users.get(self.token) not in (self.repo.readers or ()):
            self.refuse(403 if self.token else 401, "GatedRepo", f"Access to {self.name} is restricted")
            return False
        return True

    # answers

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.answer(body, status, {"X-Error-Code": code, "X-Error-Message": message})

    def give(self, value, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def answer(self, body: bytes, status: int = 200, headers: Optional[dict] = None,
               send: Optional[int] = None) -> None:
        """`send` as in `HubServer.breaks`."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if send is None else body[:abs(send)])
        if send is not None:
            self.wfile.flush()
            self.close_connection = True
            if send < 0:
                self.hub.waiting.set()
                self.hub.stopping.wait()

    def send_file(self, content: bytes, path: str, headers: dict) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        send = None if self.command == "HEAD" else self.hub.breaks.pop(path, None)
        begin = int(asked[1]) if asked else 0
        if asked:
            headers = headers | {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        self.answer(content[begin:], 206 if asked else 200, headers | {"Accept-Ranges": "bytes"}, send)

    # reading

    def whoami(self) -> None:
        name = self.hub.users.get(self.token)
        self.give({"name": name, "type": "user"}) if name else self.refuse(401, "", "Invalid username or password.")

    def info(self, revision: str = "main") -> None:
        found = self.repo.files(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.give({"id": self.name, "modelId": self.name, "sha": found[0], "private": False, "tags": [],
                          "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, revision: str) -> None:
        found = self.repo.files(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entries = [{"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                   | ({"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                      if path.endswith(LARGE) else {}) for path, content in found[1].items()]
        return self.give(entries)

    def resolve(self, revision: str, path: str) -> None:
        found = self.repo.files(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if not path.endswith(LARGE):
            return self.send_file(files[path], path, {"X-Repo-Commit": sha, "ETag": f'"{git_oid(files[path])}"'})
        oid = hashlib.sha256(files[path]).hexdigest()
        self.hub.store[oid] = files[path]
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/store/{oid}"
        return self.answer(b"", 302, {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "Location": location,
                                      "X-Linked-Size": str(len(files[path]))})

    def stored(self, oid: str) -> None:
        self.send_file(self.hub.store[oid], self.hub.names()[oid], {"ETag": f'"{oid}"'})

    # writing

    def may_write(self) -> bool:
        if self.token is None or (self.name.split("/")[0] != self.hub.users[self.token]):
            self.refuse(403 if self.token else 401, "", "You don't have the rights to write here")
            return False
        return True

    def validate_yaml(self) -> None:
        import yaml

        content = json.loads(self.body)["content"]
        front = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        known = "base_model base_model_relation datasets library_name license model_name pipeline_tag tags".split()
        errors = [{"message": f'"{key}" is not allowed'} for key in front if key not in known]
        self.give({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.users.get(self.token)
        self.name = f"{owner}/{asked['name']}"
        if not self.may_write():
            return
        exists = ("model", self.name) in self.hub.repos
        if not exists:
            self.hub.add("model", self.name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.hub.repos["model", self.name].private = asked.get("visibility") == "private" or asked.get("private")
        self.give({"url": f"{self.hub.url}/{self.name}", "error": "You already created this"}, 409 if exists else 200)

    def branch(self, revision: str) -> None:
        if self.may_write():
            exists = revision in self.repo.branches
            self.repo.branches.setdefault(revision, self.repo.branches["main"])
            self.refuse(409, "", "Reference already exists") if exists else self.give({})

    def preupload(self, revision: str) -> None:
        if self.may_write():
            files = [file["path"] for file in json.loads(self.body)["files"]]
            self.give({"files": [{"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                                  "shouldIgnore": False} for path in files]})

    def lfs_batch(self) -> None:
        if self.may_write():
            wanted = json.loads(self.body)["objects"]
            upload = lambda o: {"upload": {"href": f"{self.hub.url}/store/{o['oid']}", "header": {}}}
            self.give({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in self.hub.store else {"actions": upload(o)})
                for o in wanted]})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid, "the upload is not what was announced"
        self.hub.store[oid] = self.body
        self.answer(b"")

    def commit(self, revision: str) -> None:
        if not self.may_write():
            return
        files = dict(self.repo.files(revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
        sha = self.repo.commit(files, revision)
        self.give({"commitUrl": f"{self.hub.url}/{self.name}/commit/{sha}", "commitOid": sha})
