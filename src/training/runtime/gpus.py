"""GPUs whose peak and memory are known. Imports nothing heavy."""

# Name -> (FLOP/s of 16-bit matrix products without sparsity, bytes of memory), from the vendors' data sheets; the first
# name that occurs in the device's name is used.
GPUS = {
    "B200": (2250e12, 180e9),
    "GH200": (989e12, 96e9),
    "H200": (989e12, 141e9),
    "H100 PCIe": (756e12, 80e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "L4": (121e12, 24e9),
    "A10": (125e12, 24e9),
    "RTX 4090": (165e12, 24e9),
    "RTX 3090": (71e12, 24e9),
}
