"""A run's folder and its records, and how their figures are written for a person."""
