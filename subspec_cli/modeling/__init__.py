"""The forward pass: decoder, attention, KV cache and quantized layers. Knows nothing of speculation."""
