"""CPU kernels and what decides which of them compute."""
