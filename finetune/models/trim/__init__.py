"""A model and a tokenizer that hold only the tokens that are used.

Read `merges` (which merges a token needs), `keep` (what any text needs), `tokenizer` (the smaller
tokenizer, renumbered), `renumber` (ids in configs) and `model` (the smaller tables).

**What is exact.** Let derive(t) be the merges that BPE makes on the characters of token t alone,
and K the kept tokens. All parts and results of derive(t) are kept for each t in K, and every old
merge whose parts and result are kept, in the old order. Then a text whose old encoding uses only
tokens of K is encoded the same, with other numbers. No merge crosses the border of a final token,
so inside of it BPE makes derive(t). By induction both tokenizers are in the same state: the best
pair of the old one is among the kept merges, and the candidates of the new one are some of the old.

In any other text, words with a token outside of K are cut finer. The bytes are kept, so every text
decodes to what it decoded to before. The kept rows are the old ones bit for bit, so the logits are
those of the old model, and greedy answers are the same as long as those of the old model stay in K.
"""
