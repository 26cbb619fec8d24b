"""Transformers' own models and files, made here: nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported for the first time
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
