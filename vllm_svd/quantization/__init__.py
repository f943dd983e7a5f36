"""vLLM quantization methods: one per artefact of the format."""
