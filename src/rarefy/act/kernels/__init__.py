"""How it is computed: native kernels, plain PyTorch operators, operators without a view of bits, Triton; one result."""
