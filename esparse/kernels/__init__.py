"""Matrix products from packed n:m weights, and what stands around them; Triton on a GPU, plain PyTorch beside it.

The compute form of a matrix of R rows (outputs) and I columns (inputs): `values` (R x K), the survivors of each row in
column order, K of them in every row; `bits` (R x ceil(I / 8), uint8), bit i of byte j is column 8j + i, 1 = survives.
"""
