"""Datasets, prompts and answers: from a source to checked rows, and from a completion to right or wrong.

Owns the sources (file, Hub, built-in arithmetic), the prompt templates, and the comparison of answers,
which runs in a process of its own because a hostile answer can take minutes. Imports no torch.

Read first: `datasets`, then `answers`.
"""
