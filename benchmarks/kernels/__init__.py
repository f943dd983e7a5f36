"""Time, bytes and arithmetic of the attention kernels, beside the dense kernel of vLLM."""
