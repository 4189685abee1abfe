"""Rows of any shape become token ids and labels: rows -> format -> examples -> packed rows -> batches."""
