"""The integrations import no library that they serve, and the package does not import them."""

from tests.test_architecture import imports, modules

SERVED = {
    "transformers",
    "trl",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "ultralytics",
    "torchvision",
}
IMPORTS = {name: imports(path) for name, path in modules().items()}
OURS = {name: found for name, found in IMPORTS.items() if name.split(".")[0] == "integrations"}


def test_no_served_library_is_imported():
    assert set(OURS) == {"integrations"} | {
        f"integrations.{name}"
        for name in ("accelerate", "hugging_face", "lightning", "ultralytics")
    }
    assert {library.split(".")[0] for found in OURS.values() for library in found} & SERVED == set()


def test_the_core_does_not_know_them():
    knowing = {
        name
        for name, found in IMPORTS.items()
        if any(imported.startswith("finetune.integrations") for imported in found)
    }
    assert knowing == {"integrations.hugging_face"}  # which uses its neighbour
