"""Model code as a checkpoint would bring it, written for the tests: 360Zhinao's and MiniCPM's shapes, small and plain."""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TinyConfig(PretrainedConfig):
    model_type = "zhinao"


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def rotate(x, theta):
    """Rotary positions of [batch, heads, tokens, dim], halves paired as LLaMA pairs them."""
    tokens, dim = x.shape[-2:]
    angles = torch.arange(tokens)[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.dim = config, config.hidden_size // config.num_attention_heads
        self.groups = config.num_key_value_heads
        if config.model_type == "zhinao":
            width = (config.num_attention_heads + 2 * self.groups) * self.dim
            self.qkv_proj = nn.Linear(config.hidden_size, width)
        else:
            self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.dim, bias=False)
            self.k_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        batch, tokens, _ = x.shape
        each = self.config.num_attention_heads // self.groups
        if hasattr(self, "qkv_proj"):
            fused = self.qkv_proj(x).view(batch, tokens, self.groups, each + 2, self.dim)
            q, k, v = fused[..., :each, :].flatten(2, 3), fused[..., each, :], fused[..., each + 1, :]
        else:
            q, k, v = (layer(x).view(batch, tokens, -1, self.dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, self.config.rope_theta), rotate(k, self.config.rope_theta)
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        mask = torch.full((tokens, tokens), float("-inf")).triu(1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.dim) + mask).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
            }
        )
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.scale = getattr(config, "scale_depth", math.sqrt(config.num_hidden_layers)) / math.sqrt(
            config.num_hidden_layers
        )

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x)) * self.scale
        y = self.post_attention_layernorm(x)
        y = self.mlp["down_proj"](nn.functional.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return x + y * self.scale


class Stack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.scale = getattr(config, "scale_emb", 1.0)

    def forward(self, ids, layers):
        x = self.embed_tokens(ids) * self.scale
        for layer in self.layers[:layers]:
            x = layer(x)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear_head = nn.Linear(size, 1, bias=False)


class TinyForCausalLM(PreTrainedModel):
    """Scores as the two originals do: 360Zhinao's one scalar a sequence, MiniCPM's one a token after a chosen layer."""

    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Stack(config)
        if config.model_type == "zhinao":
            self.linear = nn.Linear(config.hidden_size, 1, bias=False)
        else:
            heads = config.num_hidden_layers + 1 - config.start_layer
            self.lm_head = nn.ModuleList([Head(config.hidden_size) for _ in range(heads)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, cutoff_layers=None, **_):
        if cutoff_layers is None:
            states = self.model(input_ids, self.config.num_hidden_layers)
            answers = (labels != -100).long().cumsum(1)
            place = (answers == answers[:, -1:] - 2).int().argmax(1)  # the label, two before the last known one
            return CausalLMOutputWithPast(logits=self.linear(states[torch.arange(len(place)), place - 1]).squeeze(1))
        states = self.model(input_ids, cutoff_layers[0])
        head = self.lm_head[cutoff_layers[0] - self.config.start_layer].linear_head
        return CausalLMOutputWithPast(logits=(head(states).flatten(1),))
