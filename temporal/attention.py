"""Attention along a line: a transformer, and queries of one stream on the keys of another.

Shape legend: B lines, T rows (S where they are keys), D dims, H heads, E dims of a head.
What mask and start mean is said in lines.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lines import any_in_video, hide, rows_since_start, videos

_QUERIES = (
    1024  # at once, where each pair of rows has a score to add: of a whole video they would fill the memory
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    start: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(E)) v within each video: q, k, v (B, H, T, E) -> (B, H, T, E).

    A row sees the keys that key_mask (B, T) leaves, if `causal` none after itself; zeros where it sees none. What a
    masked key holds must be finite. slopes (H,): how much a head's scores fall with each row between query and key
    (Press et al. 2022, ALiBi, both ways). Cost and memory are those of each video by itself, never of the whole line.
    """
    if start is not None:
        lines: list[list[Tensor]] = [[] for _ in q]
        for i, rows in videos(start):
            seen = None if key_mask is None else key_mask[i : i + 1, rows]
            q_i, k_i, v_i = (x[i : i + 1, :, rows] for x in (q, k, v))
            lines[i].append(attend(q_i, k_i, v_i, seen, causal=causal, dropout=dropout, slopes=slopes))
        return torch.cat([torch.cat(line, dim=2) for line in lines])
    if slopes is not None:
        assert not causal
        parts = enumerate(q.split(_QUERIES, dim=2))
        return torch.cat(
            [_near(part, k, v, key_mask, n * _QUERIES, slopes, dropout) for n, part in parts], dim=2
        )
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    sees = key_mask[:, None, None]
    if causal:
        sees = sees & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    # A softmax over nothing is 0 / 0 in some kernels: a row that sees nothing sees all, and its result is not used.
    blind = ~sees.any(-1, keepdim=True)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=sees | blind, dropout_p=dropout)
    return found.masked_fill(blind, 0)


def _near(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, first: int, slopes: Tensor, dropout: float
) -> Tensor:
    """attend() of the queries from row `first` on, with slopes."""
    rows = torch.arange(k.shape[2], device=k.device)
    apart = (rows[first : first + q.shape[2], None] - rows).abs()
    bias = (-slopes.to(q.dtype)[:, None, None] * apart)[None]
    blind = None
    if key_mask is not None:
        blind = ~key_mask.any(1)[:, None, None, None]
        bias = bias.masked_fill(~(key_mask[:, None, None] | blind), -torch.inf)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return found if blind is None else found.masked_fill(blind, 0)


def positions(place: Tensor, dim: int) -> Tensor:
    """Sines and cosines of place (B, T) -> (B, T, dim) float32 (Vaswani et al. 2017, section 3.5)."""
    period = 10_000 ** (torch.arange(0, dim, 2, device=place.device, dtype=torch.float64) / dim)
    angle = place[..., None] / period  # in float32 row 100,000 would be off by a hundredth
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :dim].float()


class CrossAttention(nn.Module):
    """Queries of one stream on the keys of another, many heads (USTC, "Interactive multimodal fusion", ABAW8).

    near: a head's scores fall with the rows between query and key, by 1/2, 1/8, 1/32, ... a row for head after head:
    nothing else tells a query which of the keys is of its own time, and on puppets what was said stayed unheard
    without it (benchmarks/LOG.md). The paper has none. gate: their code's variant, g * query + (1 - g) * attended with
    g = sigmoid(W [query; attended]) for every dim, instead of what was attended to alone. Raises ValueError where
    `heads` do not divide `dim_query`.
    """

    slopes: Tensor | None

    def __init__(
        self,
        dim_query: int,
        dim_key: int,
        *,
        heads: int,
        dropout: float = 0.0,
        gate: bool = False,
        near: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(dim_query, heads)
        self.dim, self.heads = dim_query, heads
        self.query = nn.Linear(dim_query, dim_query)
        self.key_value = nn.Linear(dim_key, 2 * dim_query)
        self.out = nn.Linear(dim_query, dim_query)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(2 * dim_query, dim_query) if gate else None
        slopes = 2.0 ** -(2 * torch.arange(heads) + 1) if near else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """query (B, T, Dq), key (B, T, Dk), key_mask and start (B, T) -> (B, T, Dq).

        Every row of a video may see every key of it, later ones too. Exactly 0 where a video has no valid key.
        """
        q = _heads(self.query(query), self.heads)
        k, v = (_heads(x, self.heads) for x in self.key_value(hide(key, key_mask)).chunk(2, dim=-1))
        found = attend(q, k, v, key_mask, start, dropout=_rate(self.dropout), slopes=self.slopes)
        attended = self.out(found.transpose(1, 2).flatten(2))
        if self.gate is not None:
            g = torch.sigmoid(self.gate(torch.cat([query, attended], dim=-1)))
            attended = attended + g * (query - attended)
        return hide(attended, any_in_video(key_mask, start))


class Transformer(nn.Module):
    """Pre-norm encoder layers with GELU and a norm at the end; a row sees all valid rows, or if `causal` up to itself.

    Pre-norm, because it needs no warm-up to train (Xiong et al. 2020). The positions are sines, added once and counted
    from each video's first row in the line; there is no table of them, so a line may have any length. The dims stay.
    Raises ValueError where `heads` do not divide them.
    """

    def __init__(
        self,
        dim_in: int,
        *,
        layers: int,
        heads: int,
        ff: int,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(dim_in, heads)
        self.dim = dim_in
        self.layers = nn.ModuleList(_Layer(dim_in, heads, ff, dropout, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(dim_in)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); what a masked row gets is finite and means nothing."""
        x = hide(x, mask)
        place = torch.arange(x.shape[1], device=x.device)[None] if start is None else rows_since_start(start)
        x = x + positions(place, self.dim).to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask, start)
        return self.norm(x)


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + ff(norm(x))."""

    def __init__(self, dim: int, heads: int, ff: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ff1, self.ff2 = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, start: Tensor | None) -> Tensor:
        q, k, v = (_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        found = attend(q, k, v, mask, start, causal=self.causal, dropout=_rate(self.dropout))
        x = x + self.dropout(self.out(found.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ff2(self.dropout(F.gelu(self.ff1(self.norm2(x))))))


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide {dim} dims")


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H E) -> (B, H, T, E)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
