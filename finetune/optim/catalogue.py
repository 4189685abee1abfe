"""The optimizers that come with the factory, one entry each.

A plain name means the rule of its paper: `sgd` has no momentum, `adam` no decoupled decay. The
class is torch's own if torch has one. Aliases are the spellings of Hugging Face's `optim=` and of
timm, if they mean the same rule.

torch's fused kernel is chosen if it pays. Milliseconds a step, default / fused, for 30 M float32
parameters on one AVX2 thread: AdamW 134 / 19, Adam 58 / 18, SGD 8.5 / 12.6. Fused SGD and Adagrad
also refuse sparse gradients.
"""

from finetune.optim.registry import register_optimizer

register_optimizer(
    "sgd",
    "torch.optim:SGD",
    what="stochastic gradient descent: no momentum",
    paper="https://doi.org/10.1214/aoms/1177729586",
    sparse="exact",
    state_bytes=0,
    fixed={"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    scale_free=False,
)
register_optimizer(
    "momentum",
    "torch.optim:SGD",
    what="SGD with heavy-ball momentum",
    paper="https://doi.org/10.1016/0041-5553(64)90137-5",
    sparse="exact",
    state_bytes=4,
    aliases=("sgd_momentum",),
    preset={"momentum": 0.9},
    fixed={"nesterov": False},
    scale_free=False,
)
register_optimizer(
    "nesterov",
    "torch.optim:SGD",
    what="SGD with Nesterov's accelerated momentum",
    paper="https://proceedings.mlr.press/v28/sutskever13.html",
    sparse="exact",
    state_bytes=4,
    aliases=("sgd_nesterov",),
    preset={"momentum": 0.9},
    fixed={"dampening": 0.0, "nesterov": True},
    scale_free=False,
)
register_optimizer(
    "adagrad",
    "torch.optim:Adagrad",
    what="SGD with each element's step divided by the root of the sum of its squared gradients",
    paper="https://jmlr.org/papers/v12/duchi11a.html",
    sparse="exact",
    state_bytes=4,
)
register_optimizer(
    "rmsprop",
    "torch.optim:RMSprop",
    what="SGD with each element's step divided by a running root mean square of its gradients",
    paper="https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf",
    state_bytes=4,
)
register_optimizer(
    "adam",
    "torch.optim:Adam",
    what="running mean over running root mean square, bias-corrected; weight decay is L2",
    paper="https://arxiv.org/abs/1412.6980",
    state_bytes=8,
    fixed={"decoupled_weight_decay": False},
    fused_pays=True,
)
register_optimizer(
    "adamw",
    "torch.optim:AdamW",
    what="Adam with decoupled weight decay",
    paper="https://arxiv.org/abs/1711.05101",
    state_bytes=8,
    aliases=("adamw_torch", "adamw_torch_fused", "adamw_hf"),
    fused_pays=True,
)
register_optimizer(
    "sparse_adam",
    "torch.optim:SparseAdam",
    what="Adam for row-sparse gradients only: rows without a gradient stay frozen; no weight decay",
    paper="https://arxiv.org/abs/1412.6980",
    sparse="lazy",
    state_bytes=8,
    takes_dense=False,
)
register_optimizer(
    "lazy_adamw",
    "finetune.optim.lazy.adamw:LazyAdamW",
    what="AdamW that updates only used embedding rows, with the same result; "
    "keeps state only for rows seen so far",
    paper="https://arxiv.org/abs/1711.05101",
    sparse="exact",
    state_bytes=8,
    must_know="embeddings",
    rule="adamw",
)
register_optimizer(
    "adamw_8bit",
    "bitsandbytes.optim:AdamW8bit",
    what="AdamW with its state quantised in blocks to 8 bits",
    paper="https://arxiv.org/abs/2110.02861",
    state_bytes=2.04,
    aliases=("adamw_bnb_8bit", "bnb_adamw8bit"),
)
register_optimizer(
    "adafactor",
    "torch.optim:Adafactor",
    what="Adam without a first moment; keeps one vector of second moments per side of a matrix",
    paper="https://arxiv.org/abs/1804.04235",
    state_bytes=0.0079,
)
register_optimizer(
    "lion",
    "finetune.optim.lion:Lion",
    what="the sign of an interpolated momentum; "
    "needs an lr 3 to 10 times smaller than AdamW's, and a weight_decay as much larger",
    paper="https://arxiv.org/abs/2302.06675",
    state_bytes=4,
    aliases=("lion_32bit",),
)
register_optimizer(
    "muon",
    "finetune.optim.muon:MuonWithAdamW",
    what="orthogonalised momentum for hidden matrices, AdamW for the rest",
    paper="https://kellerjordan.github.io/posts/muon/",
    state_bytes=4,
    fused_pays=True,
    must_know="hidden matrices",
)
register_optimizer(
    "schedule_free_adamw",
    "schedulefree:AdamWScheduleFree",
    what="AdamW with averaging in place of a decaying lr; "
    "call optimizer.train() and optimizer.eval() when you call the model's",
    paper="https://arxiv.org/abs/2405.15682",
    state_bytes=8,
    aliases=("adamw_schedule_free",),
    second_weights=True,
)
