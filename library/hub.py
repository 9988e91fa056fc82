"""Saved files on the Hugging Face hub: uploaded as they are made, and states to go on from fetched. sd-scripts' flags.

A run never ends because the hub cannot be reached once it has begun: what failed is said, and lies in the output folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError, suggest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from library.option_groups_output import HubOptions

logger = logging.getLogger(__name__)


def hub_api(options: HubOptions) -> HfApi:
    """With `--huggingface_token`, else as whoever is logged in (`hf auth login`)."""
    from huggingface_hub import HfApi

    return HfApi(token=options.huggingface_token)


@contextmanager
def _explained(flag: str, repository: str) -> Iterator[None]:
    """What goes wrong on the way to the hub as a `UserError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{flag} {repository}: the hub has no such repository that you may use. Check the spelling and "
            "--huggingface_token, or log in first (hf auth login)."
        ) from error
    except (errors.HTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled, OSError) as error:  # type: ignore[attr-defined]
        raise UserError(f"{flag} {repository}: the hub says: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class HubUploads:
    """Uploads of one run, one after another; with `--async_upload` beside the training."""

    def __init__(self, options: HubOptions, api: HfApi) -> None:
        """Makes the repository, private unless told otherwise, where there is none. Raises `UserError` where that fails."""
        assert options.huggingface_repo_id is not None
        self.options = options
        self.repository = options.huggingface_repo_id
        self.api = api
        self._background = ThreadPoolExecutor(1, "upload") if options.async_upload else None
        self._under_way: list[Future[None]] = []
        with _explained("--huggingface_repo_id", self.repository):
            api.create_repo(
                self.repository,
                repo_type=options.huggingface_repo_type,
                private=options.huggingface_repo_visibility != "public",
                exist_ok=True,
            )

    @classmethod
    def of(cls, options: HubOptions) -> HubUploads | None:
        """None where no repository is named."""
        return None if options.huggingface_repo_id is None else cls(options, hub_api(options))

    def send_model(self, path: Path) -> None:
        """A saved model's file or folder."""
        if self._background is None:
            self._upload(path)
        else:
            self._under_way.append(self._background.submit(self._upload, path))

    def send_state(self, path: Path) -> None:
        if self.options.save_state_to_huggingface:
            self.send_model(path)

    def settle(self) -> None:
        """Wait for what is under way: files must not change or go before they are uploaded."""
        for upload in self._under_way:
            upload.result()
        self._under_way = []

    def _upload(self, path: Path) -> None:
        place = "/".join(part for part in ((self.options.huggingface_path_in_repo or "").strip("/"), path.name) if part)
        where: dict[str, Any] = {
            "path_in_repo": place,
            "repo_id": self.repository,
            "repo_type": self.options.huggingface_repo_type,
            "commit_message": f"Upload {path.name}",
        }
        try:
            with _explained("--huggingface_repo_id", self.repository):
                if path.is_dir():
                    self.api.upload_folder(folder_path=path, **where)
                else:
                    self.api.upload_file(path_or_fileobj=path, **where)
        except UserError as error:
            kind = self.options.huggingface_repo_type or "model"
            by_hand = f"hf upload {self.repository} {path} {place} --repo-type {kind}"
            logger.warning("%s was not uploaded, and training goes on: %s. By hand: %s", path, error, by_hand)
        else:
            logger.info("uploaded %s to %s/%s", path, self.repository, place)


@dataclass(frozen=True)
class HubPath:
    """A folder in a repository: `owner/name/folder:revision:type`, of which the last two may be left out, as in sd-scripts."""

    repository: str
    folder: str
    revision: str | None
    kind: str | None

    @classmethod
    def parse(cls, text: str) -> HubPath:
        path, _, rest = text.partition(":")
        revision, _, kind = rest.partition(":")
        names = [name for name in path.split("/") if name]
        if len(names) < 3 or ":" in kind:
            raise UserError(
                f"--resume {text}: with --resume_from_huggingface it names a state's folder in a repository of the hub, as in "
                "owner/name/last-state, with :revision or :revision:type behind it where it is not the newest of a model's."
            )
        return cls("/".join(names[:2]), "/".join(names[2:]), revision or None, kind or None)


def fetch_state(text: str, api: HfApi) -> Path:
    """The state that `text` names, in the hub's cache on this machine. Raises `UserError` where there is none."""
    wanted = HubPath.parse(text)
    with _explained("--resume", text):
        root = api.snapshot_download(
            wanted.repository, repo_type=wanted.kind, revision=wanted.revision, allow_patterns=f"{wanted.folder}/*"
        )
        folder = Path(root) / wanted.folder
        if folder.is_dir():
            return folder
        names = api.list_repo_files(wanted.repository, repo_type=wanted.kind, revision=wanted.revision)
    states = sorted({str(Path(name).parent) for name in names if Path(name).name == "train_state.json"})
    there = f" There are: {', '.join(states)}.{suggest(wanted.folder, states)}" if states else " It has no states."
    raise UserError(f"--resume {text}: {wanted.repository} has no folder {wanted.folder}.{there}")
