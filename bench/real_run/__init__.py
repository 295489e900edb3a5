"""The real run: SmolLM2-135M-Instruct with LoRA on real preferences."""
