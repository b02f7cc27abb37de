"""Repositories in memory, and what the Hub's API says of them."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".faiss", ".npy", ".arrow", ".png", ".jpg")
LFS_BYTES = 10_000_000
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer other than 200; `code` becomes the header that tells huggingface_hub what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: str):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass(frozen=True)
class Blob:
    """One version of a file. Its ETag is what the Hub's is: the sha256 of an LFS file, else git's sha1."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        content = self.content
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = pointer.encode()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def describe(self, path: str) -> dict:
        described = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            described["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return described


@dataclass
class Commit:
    files: dict[str, Blob]
    title: str
    message: str
    parent: str | None
    author: str

    def sha(self) -> str:
        files = {path: blob.etag for path, blob in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([files, self.title, self.parent]).encode()).hexdigest()


@dataclass
class Repository:
    """A repository; `refs` are commits by full name: `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`."""

    id: str
    owner: str
    private: bool
    url: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": Blob(attributes.encode(), False)}
        self.add_commit("refs/heads/main", Commit(files, "initial commit", "", None, self.owner))

    def resolve(self, revision: str) -> str:
        """Commit hash of a branch, a tag, a full reference or a hash."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if revision in self.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def at(self, revision: str) -> Commit:
        return self.commits[self.resolve(revision)]

    def add_commit(self, ref: str, commit: Commit) -> str:
        sha = commit.sha()
        self.commits[sha] = commit
        self.refs[ref] = sha
        return sha

    def set_ref(self, ref: str, revision: str) -> dict:
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.resolve(revision)
        return {}

    def delete_ref(self, ref: str) -> dict:
        if self.refs.pop(ref, None) is None:
            raise HubError(404, f"No such reference: {ref}", "RevisionNotFound")
        return {}

    def squash(self, branch: str, title: str) -> dict:
        """One commit in the place of a branch's history; what no reference leads to is gone."""
        last = self.at(branch)
        self.add_commit(f"refs/heads/{branch}", Commit(last.files, title, "", None, last.author))
        reachable = set()
        for sha in self.refs.values():
            while sha is not None and sha not in reachable:
                reachable.add(sha)
                sha = self.commits[sha].parent
        self.commits = {sha: commit for sha, commit in self.commits.items() if sha in reachable}
        return {}

    def lfs_blob(self, sha256: str) -> Blob | None:
        """An LFS file of any commit by its hash."""
        blobs = (blob for commit in self.commits.values() for blob in commit.files.values() if blob.is_lfs)
        return next((blob for blob in blobs if blob.sha256 == sha256), None)

    # ------------------------------------------------------------------ what the API answers

    def info(self, revision: str) -> dict:
        siblings = [{"rfilename": path} for path in sorted(self.at(revision).files)]
        stated = {"id": self.id, "author": self.id.split("/")[0], "sha": self.resolve(revision), "tags": []}
        card = self.at(revision).files.get("README.md")
        text = "" if card is None else card.content.decode()
        licenses = re.findall(r"^license: (.*)$", text, re.MULTILINE)
        if licenses:  # of the card's metadata; the standard library does not read YAML
            names = licenses[0].strip("[]").split(", ")
            stated["cardData"] = {"license": names if len(names) > 1 else names[0]}
        files = re.findall(r"^- config_name: (.*)\n  data_files: (.*)$", text, re.MULTILINE)
        if files:
            stated["cardData"] = {"configs": [{"config_name": name, "data_files": files} for name, files in files]}
        return {**stated, "private": self.private, "siblings": siblings, "lastModified": DATE}

    def list_refs(self) -> dict:
        found = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, sha in self.refs.items():
            prefix = next(prefix for prefix in kinds if ref.startswith(prefix))
            found[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        return found

    def history(self, revision: str) -> list[dict]:
        entries, sha = [], self.resolve(revision)
        while sha is not None:
            commit = self.commits[sha]
            texts = {"title": commit.title, "message": commit.message, "date": DATE}
            entries.append({"id": sha, "authors": [{"user": commit.author}], **texts})
            sha = commit.parent
        return entries

    def tree(self, revision: str, folder: str, recursive: bool, expand: bool) -> list[dict]:
        """Files and folders under `folder` ("" is all)."""
        commit, prefix, entries = self.at(revision), folder + "/" if folder else "", {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries.setdefault(name, {"type": "directory", "path": name, "oid": oid, "size": 0})
            if recursive or len(parts) == 1:
                entries[path] = blob.describe(path)
        if not entries and folder:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if expand:
            last = {"id": self.resolve(revision), "title": commit.title, "date": DATE}
            entries = {path: {**entry, "lastCommit": last} for path, entry in entries.items()}
        return list(entries.values())

    def paths_info(self, revision: str, paths: list[str], expand: bool) -> list[dict]:
        entries = {entry["path"]: entry for entry in self.tree(revision, "", True, expand)}
        return [entries[path] for path in (path.strip("/") for path in paths) if path in entries]

    def preupload(self, revision: str, files: list[dict]) -> dict:
        present, answers = self.at(revision).files, []
        for file in files:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": present[file["path"]].etag if file["path"] in present else None})
        return {"files": answers}

    def lfs_batch(self, objects: list[dict], upload_url: str) -> dict:
        answers = []
        for item in objects:
            upload = {} if self.lfs_blob(item["oid"]) else {"upload": {"href": f"{upload_url}/{item['oid']}"}}
            answers.append({**item, "actions": upload} if upload else item)
        return {"transfer": "basic", "objects": answers}

    def commit(self, user: str, revision: str, lines: list[dict], uploads: dict[str, bytes], as_pr: bool) -> dict:
        """One commit of the lines that huggingface_hub sends; `uploads` are LFS files by hash."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        parent = self.resolve(revision)
        files, header = dict(self.commits[parent].files), {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
                if value.get("parentCommit") not in (None, parent):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                blob = Blob(uploads[value["oid"]], True) if value["oid"] in uploads else self.lfs_blob(value["oid"])
                if blob is None:
                    raise HubError(400, f"The LFS object {value['oid']} was not uploaded")
                files[value["path"]] = blob
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:  # deletedFolder
                prefix = value["path"].rstrip("/") + "/"
                files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
        commit = Commit(files, header["summary"], header.get("description", ""), parent, user)
        answer = {"success": True}
        if as_pr:
            number = sum(name.startswith("refs/pr/") for name in self.refs) + 1
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/discussions/{number}"
        sha = self.add_commit(ref, commit)
        return {**answer, "commitOid": sha, "commitUrl": f"{self.url}/commit/{sha}"}
