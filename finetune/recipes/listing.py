"""`finetune optimizers`: what optimizer.name may be.

Floor 5.
"""

from rich.console import Console
from rich.table import Table

from finetune.errors import UserError
from finetune.optim import optimizer_table


def print_optimizers(pattern: str) -> None:
    """One row an optimizer. Raises UserError where the pattern matches none."""
    rows = optimizer_table(pattern)
    if not rows:
        raise UserError(f"no optimizer is called like {pattern!r}; `finetune optimizers` lists them all")
    table = Table()
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
