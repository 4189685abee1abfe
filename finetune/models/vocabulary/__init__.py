"""The active vocabulary: a run trains only the rows of the token table that it uses.

A table of 6 tokens of which a run uses 1, 2 and 4, as `activate` changes it in place:

    row   weight [6, d]           row   weight [3, d], trains       frozen [3, d]
    0     a                       0     b  (token 1)                a  (token 0)
    1     b  used                 1     c  (token 2)                d  (token 3)
    2     c  used       ---->     2     e  (token 4)                f  (token 5)
    3     d
    4     e  used                 active_ids [1, 2, 4]   row_of_id [3, 0, 1, 4, 2, 5]
    5     f                       logits = cat(x @ weight.T, x @ frozen.T)[row_of_id]

Read `rows` (the modules), then `activate` (a model with them and without), then `choice`.
"""
