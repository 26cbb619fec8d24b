"""What happens inside a model on one text: attention, the lens on every depth, heads switched off, gradients."""
