"""SmolLM2 in the Hugging Face layout, made from a GGUF file."""
