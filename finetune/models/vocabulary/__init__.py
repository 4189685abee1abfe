"""The active vocabulary: which rows of a token table train, and the modules that keep the others."""
