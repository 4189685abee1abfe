"""`finetune export`: a model as a plain folder, trimmed to its tokens, and as a GGUF file.

`export` is the command. `source` opens what is exported, `trim` chooses the tokens that are kept,
`coverage` measures what they cover, and `ship` writes the GGUF file and its Modelfile.
"""
