"""The report of a run, written from its files alone."""

from finetune.report.run_page import write_report

__all__ = ["write_report"]
