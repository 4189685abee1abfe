"""The arithmetic of a step, in torch alone: no tokenizer, no file, no library of models.

Read `loss` first: the loss without the logits of all tokens. `attention`, `norms` and `gates`
compute the parts of a model in less time or memory. `products` and `subclass` are their tools.
`finetune.models.fuse` puts them into a model.
"""
