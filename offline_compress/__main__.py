"""`python -m offline_compress` is offline-compress; torchrun starts it by this name:

torchrun --nproc-per-node 8 -m offline_compress run MODEL OUT --text TEXT
"""

from offline_compress.cli import main

if __name__ == "__main__":
    main()
