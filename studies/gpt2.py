"""The same job by `transformers`: a GPT-2 of the same size, for `speed` to time beside `vsr.GPT`.

The same number of layers, width, heads and positions, a vocabulary of V + 1. Not the same in all:
its heads fill the width (ours may be narrower), its output layer is tied to its embedding, and
its vocabulary has the start token. Parameter counts are kept with the timings.
"""

import importlib.util

import torch
import torch.nn as nn
import torch.nn.functional as F

import vsr


def why_not(config: vsr.GPTConfig) -> str | None:
    """Why there is nothing to compare with, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    if config.width % config.heads:
        return f"a GPT-2 cannot have {config.heads} heads at a width of {config.width}"
    return None


class GPT2(nn.Module):
    """`GPT2LMHeadModel` with the configuration of a `vsr.GPT`, and called like one."""

    def __init__(self, gpt: vsr.GPT):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        config, self.start_token, self.version = gpt.config, gpt.start_token, transformers.__version__
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        self.model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=gpt.start_token + 1, n_positions=gpt.max_tokens, n_embd=config.width,
                n_layer=config.layers, n_head=config.heads, bos_token_id=None, eos_token_id=None, **dropout,
            )
        )  # fmt: skip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) -> logits (B, T, V+1), as `vsr.GPT.forward`."""
        inputs = F.pad(tokens[:, :-1], (1, 0), value=self.start_token)
        return self.model(inputs, use_cache=False).logits

    @torch.no_grad()
    def generate(self, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Prompts (B, P) -> num_tokens tokens, greedy, with the library's own cache: (B, num_tokens)."""
        inputs = F.pad(prompt, (1, 0), value=self.start_token)
        length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        mask = torch.ones_like(inputs)
        written = self.model.generate(inputs, attention_mask=mask, do_sample=False, use_cache=True, **length)
        return written[:, inputs.shape[1] :]
