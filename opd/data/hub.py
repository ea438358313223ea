"""Models of the Hugging Face hub as local folders: `parse(name) -> Repository`, `snapshot(repository)` is a folder.

A model is downloaded in two parts: `snapshot` fetches configuration, tokenizer and code, `fetch` the weights.  A model
that is refused for its tokens costs no gigabytes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id

from opd.core.disk import nearest
from opd.core.errors import one_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A name that ends in one of these is a file of weights, never a hub id.
WEIGHTS = (*PICKLES, ".gguf", ".safetensors", ".h5", ".msgpack", ".onnx")
SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
# Folders of a repository hold other checkpoints and formats; only code and chat templates are read from there.
NESTED = ["*/*.json", "*/*.txt", "*/*.model"]
CONFIGS = ("config.json", "adapter_config.json")
HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}  # the hub's version decides which it uses


class Missing(Exception):
    """A model or data set that is not available; the text says why and what to do."""


@dataclass(frozen=True)
class Repository:
    """A hub id, and a branch, tag or commit of it; an empty revision is the default branch."""

    id: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def parse(name: str) -> Repository | None:
    """Read owner/name or owner/name@revision; None where the name cannot be a hub id."""
    repo_id, separator, revision = name.partition("@")
    if repo_id.count("/") != 1 or bool(separator) != bool(revision) or repo_id.lower().endswith(WEIGHTS):
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return None
    return Repository(repo_id, revision)


class _NoBar(tqdm):
    """A progress bar that is never displayed, because the small files take no time."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": True})


def snapshot(repository: Repository) -> tuple[Path, str]:
    """Return the local folder of a repository, all but its weights in it, and its commit; raises Missing."""
    revision = repository.revision or None
    try:
        path = snapshot_download(
            repository.id, revision=revision, allow_patterns=SMALL, ignore_patterns=NESTED, tqdm_class=_NoBar
        )
    except Exception as error:  # networks and proxies fail with many unrelated types
        # Another program may have cached the files that it needs, and not all that the repository has.
        path = _cached_folder(repository.id, revision) if isinstance(error, LocalEntryNotFoundError) else ""
        if not path:
            raise Missing(reason(error, repository)) from error
    folder = Path(path)
    if not any((folder / name).is_file() for name in CONFIGS):
        raise Missing(
            f"{repository} has no config.json: it holds no model that transformers can read; of a GGUF repository "
            "download one file and name that"
        )
    return folder, folder.name


def _cached_folder(repo_id: str, revision: str | None) -> str:
    """Return the cached folder of a repository, complete or not; "" if none is cached."""
    files = (try_to_load_from_cache(repo_id, name, revision=revision) for name in CONFIGS)
    return next((os.path.dirname(file) for file in files if isinstance(file, str)), "")


def fetch(repository: Repository, files: Sequence[str]) -> None:
    """Download some files of a repository into its snapshot folder; raises Missing."""
    try:
        available = HfApi().list_repo_files(repository.id, revision=repository.revision)
        absent = sorted(set(files) - set(available))
        if not absent:
            snapshot_download(repository.id, revision=repository.revision, allow_patterns=list(files))
    except Exception as error:  # networks, proxies and disks fail with many unrelated types
        raise Missing(f"its weights are not here: {reason(error, repository)}") from error
    if absent:
        raise Missing(no_safetensors(absent[0], available))


def no_safetensors(missing_file: str, available: Sequence[str]) -> str:
    """Return which file of weights is missing, and whether the repository has a pickle instead."""
    pickles = sorted(name for name in available if name.removesuffix(".index.json").endswith(PICKLES))
    others = sorted(name for name in available if name.endswith((".safetensors", ".gguf")))
    if others and not pickles:
        return f"there is no {missing_file} in it, beside {others[0]}: download it again, or name a .gguf file itself"
    if not pickles:
        return f"there is no {missing_file} in it: no weights to load"
    return (
        f"its weights are a pickle ({pickles[0]}), which can run any code, and opd loads safetensors only: save it "
        "again as safetensors (save_pretrained), or name the revision of a conversion, such as owner/name@refs/pr/1"
    )


def reason(error: BaseException, repository: Repository, *, dataset: bool = False) -> str:
    """Return why neither the hub nor its cache has a repository; libraries wrap the cause several times."""
    causes = [error]
    while cause := causes[-1].__cause__ or (None if causes[-1].__suppress_context__ else causes[-1].__context__):
        causes.append(cause)
    was_raised = lambda *types: any(isinstance(cause, types) for cause in causes)
    page = f"https://huggingface.co/{'datasets/' if dataset else ''}{repository.id}"
    cache = "the cache" if dataset else f"the cache ({constants.HF_HUB_CACHE})"
    command = f"hf download {repository.id}" + (f" --revision {repository.revision}" if repository.revision else "")
    otherwise = "name a local file" if dataset else f"run `{command}` where there is a network"
    if was_raised(GatedRepoError):
        return (
            f"{repository.id} is gated on the hub and needs a token: accept its terms at {page}, then run "
            "`hf auth login` or export HF_TOKEN"
        )
    if was_raised(RepositoryNotFoundError):
        return (
            f"the hub has no {repository.id}: correct the name, or, if it is private, run `hf auth login` or export "
            "HF_TOKEN"
        )
    if was_raised(RevisionNotFoundError):
        return f"the hub has {repository.id}, but no revision {repository.revision!r} of it: see {page}/tree/main"
    offline = constants.HF_HUB_OFFLINE and was_raised(LocalEntryNotFoundError, ConnectionError)
    if offline or was_raised(OfflineModeIsEnabled):
        return (
            f"{repository} is not in {cache}, and HF_HUB_OFFLINE forbids downloading it: unset the variable, or "
            f"{otherwise}"
        )
    if http := next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None):
        return f"the hub does not give {repository}: {one_line(http)}"
    libraries = {type(cause).__module__.partition(".")[0] for cause in causes}
    if was_raised(LocalEntryNotFoundError, ConnectionError, TimeoutError) or libraries & HTTP_LIBRARIES:
        return (
            f"{repository} is not in {cache}, and the hub cannot be reached "
            f"({type(causes[-1]).__name__}: {one_line(causes[-1])}): check the network, or name a local copy"
        )
    return one_line(error.__cause__ or error)


def no_path(path: Path, kind: str = "folder") -> str:
    """Return the beginning of a message about a missing hub id, which may have been meant as a path."""
    return f"there is no such {kind} here{nearest(path) if path.parent.is_dir() else ''}, and "
