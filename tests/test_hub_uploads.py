"""Saved files go to a hub and states come back from it: huggingface_hub itself, talking to a small hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import runs
from huggingface_hub import HfApi, constants
from runs import CASES, Workspace
from safetensors.torch import load_file

from library.errors import UserError
from library.hub import HubPath, HubUploads, fetch_state, hub_api
from library.option_groups import HubOptions, NetworkTrainOptions, StateOptions
from library.option_rules import check_rules

COMMIT = "a" * 40
TOKEN = "hf_token"


class TinyHub(ThreadingHTTPServer):
    """Of the hub's interface what uploading small files, and fetching a snapshot, ask for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files: dict[str, dict[str, bytes]] = {}
        """Of each repository, by path."""
        self.made: list[dict[str, Any]] = []
        self.refuses = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def api(self) -> HfApi:
        return hub_api(HubOptions(huggingface_token=TOKEN))


class _Requests(BaseHTTPRequestHandler):
    server: TinyHub

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses or self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": "the hub is tired"}, 400)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.server.files.setdefault(f"{self.server.made[-1]['organization']}/{self.server.made[-1]['name']}", {})
            return self._answer({"url": "http://127.0.0.1/me/loras"})
        repository = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                value = entry["value"]
                self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
        return self._answer({"commitUrl": f"http://127.0.0.1/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/[^/]+", path)
        if listed and listed[1] in self.server.files:
            names = sorted(self.server.files[listed[1]])
            if listed[2] == "revision":
                return self._answer({"id": listed[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            files = self.server.files[listed[1]]
            entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": _oid(files[n])} for n in names]
            return self._answer(entries)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = self.server.files.get(resolved[1], {}).get(resolved[2]) if resolved else None
        if content is None:
            return self._answer({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        return self._answer(content, **{"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def tiny_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with TinyHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        resolved = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolved)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["flux"], tmp_path_factory.mktemp("flux"))


def test_a_run_uploads_what_it_saves_and_another_goes_on_from_there(
    workspace: Workspace, tmp_path: Path, tiny_hub: TinyHub
) -> None:
    common = [
        "--max_train_steps=3",
        "--save_every_n_steps=2",
        "--save_state",
        "--save_last_n_steps=1",
        f"--huggingface_token={TOKEN}",
    ]
    where = ["--huggingface_repo_id=me/loras", "--huggingface_path_in_repo=runs/one", "--async_upload"]
    whole = workspace.train("network", tmp_path / "whole", *common, *where, "--save_state_to_huggingface")
    assert [(repo["organization"], repo["name"], repo["visibility"]) for repo in tiny_hub.made] == [("me", "loras", "private")]
    files = tiny_hub.files["me/loras"]
    for name in ("tiny.safetensors", "tiny-state/optimizer.pt", "tiny-step00000002-state/manifest.json"):
        assert files[f"runs/one/{name}"] == (whole / name).read_bytes()
    assert "runs/one/tiny-step00000002.safetensors" in files

    state = "--resume=me/loras/runs/one/tiny-step00000002-state:main"
    resumed = workspace.train("network", tmp_path / "resumed", *common, "--resume_from_huggingface", state)
    ends = [load_file(folder / "tiny-state" / "trainable.safetensors") for folder in (whole, resumed)]
    runs.assert_same_tensors(*ends)


def test_an_upload_that_fails_ends_nothing_and_says_how_to_do_it_by_hand(
    tmp_path: Path, tiny_hub: TinyHub, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = HubUploads(HubOptions(huggingface_repo_id="me/loras", huggingface_repo_visibility="public"), tiny_hub.api)
    assert tiny_hub.made[0]["visibility"] == "public"
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    tiny_hub.refuses = True
    uploads.send_model(tmp_path / "a.safetensors")
    assert f"hf upload me/loras {tmp_path}/a.safetensors a.safetensors" in caplog.text
    tiny_hub.refuses = False
    uploads.send_model(tmp_path / "a.safetensors")
    uploads.send_state(tmp_path)  # not asked for
    assert tiny_hub.files["me/loras"] == {"a.safetensors": b"weights"}


def test_a_hub_that_cannot_be_used_ends_the_run_before_anything_is_loaded(
    workspace: Workspace, tmp_path: Path, tiny_hub: TinyHub
) -> None:
    tiny_hub.refuses = True
    with pytest.raises(UserError, match=r"--huggingface_repo_id me/loras: the hub says"):
        workspace.train("network", tmp_path / "out", "--huggingface_repo_id=me/loras", f"--huggingface_token={TOKEN}")
    api = tiny_hub.api
    tiny_hub.shutdown()
    tiny_hub.server_close()
    with pytest.raises(UserError, match=r"--huggingface_repo_id me/loras: the hub says"):
        HubUploads(HubOptions(huggingface_repo_id="me/loras"), api)


def test_a_place_on_the_hub_has_a_repository_a_folder_and_perhaps_a_revision_and_a_type() -> None:
    assert HubPath.parse("me/loras/last-state") == HubPath("me/loras", "last-state", None, None)
    assert HubPath.parse("me/loras/a/b-state:v1") == HubPath("me/loras", "a/b-state", "v1", None)
    assert HubPath.parse("me/loras/b-state:main:dataset") == HubPath("me/loras", "b-state", "main", "dataset")
    for wrong in ("", "loras", "me/loras", "me/loras/:main", "me/loras/a:b:c:d"):
        with pytest.raises(UserError, match="owner/name/last-state"):
            HubPath.parse(wrong)


def test_a_state_that_is_not_there_names_those_that_are(tiny_hub: TinyHub) -> None:
    tiny_hub.files["me/loras"] = {"runs/last-state/train_state.json": b"{}", "README.md": b""}
    with pytest.raises(UserError, match=r"no folder runs/lst-state. There are: runs/last-state. Did you mean"):
        fetch_state("me/loras/runs/lst-state", tiny_hub.api)
    with pytest.raises(UserError, match="no such repository"):
        fetch_state("me/nothing/last-state", tiny_hub.api)


def test_flags_of_the_hub_that_contradict_each_other_are_told() -> None:
    with pytest.raises(UserError, match="--resume_from_huggingface needs --resume owner/name/folder"):
        check_rules(NetworkTrainOptions(hub=HubOptions(resume_from_huggingface=True), state=StateOptions(resume="auto")))
