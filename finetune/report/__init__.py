"""The report of a run, written from its files alone."""
