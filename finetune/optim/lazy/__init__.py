"""AdamW for embeddings whose rows cost time only when a batch uses them, with dense AdamW's result.

Read adamw (the optimizer), embedding and lookup, table (what both do to one weight, with state and
scratch), missed_steps and gauss (the mathematics), and weight with functions (what other code
sees of it); then saved, dense, eligible and convert.

    ids [[7, 3, 3]]:        rows 3 and 7 of the weight [V, d], stored as of steps 4 and 9
    forward after step 9:   both brought up to step 9 -> values [1, 3, d]; nothing is stored
    backward:               weight.grad is sparse [V, d] and holds rows 3 and 7
    step 10:                both brought up to 9, moved by step 10, stored; other rows cost nothing
"""
