"""Engines other than our own, behind the same protocol: a server's address, vLLM, llama.cpp, OpenVINO, ONNX Runtime."""
