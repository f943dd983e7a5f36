"""Dense and compressed vLLM servers under the same load: HTTP and files only."""
