"""One operation, several implementations: plain torch, C++ for CPU tensors, Triton for CUDA."""
