"""Element types of stored tensors, in safetensors' spelling, and their sizes."""

DTYPE_BYTES = {
    **{"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "I32": 4},
    **{"I64": 8, "F8_E4M3": 1},  # of weights that other methods quantised
}
MODEL_DTYPES = ("BF16", "F16", "F32")
