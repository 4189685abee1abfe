"""From a config to a run: the only place where config meets classes.

Floor 5.
"""
