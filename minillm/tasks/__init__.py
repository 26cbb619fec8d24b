"""What a finetuned model is for: one class a task, which joins its data, its objective, its metrics and its answers."""
