"""Export targets, one file each. A quantized model's own checkpoint (AutoAWQ's format) is written by its save_pretrained."""
