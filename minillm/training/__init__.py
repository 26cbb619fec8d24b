"""Pretraining and finetuning: one loop."""
