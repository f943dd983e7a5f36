"""What an object file asks of the process that loads it."""

import struct

_SYMBOL_TABLE = 2


def undefined_symbols(code: bytes) -> list[str]:
    """Names that a little-endian ELF64 object leaves to others; raises ValueError for another."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("the compiler made no ELF64 object")
    (sections,) = struct.unpack_from("<Q", code, 40)
    size, count = struct.unpack_from("<HH", code, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, sections + size * i) for i in range(count)]
    found = []
    for _, kind, _, _, begin, length, strings, _, _, step in headers:
        if kind != _SYMBOL_TABLE:
            continue
        for at in range(begin + step, begin + length, step):  # the first is none
            name, _, _, section = struct.unpack_from("<IBBH", code, at)
            if section == 0:
                start = headers[strings][4] + name
                found.append(code[start : code.index(0, start)].decode())
    return found
