"""`finetune optimizers`: what optimizer.name may be.

Floor 5.
"""

from finetune.errors import UserError
from finetune.optim import optimizer_info, optimizer_table


def print_optimizers(pattern: str) -> None:
    """A few lines an optimizer: what it is, its options with their defaults. Raises UserError where the pattern matches none."""
    rows = optimizer_table(pattern)
    if not rows:
        raise UserError(
            f"no optimizer is called like {pattern!r}; `finetune optimizers` lists them all"
        )
    for row in rows:
        print(f"{row['name']}: {row['what']}")
        if row["available"] == "yes":
            options = optimizer_info(row["name"]).config_options
            print(
                "    takes "
                + ", ".join(
                    f"{name}={default}" for name, default in options.items() if name != "lr"
                )
            )
        else:
            print(f"    not available here: {row['available']}")
        print(
            f"    {row['state bytes per parameter']} bytes of state per parameter; sparse gradients: {row['sparse gradients']}"
        )
        print(f"    {row['paper']}")
