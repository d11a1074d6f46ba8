"""GGUF, the file format of llama.cpp: read as a Hugging Face folder, written from a model."""
