"""Models written for other libraries: stock sentence-transformers, the layout of NVIDIA, ONNX."""
