"""The GGUF file that llama.cpp, Ollama and their like run, and the Modelfile beside it.

Read `families` (which models, their sizes and tensors), `tokens` (the vocabulary),
`pre_tokenizers` (what cuts a text into words, by llama.cpp's names), `write` (the file) and
`modelfile` (Ollama's). `finetune.models.gguf` is the other way: from a file to a folder.

The layout is that of llama.cpp's own converter (https://github.com/ggml-org/llama.cpp). That one
knows the words of a tokenizer by a hash of what it makes of a test text, which no trimmed tokenizer
gives. Here they are known by their pattern, which trimming leaves as it was.
"""
