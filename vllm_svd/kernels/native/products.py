"""Products of one vector and a matrix in machine code; the matrix of any kind, sums in fp32."""

import numpy as np

from vllm_svd.kernels.native.memory import FLOAT32, compiled, floats, widen


@compiled
def times(matrix, kind, stride, rows, width, x, out, spare):
    """out [rows] = matrix [rows, width] x; rows are `stride` bytes apart, `spare` holds one."""
    y, right = floats(out), floats(x)
    for row in range(rows):
        address = matrix + row * stride
        if kind != FLOAT32:
            widen(kind, address, width, spare)
            address = spare
        left = floats(address)
        total = np.float32(0)
        for i in range(width):
            total += left[i] * right[i]
        y[row] = total


@compiled
def times_rows(x, matrix, kind, stride, rows, width, out, spare):
    """out [width] = x [rows] matrix [rows, width]."""
    y, left = floats(out), floats(x)
    for row in range(rows):
        address, factor = matrix + row * stride, left[row]
        if kind != FLOAT32:
            widen(kind, address, width, spare)
            address = spare
        right = floats(address)
        if row == 0:
            for i in range(width):
                y[i] = factor * right[i]
        else:
            for i in range(width):
                y[i] += factor * right[i]
