import torch

# A model's precision, `recovery.products`, and the precision of the training's products.
PRODUCTS = [
    (torch.bfloat16, "auto", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32),
    (torch.float16, "auto", torch.float32),
    (torch.float32, "auto", torch.float32),
]
