"""Head, body and tail."""

import torch

from finetune.comparison.frequency import BINS, bins_of


def test_bins_are_cut_by_the_share_of_the_training_targets():
    counts = torch.tensor(
        [1, 50, 0, 9, 25, 15]
    )  # of 100: id 1 is half of all; 4 and 5 reach 90; 3 and 0 are the last ten
    assert bins_of(counts).tolist() == [2, 0, 2, 2, 1, 1]
    assert BINS == ("head", "body", "tail")


def test_one_token_that_is_everything_is_the_head():
    assert bins_of(torch.tensor([0, 7])).tolist() == [2, 0]
