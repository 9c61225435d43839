"""A 16-bit model on disk: its config, tensor table and shape. Knows nothing of the hub or of substitutes."""
