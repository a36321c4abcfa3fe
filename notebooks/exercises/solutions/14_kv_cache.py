# %% [markdown]
# # 14. The KV cache
#
# **45 minutes. You need:** exercise 5. **You learn:** why a new token does not cost the whole prefix again.
#
# To generate token $t$ the model attends over all positions up to $t$. Their keys and values do not change
# any more, since the mask lets no position see a later one. So they are computed once and kept. A step then
# computes a single query, key and value.
#
# $$q_t = x_t W_q, \quad k_t = x_t W_k, \quad v_t = x_t W_v, \qquad
# y_t = \sum_{s \le t} \text{softmax}_s\!\Big(\frac{\langle q_t, k_s \rangle}{\sqrt d}\Big)\, v_s$$
#
# **Write** `decode_step(x, W_q, W_k, W_v, cache, t)`, one step of one attention head.
#
# - `x`: float32 `(B, C)`, the inputs at position t, one a sequence. `W_q`, `W_k`, `W_v`: float32 `(C, d)`.
# - `cache`: float32 `(2, B, T_max, d)`, `cache[0]` for keys and `cache[1]` for values. It was allocated once,
#   for T_max positions. Rows 0 to t - 1 hold what earlier steps wrote. Row t and the rows after it hold any
#   old numbers.
# - `t`: the position, an int from 0 to T_max - 1.
# - The step writes key and value of `x` into row t of the cache, **in place**, and touches no other row.
# - The result: $y_t$, float32 `(B, d)`. A position sees itself, so row t counts. What stands after row t must
#   not count.
#
# It is in [`Attention` in `vsr.py`](../../vsr.py), with several heads. Try first, then compare.
#
# <details><summary>Hint</summary>
#
# Write first, then look. After that `cache[0, :, : t + 1]` is `(B, t + 1, d)`: all keys that count. With
# `q[:, None]`, `(B, 1, d)`, the scores are one batched matrix product, `(B, 1, t + 1)`.
#
# </details>

# %%
import sys
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "vsr.py").is_file())
sys.path[:0] = [str(root), str(root / "notebooks" / "exercises")]

# %%
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F


# %%
def decode_step(
    x: torch.Tensor, W_q: torch.Tensor, W_k: torch.Tensor, W_v: torch.Tensor, cache: torch.Tensor, t: int
) -> torch.Tensor:
    """One position: x (B, C), weights (C, d), cache (2, B, T_max, d), of which row t is written -> (B, d)."""
    # BEGIN SOLUTION
    cache[0, :, t], cache[1, :, t] = x @ W_k, x @ W_v
    keys, values = cache[:, :, : t + 1]  # (B, t+1, d) each
    q = (x @ W_q)[:, None] / W_q.shape[1] ** 0.5  # (B, 1, d)
    weights = (q @ keys.transpose(1, 2)).softmax(-1)  # (B, 1, t+1)
    return (weights @ values)[:, 0]
    # END SOLUTION


# %%
from checks import check_kv_cache

check_kv_cache(decode_step)

# %% [markdown]
# What it saves. Without a cache each step runs attention over the whole prefix again, with all its queries,
# keys and values.

# %%
B, C, d = 8, 64, 64
generator = torch.Generator().manual_seed(0)
W_q, W_k, W_v = [torch.randn(C, d, generator=generator) / 8 for _ in range(3)]
lengths, seconds = [32, 64, 128, 256], {"with a cache": [], "without": []}
for T in lengths:
    x = torch.randn(B, T, C, generator=generator)
    cache = torch.zeros(2, B, T, d)
    began = time.perf_counter()
    with_cache = torch.stack(
        [decode_step(x[:, t], W_q, W_k, W_v, cache, t) for t in range(T)], dim=1
    )  # (B, T, d)
    seconds["with a cache"].append(time.perf_counter() - began)
    began = time.perf_counter()
    for t in range(T):
        prefix = x[:, : t + 1]  # (B, t+1, C)
        without = F.scaled_dot_product_attention(
            prefix @ W_q, prefix @ W_k, prefix @ W_v, is_causal=True
        )  # (B, t+1, d)
    seconds["without"].append(time.perf_counter() - began)
    assert torch.allclose(with_cache, without, atol=1e-4)
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, values in seconds.items():
    axis.loglog(lengths, values, "o-", label=name)
axis.minorticks_off()
axis.set_xticks(lengths, lengths)
axis.set(xlabel="length of the sequence", ylabel="seconds for all its steps")
axis.legend()
plt.show()

# %% [markdown]
# ## Where this is in the project
#
# `forward` of [`Attention` in `vsr.py`](../../vsr.py) writes the cache, and `generate` of
# [`GPT` in `vsr.py`](../../vsr.py) allocates it, one for all layers. There the whole cache goes into
# attention, with a mask, since slices of it would be copied at every step. The test
# `test_cached_generation_is_uncached_generation` in [`tests/test_vsr.py`](../../tests/test_vsr.py) is what
# your check does, for a whole model.
#
# **Go further.** How many bytes does the cache of a backbone with 24 layers, width 1024 and 4 images of 256
# tokens take in bfloat16, per sentence? Why does the refiner need no cache?
