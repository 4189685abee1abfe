"""The pages: report.html of a run and comparison.html of a comparison, made from files alone.

Read in this order:

- `run_page`: which values the page gets;
- `run_facts`: its words and numbers;
- `run_charts`: its curves;
- `svg`: how anything is drawn;
- `html`: how a template is filled in;
- `card`: the model card, which is a page too.

The page of a comparison has the same three files under `comparison_`.

Import `write_report` from here, and `write_comparison` from `finetune.report.comparison_page`.
"""

from finetune.report.run_page import write_report

__all__ = ["write_report"]
