"""16-bit models from the Hugging Face hub: names, cache, downloads. Knows nothing of how substitutes are made."""
