"""`finetune optimizers`: what optimizer.name may be."""

from finetune.errors import UserError
from finetune.optim import optimizer_info, optimizer_table

_UNSAID = ("lr", "foreach", "capturable", "differentiable", "fused", "maximize")
"""Options of every optimizer, and how torch carries them out, which changes no result here."""


def print_optimizers(pattern: str) -> None:
    """Print a few lines an optimizer: what it is, and its options with their defaults.

    Raises UserError if no name matches the pattern.
    """
    entries = optimizer_table(pattern)
    if not entries:
        raise UserError(
            f"no optimizer has a name like {pattern!r}. Run `finetune optimizers` to list them all"
        )
    for entry in entries:
        print(f"{entry['name']}: {entry['what']}")
        if entry["available"] == "yes":
            options = optimizer_info(entry["name"]).config_options
            named = (f"{name}={value}" for name, value in options.items() if name not in _UNSAID)
            print(f"    takes {', '.join(named)}")
        else:
            print(f"    not available here: {entry['available']}")
        print(f"    {entry['state bytes per parameter']} bytes of state per parameter")
        print(f"    sparse gradients: {entry['sparse gradients']}")
        print(f"    {entry['paper']}")
